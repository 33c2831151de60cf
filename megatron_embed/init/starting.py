"""A starting configuration for a model and data: sizes by the planner, counts by the rows, a comment for each line."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from megatron_embed.config.data import TrainFile
from megatron_embed.config.load import config_of_overrides
from megatron_embed.config.schema import RunConfig
from megatron_embed.data.row_source import is_hub_name
from megatron_embed.init.draft import scalar, sections
from megatron_embed.planning.hardware import GPU

if TYPE_CHECKING:
    from megatron_embed.models.families import ModelShape
    from megatron_embed.planning.layouts import Plan

Values = dict[str, tuple[Any, str]]

MOST_NEGATIVES = 7
"""Negatives per query to begin with, of rows that have more."""
_LARGEST_BATCH = 512
_STEPS_PER_EPOCH = 20
"""Steps that an epoch has at least, as far as the rows allow."""
_FEW_ROWS = 10_000


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the data holds."""

    count: int | None
    """None: not on this machine."""
    kind: Literal["contrastive", "pairs", "rerank"]
    binary: bool = False
    """Whether the scores of pairs, or the labels of lists, are 0 and 1 alone."""
    negatives: int = 0
    """Negatives of the row with the most."""
    instructions: bool = False
    """Whether rows carry instructions."""


def starting_text(model: str, data: list[str], *, task: Literal["embedding", "reranker"], lora: bool, gpus: int,
                  gpu: GPU, columns: dict[str, str]) -> str:
    """The YAML of a run that trains `model` on `data`.

    Args:
        columns: column -> field, of all data sets.
    Raises:
        ConfigError, DataError: the data cannot be read.
        CheckpointError: the model is of no supported family.
    """
    from megatron_embed.planning.shapes import find_shape, stored_quantization_of

    rows, stored = look_at(data, columns), stored_quantization_of(model)
    lora = lora or stored is not None
    shape = find_shape(model)
    values: Values = {"task": (task, ""), "model.path": (model, "a directory or a hub name")}
    if stored is not None:
        values["model.quantization"] = (stored.quantization, "as its files are: adapters are trained over them")
        values["model.double_quantization"] = (stored.double_quantization, "")
    is_reranker = task == "reranker"
    _objective(values, is_reranker, rows)
    entries = [{"path": path, "columns": columns} for path in data] if columns else data
    values["data.train"] = (entries, "" if rows.count is None else f"{rows.count:,} rows")
    if rows.count is None or rows.count >= 100:
        values["data.validation_fraction"] = (0.02 if rows.count is None or rows.count > 2000 else 0.1,
                                              "held out; their loss is logged as eval/loss")
    _lengths(values, is_reranker, rows)
    _steps(values, rows, lora, shape)
    if lora:
        values["lora.rank"] = (16, "adapters on every linear layer; docs/lora.md")
        values["lora.alpha"] = (32, "")
    notes = _sizes(values, shape, gpus, gpu)
    _outputs(values, rows)
    command = "megatron-embed train FILE" if gpus == 1 else (
        f"torchrun --nproc-per-node {min(gpus, 8)} -m megatron_embed train FILE")
    head = [f"# {task} of {model}. Every key: docs/settings.md.",
            "#   megatron-embed doctor --config FILE       is everything there?",
            "#   megatron-embed data check FILE            counts, lengths and duplicates of the rows",
            f"#   megatron-embed plan FILE --gpus {gpus}         memory and time",
            f"#   {command}", *(f"# {note}" for note in notes)]
    return "\n".join([*head, *sections(values)]) + "\n"


