"""Section `logging`: what a run writes of itself, where and how often."""

from dataclasses import dataclass

from megatron_embed.config.require import require


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    directory: str | None = None
    """Directory for metrics.jsonl, audit.jsonl and TensorBoard, and config.yaml if checkpoints are elsewhere; null:
    checkpoint.directory, and if that is null too, nothing is written."""
    every_steps: int = 10
    """Optimizer steps between log lines, > 0."""
    tensorboard: bool = True
    """Write curves, and with evaluation sets projector data, to DIRECTORY/tensorboard."""
    wandb: bool = False
    """Also log a run at Weights & Biases; needs its package. WANDB_PROJECT, WANDB_MODE and the like apply."""
    spike_deviations: float = 8.0
    """A loss or gradient norm this many standard deviations above the mean of the last 100 steps is reported with the
    files and lines of the step's rows; 0 is off."""
    parameter_checksum_every: int = 10
    """Optimizer steps between checksums of all parameters in audit.jsonl, which name a rank whose copy is not equal to
    the others', and by which `audit` checks the optimizer's update; starts and checkpoints have one in any case. 0:
    those alone."""
    max_file_mib: int = 64
    """MiB above which metrics.jsonl or audit.jsonl is renamed to NAME.000001.jsonl, NAME.000002.jsonl, ... and a new
    one begins, with metrics.jsonl also TensorBoard's file of events, >= 0. `doctor`, `audit` and a resumed run read
    all of them. 0: never."""

    def __post_init__(self) -> None:
        require(self.every_steps >= 1, "logging.every_steps", self.every_steps, "must be >= 1")
        require(self.spike_deviations >= 0, "logging.spike_deviations", self.spike_deviations, "must be >= 0")
        require(self.parameter_checksum_every >= 0, "logging.parameter_checksum_every", self.parameter_checksum_every,
                "must be >= 0")
        require(self.max_file_mib >= 0, "logging.max_file_mib", self.max_file_mib, "must be >= 0; 0 is off")
