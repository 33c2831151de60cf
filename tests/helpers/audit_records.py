"""Lines of an audit.jsonl as a run writes them."""

from megatron_embed.config.load import to_dict
from megatron_embed.config.schema import ModelConfig, RunConfig
from megatron_embed.training.fingerprints import COUNTS, HASHES


def start_record(step=0, **facts):
    """A start of one rank, after so many steps."""
    return {"step": step, "parameter_bits": "0" * 16, "parameter_norm": 1.0, "start": {
        "world_size": 1, "parallel": to_dict(RunConfig(model=ModelConfig(path=".")))["parallel"], "dtype": "float32",
        "settings": "0" * 32, "rows": {"rows": 8, "digest": "x", "order": 2}, **facts}}


def step_record(step, **changes):
    """A step."""
    metrics = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1, "skipped": 0.0}
    return {"step": step, **dict.fromkeys(HASHES, "0" * 16), **dict.fromkeys(COUNTS, 8), "micro_batches": 1,
            "metrics": metrics, **changes}
