"""Environment variables that depend on a run."""

from megatron_embed.config.schema import RunConfig
from megatron_embed.platform import cuda_environment


def set_environment(config: RunConfig) -> None:
    """Set the variables that depend on the run, before CUDA starts. Raises ConfigError if one contradicts it."""
    cuda_environment.set_for_layout(config.parallel.tensor_model_parallel_size, config.parallel.context_parallel_size)
    if config.training.deterministic:
        cuda_environment.set_deterministic()
