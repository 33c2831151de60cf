"""The check that every setting's rule is written with, and that of the batch sizes."""

from megatron_embed.errors import ConfigError
from megatron_embed.rounding import round_up


def require(condition: bool, key: str, value: object, rule: str) -> None:
    """Raises ConfigError that names the key, its value and the rule, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key} = {value!r}: {rule}", key=key)


def micro_batches_per_step(global_batch_size: int, micro_batch_size: int, dp_size: int) -> int:
    """Micro-batches of each rank in an optimizer step. Raises ConfigError if the batch sizes do not divide."""
    unit = micro_batch_size * dp_size
    if global_batch_size % unit:
        raise ConfigError(
            f"training.global_batch_size = {global_batch_size} is not a multiple of micro_batch_size * "
            f"data_parallel_size = {micro_batch_size} * {dp_size} = {unit}; next valid: "
            f"{round_up(global_batch_size, unit)}", key="training.global_batch_size")
    return global_batch_size // unit