def look_at(paths: list[str], columns: dict[str, str]) -> Rows:
    """The kind of rows of these data sets; all of them are read and checked. Nothing is fetched from the hub.

    Args:
        columns: column -> field.
    """
    if any(is_hub_name(path) for path in paths):
        return Rows(count=None, kind="contrastive")
    from megatron_embed.data.columns import COLUMNS_OPTION
    from megatron_embed.data.dataset import open_records
    from megatron_embed.data.records import Record

    records = open_records(tuple(TrainFile(path=path, columns=columns) for path in paths), None,
                           columns_key=COLUMNS_OPTION)
    instructions = set(records.instructions) != {None}
    first = records[0]
    if not isinstance(first, Record):
        binary = all(label in (0, 1) for record in records if not isinstance(record, Record) for label in record.labels)
        return Rows(count=len(records), kind="rerank", binary=binary, negatives=records.most_documents - 1,
                    instructions=instructions)
    if first.score is not None:
        scores = {record.score for record in records if isinstance(record, Record)}
        return Rows(count=len(records), kind="pairs", binary=scores <= {0.0, 1.0}, instructions=instructions)
    return Rows(count=len(records), kind="contrastive", negatives=records.most_negatives, instructions=instructions)


def _objective(values: Values, is_reranker: bool, rows: Rows) -> None:
    if is_reranker and rows.kind == "pairs":
        values["objective.loss"] = ("pointwise", "each pair is relevant or not; scores from 0 to 1")
    elif is_reranker:
        values["objective.loss"] = ("listwise", "softmax over the documents of a query; docs/rerankers.md has others")
    elif rows.kind == "pairs":
        loss, why = ("online_contrastive", "labels 0 and 1") if rows.binary else (
            "cosent", "scores of any range: only their order counts")
        values["objective.loss"] = (loss, why)
        if loss == "cosent":
            values["objective.temperature"] = (0.05, "divides the cosine; Sentence Transformers' scale of 20")
    else:
        values["objective.loss"] = ("info_nce", "a query's positive against all documents of the global batch")
        values["objective.temperature"] = (0.02, "divides the similarity; 0.01 to 0.1 is usual")
        values["objective.mask_duplicates"] = (True, "a document that is a positive of a query is not its negative")
    if rows.kind != "pairs" and rows.negatives:
        most = min(rows.negatives, MOST_NEGATIVES)
        values["data.num_negatives"] = (most, f"of up to {rows.negatives} in a row")


def _lengths(values: Values, is_reranker: bool, rows: Rows) -> None:
    if is_reranker:
        values["reranker.max_length"] = (512, "tokens of a query with a document; longer documents are cut")
        return
    symmetric = rows.kind == "pairs"
    values["data.query_max_length"] = (128, "tokens; `data check` shows how many texts are cut")
    values["data.document_max_length"] = (128 if symmetric else 512, "")
    if rows.instructions:
        values["data.query_prompt"] = ("Instruct: {instruction}\nQuery:", "takes the instruction of each row")


def _steps(values: Values, rows: Rows, lora: bool, shape: "ModelShape | None") -> None:
    """Batch, length and learning rate."""
    count = rows.count
    batch = _LARGEST_BATCH
    trained = None if count is None else count - round(count * values.get("data.validation_fraction", (0, ""))[0])
    while trained is not None and batch > 8 and batch * _STEPS_PER_EPOCH > trained:
        batch //= 2
    while trained is not None and batch > trained:
        batch //= 2
    values["training.global_batch_size"] = (max(batch, 1), "queries per optimizer step, over all GPUs")
    epochs = 3 if count is not None and count < _FEW_ROWS else 1
    values["training.epochs"] = (epochs, "")
    large = shape is not None and shape.hidden_size >= 2048
    rate = 1e-4 if lora else 5e-6 if large else 1e-5 if shape is None or shape.hidden_size >= 1024 else 2e-5
    values["training.learning_rate"] = (rate, "the first setting to try others of")
    values["training.warmup_ratio"] = (0.1, "")


