"""First view of the dashboards: TensorBoard's page of custom scalars, and a run at Weights & Biases."""

import os
from pathlib import Path
from typing import Any

_BOTH = r"(train|eval)/"
_SET = r"(?!train/|eval/).*/"
"""Beginning of the metrics of steps whose rows come from one entry of `data.train`."""
_FULL, _CUT = r"eval/(?!.*dim_\d+/).*", r"eval/(.*/)?dim_\d+/"
_MARGIN = r"margin(_to_(mean|hardest)_negative)?$"
_LEARNED = r"(temperature|bias|log_scale_gradient|bias_gradient)$"

CUSTOM_SCALARS = {
    "Loss": {
        "loss": ["Multiline", [_BOTH + r"loss$"]],
        "loss at each width": ["Multiline", [_BOTH + r"loss@[a-z0-9@]+$"]],
        "gradient norm": ["Multiline", [r"train/grad_norm$"]],
        "learning rate": ["Multiline", [r"train/learning_rate$"]],
        "epoch": ["Multiline", [r"train/epoch$"]],
        "trained temperature and bias": ["Multiline", [_BOTH + _LEARNED]],
        "balance of the experts": ["Multiline", [r"train/load_balancing_loss$"]],
        "skipped steps": ["Multiline", [r"train/skipped_steps$"]]},
    "Retrieval": {
        "held-out retrieval": ["Multiline", [_FULL + r"(ndcg|mrr|recall|map)[^/]*$"]],
        "held-out retrieval, precision": ["Multiline", [_FULL + r"precision@\d+$"]],
        "held-out retrieval by truncated vectors": ["Multiline", [_CUT + r"(ndcg|mrr|recall|map)[^/]*$"]],
        "held-out retrieval by truncated vectors, precision": ["Multiline", [_CUT + r"precision@\d+$"]],
        "held-out pairs": ["Multiline", [_FULL + r"(spearman|pearson)$"]],
        "held-out pairs by truncated vectors": ["Multiline", [_CUT + r"(spearman|pearson)$"]],
        "accuracy within a batch": ["Multiline", [_BOTH + r"(in_batch_)?accuracy$"]],
        "similarities": ["Multiline", [_BOTH + r"((positive|negative)_)?similarity$"]],
        "scores": ["Multiline", [_BOTH + r"(positive|negative)_score$"]],
        "margin": ["Multiline", [_BOTH + _MARGIN]],
        "negatives of a query": ["Multiline", [_BOTH + r"negatives_per_query$"]],
        "masked negatives": ["Multiline", [_BOTH + r"masked_fraction$"]]},
    "Throughput": {
        "tokens per second": ["Multiline", [r"train/tokens_per_second$"]],
        "TFLOP/s per rank": ["Multiline", [r"train/tflops_per_rank$"]],
        "share of the GPU's peak": ["Multiline", [r"train/mfu$"]],
        "seconds per step": ["Multiline", [r"train/step_seconds$"]],
        "seconds of waiting for data": ["Multiline", [r"train/data_wait_seconds$"]],
        "padding": ["Multiline", [r"train/padding_fraction$"]],
        "texts that are cut": ["Multiline", [r"train/truncated_fraction$"]],
        "texts that share a vector": ["Multiline", [r"train/repeated_fraction$"]]},
    "Memory": {"GiB of the largest rank": ["Multiline", [r"train/memory_gib$"]]},
    "Data sets": {
        "share of the rows": ["Multiline", [r"train/row_share_.+$"]],
        "loss": ["Multiline", [_SET + r"loss$"]],
        "loss at each width": ["Multiline", [_SET + r"loss@[a-z0-9@]+$"]],
        "trained temperature and bias": ["Multiline", [_SET + _LEARNED]],
        "balance of the experts": ["Multiline", [_SET + r"load_balancing_loss$"]],
        "accuracy within a batch": ["Multiline", [_SET + r"(in_batch_)?accuracy$"]],
        "similarities": ["Multiline", [_SET + r"((positive|negative)_)?similarity$"]],
        "scores": ["Multiline", [_SET + r"(positive|negative)_score$"]],
        "margin": ["Multiline", [_SET + _MARGIN]],
        "negatives of a query": ["Multiline", [_SET + r"negatives_per_query$"]],
        "masked negatives": ["Multiline", [_SET + r"masked_fraction$"]]},
}
"""Groups of charts, each of the tags that a regular expression matches from the beginning."""
WANDB_ID_FILE = "wandb_id"
_LONGEST_ID = 200


def open_wandb(directory: Path, settings: dict[str, Any]) -> Any:
    """A run at Weights & Biases; a resumed run continues its own. WANDB_PROJECT, WANDB_MODE and the rest of its
    environment hold; the defaults are project megatron-embed and the directory's name.

    Args:
        settings: the resolved configuration.
    """
    import wandb

    file = directory / WANDB_ID_FILE
    known = None
    if file.is_file():
        with file.open(encoding="utf-8", errors="replace") as opened:
            known = opened.read(_LONGEST_ID).strip() or None
    run = wandb.init(project=os.environ.get("WANDB_PROJECT", "megatron-embed"), id=known, resume="allow",
                     name=os.environ.get("WANDB_NAME", directory.name), dir=str(directory), config=settings)
    file.write_text(run.id + "\n", encoding="utf-8")
    return run
