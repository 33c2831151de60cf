"""What dashboards show first: TensorBoard's page of custom scalars, and a run at Weights & Biases."""

import os
from pathlib import Path
from typing import Any

CUSTOM_SCALARS = {
    "Loss": {
        "loss": ["Multiline", [r"train/loss$", r"eval/loss$"]],
        "gradient norm": ["Multiline", [r"train/grad_norm$"]],
        "learning rate": ["Multiline", [r"train/learning_rate$"]],
        "balance of the experts": ["Multiline", [r"train/load_balancing_loss$"]],
        "skipped steps": ["Multiline", [r"train/skipped_steps$"]]},
    "Retrieval": {
        "held-out retrieval": ["Multiline", [r"eval/.*(ndcg|mrr|recall|map)[^/]*$"]],
        "accuracy within a batch": ["Multiline", [r"train/(in_batch_)?accuracy$"]],
        "similarities": ["Multiline", [r"(train|eval)/(positive|negative)_similarity$"]],
        "margin": ["Multiline", [r"train/margin$", r"eval/margin$"]],
        "masked negatives": ["Multiline", [r"train/masked_fraction$"]]},
    "Throughput": {
        "tokens per second": ["Multiline", [r"train/tokens_per_second$"]],
        "TFLOP/s per rank": ["Multiline", [r"train/tflops_per_rank$"]],
        "share of the GPU's peak": ["Multiline", [r"train/mfu$"]],
        "seconds per step": ["Multiline", [r"train/step_seconds$"]],
        "padding": ["Multiline", [r"train/padding_fraction$"]]},
    "Memory": {"GiB of the largest rank": ["Multiline", [r"train/memory_gib$"]]},
    "Data sets": {
        "loss": ["Multiline", [r"(?!train/|eval/).*/loss$"]],
        "accuracy within a batch": ["Multiline", [r"(?!train/|eval/).*/(in_batch_)?accuracy$"]],
        "margin": ["Multiline", [r"(?!train/|eval/).*/margin$"]]},
}
"""Groups of charts, each of the tags that a regular expression matches from the beginning."""
WANDB_ID_FILE = "wandb_id"


def open_wandb(directory: Path, settings: dict[str, Any]) -> Any:
    """A run at Weights & Biases, the one before if this run goes on. WANDB_PROJECT, WANDB_MODE and the rest of its
    environment hold; what they leave open is project megatron-embed and the directory's name.

    Args:
        settings: the resolved configuration.
    """
    import wandb

    file = directory / WANDB_ID_FILE
    known = file.read_text(encoding="utf-8").strip() if file.exists() else None
    run = wandb.init(project=os.environ.get("WANDB_PROJECT", "megatron-embed"), id=known, resume="allow",
                     name=os.environ.get("WANDB_NAME", directory.name), dir=str(directory), config=settings)
    file.write_text(run.id + "\n", encoding="utf-8")
    return run