def _sizes(values: Values, shape: "ModelShape | None", gpus: int, gpu: GPU) -> list[str]:
    """Put layout and micro-batches into the values, as the planner advises; notes for the head."""
    if shape is None:
        values["training.micro_batch_size"] = (min(8, values["training.global_batch_size"][0]), "queries at once")
        return ["The model is not on this machine and its shape does not ship with the package, so no sizes are "
                "planned:", "try `megatron-embed plan FILE --gpus N` when it is here."]
    from megatron_embed.planning.one_gpu import within_share

    best = _advised(values, shape, gpus, gpu)
    if gpus == 1 and (best is None or not within_share(best, gpu)):
        best = _other_method(values, shape, gpu) or best
    if best is None:
        values["training.micro_batch_size"] = (1, "queries at once")
        return [f"NO LAYOUT FITS {gpus} x {gpu.name}: more GPUs (--gpus), LoRA (--lora) or shorter texts are needed."]
    config = best.config
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"):
        size = vars(config.parallel)[name]
        if size > 1:
            values[f"parallel.{name}"] = (size, f"for {gpus} x {gpu.name}")
    gib = best.memory.total / 2**30
    if config.training.micro_batch_tokens is not None:
        values["training.micro_batch_tokens"] = (config.training.micro_batch_tokens,
                                                 f"of whole texts; {gib:.0f} of {gpu.memory_gib:.0f} GiB by `plan`")
    else:
        values["training.micro_batch_size"] = (config.training.micro_batch_size,
                                               f"queries at once; {gib:.0f} of {gpu.memory_gib:.0f} GiB by `plan`")
    if config.training.recompute != "none":
        values["training.recompute"] = (config.training.recompute, "activations are computed twice to save memory")
    return [f"Sizes for {gpus} x {gpu.name} (--gpus, --gpu give others)."]


def _advised(values: Values, shape: "ModelShape", gpus: int, gpu: GPU) -> "Plan | None":
    """The fastest plan that fits; None if none does."""
    from megatron_embed.planning.advice import adapted_linears, budget_holds
    from megatron_embed.planning.layouts import propose
    from megatron_embed.planning.token_budget import advised_budget

    config = config_of_overrides([f"{key}={scalar(value)}" for key, (value, _) in values.items()])
    config = _divisible(config, values, gpus)
    adapted = adapted_linears(config, shape)
    proposals = propose(config, shape, gpus, gpu, adapted, accepts=budget_holds)
    if not proposals:
        return None
    return advised_budget(proposals[0].config, shape, gpus, gpu, adapted, accepts=budget_holds) or proposals[0]


def _other_method(values: Values, shape: "ModelShape", gpu: GPU) -> "Plan | None":
    """The plan of the first other method that fits on one GPU, whose settings go into the values; None if none does."""
    from megatron_embed.planning.one_gpu import compare_methods, first_that_fits
    from megatron_embed.planning.shapes import checkpoint_at, stored_quantization_of

    config = config_of_overrides([f"{key}={scalar(value)}" for key, (value, _) in values.items()])
    method = first_that_fits(compare_methods(
        _divisible(config, values, 1), shape, gpu, trains_all="lora.rank" not in values,
        quantizes=checkpoint_at(config.model.path) is None, stored=stored_quantization_of(config.model.path)))
    if method is None:
        return None
    for section in ("model", "lora", "optimizer"):
        for key, value in method.changes.get(section, {}).items():
            values[f"{section}.{key}"] = (value, f"{method.name}, the first way that fits into 90 % of {gpu.name}")
    if method.changes.get("lora"):
        values["training.learning_rate"] = (1e-4, "the first setting to try others of")
    return method.plan


def _divisible(config: RunConfig, values: Values, gpus: int) -> RunConfig:
    """The configuration with micro-batches that divide its global batch, which is one query per GPU or more."""
    batch = max(config.training.global_batch_size, gpus)
    batch -= batch % gpus
    values["training.global_batch_size"] = (batch, values["training.global_batch_size"][1])
    training = dataclasses.replace(config.training, global_batch_size=batch, micro_batch_size=1)
    return dataclasses.replace(config, training=training)


def _outputs(values: Values, rows: Rows) -> None:
    """Checkpoints, evaluation and logs at intervals that fit the number of steps."""
    steps = 1000
    if rows.count is not None:
        steps = max(rows.count * values["training.epochs"][0] // values["training.global_batch_size"][0], 1)
    every = max(steps // 10, 1)
    values["checkpoint.directory"] = ("runs/first", "training state; the same command resumes from it")
    values["checkpoint.save_every_steps"] = (every, f"of about {steps:,} steps" if rows.count is not None else "")
    values["checkpoint.export_at_end"] = ("export/first", "the trained model, for Sentence Transformers")
    values["evaluation.every_steps"] = (every, "")
    values["logging.every_steps"] = (max(steps // 100, 1), "")
