"""README.md of an exported model: what it is, how it is used, how it was trained and how well it did."""

import json
import os
from pathlib import Path
from typing import Any

from megatron_embed import __version__
from megatron_embed.cli.inputs import log_directory
from megatron_embed.config.schema import RunConfig

_EMBEDDING_USE = """```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH")
queries = model.encode_query(["what is asked"])
documents = model.encode_document(["what may answer it", "something else"])
print(model.similarity(queries, documents))
```"""
_RERANKER_USE = """```python
from sentence_transformers import CrossEncoder

model = CrossEncoder("PATH")
print(model.predict([("what is asked", "what may answer it"), ("what is asked", "something else")]))
```"""


def write_card(directory: Path, config: RunConfig, *, step: int, dim: int | None) -> None:
    """Puts README.md into a complete export, in place of the one that came with the model it was trained from.

    Args:
        step: optimizer steps of the exported weights; the evaluation after them is quoted, if there was one.
        dim: width of the vectors; null: a reranker.
    """
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in _head(config).items()), "---", "",
             f"# {directory_title(config)}", "", _what(config, dim), "", "## Use", "",
             _EMBEDDING_USE if config.task == "embedding" else _RERANKER_USE, "", *_prompts(config), "## Training", "",
             "| setting | value |", "|---|---|",
             *(f"| {name} | {value} |" for name, value in _training(config, step)), ""]
    metrics = _evaluation(config, step)
    if metrics:
        lines += [f"## Evaluation after step {step}", "", "| metric | value |", "|---|---|",
                  *(f"| {name} | {value:.4f} |" for name, value in metrics.items()), ""]
    (directory / "README.md").write_text("\n".join(lines), encoding="utf-8")


def directory_title(config: RunConfig) -> str:
    """The name that the export's directory will have; without one, the model's."""
    return Path(config.checkpoint.export_at_end or config.model.path).name


def _is_local(path: str) -> bool:
    return os.path.exists(path)


def _head(config: RunConfig) -> dict[str, Any]:
    """What hubs read. A directory of this machine is no model's name."""
    kind = "sentence-similarity" if config.task == "embedding" else "text-ranking"
    base = {} if _is_local(config.model.path) else {"base_model": config.model.path}
    tags = ["sentence-transformers", "feature-extraction" if config.task == "embedding" else "cross-encoder",
            "megatron-embed"]
    return {"library_name": "sentence-transformers", "pipeline_tag": kind, "tags": tags, **base}


def _what(config: RunConfig, dim: int | None) -> str:
    base = Path(config.model.path).name if _is_local(config.model.path) else config.model.path
    by = f"fine-tuned from {base} by megatron_embed {__version__}."
    if dim is None:
        return f"A reranker: scores a query with a document; {by}"
    widths = config.embedding.matryoshka_dims
    also = f" Trained to be cut to {', '.join(map(str, widths))} numbers as well." if widths else ""
    unit = ("unit vectors, compared by their cosine" if config.embedding.unit_length
            else "compared by their dot product")
    return f"An embedding model: texts to vectors of {dim} numbers ({unit}); {by}{also}"


def _prompts(config: RunConfig) -> list[str]:
    found = [f"- {role}: `{prompt!r}`" for role, prompt in (("query", config.data.prompt("query")),
                                                            ("document", config.data.prompt("document"))) if prompt]
    return ["Prompts, which `encode_query` and `encode_document` put before a text:", "", *found, ""] if found else []


def _training(config: RunConfig, step: int) -> list[tuple[str, object]]:
    training, parallel, data = config.training, config.parallel, config.data
    sizes = {"tensor": parallel.tensor_model_parallel_size, "pipeline": parallel.pipeline_model_parallel_size,
             "context": parallel.context_parallel_size, "expert": parallel.expert_model_parallel_size}
    layout = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    rows: list[tuple[str, object]] = [
        ("data", ", ".join(Path(file.path).name if _is_local(file.path) else file.path for file in data.train)),
        ("loss", config.objective.loss)]
    if config.task == "embedding":
        rows += [("temperature", config.objective.temperature), ("negatives", config.objective.negatives),
                 ("hard negatives per query", data.num_negatives)]
    rows += [("optimizer steps", step), ("queries per step", training.global_batch_size),
             ("learning rate", f"{training.learning_rate:g}, {training.lr_decay_style}"),
             ("maximum tokens of query / document", f"{data.max_length('query')} / {data.max_length('document')}"),
             ("dtype", config.model.dtype), ("seed", training.seed)]
    if config.lora.rank:
        rows.append(("adapters (merged)", f"rank {config.lora.rank}, alpha {config.lora.alpha:g}"))
    return rows + ([("model-parallel layout", layout)] if layout else [])


def _evaluation(config: RunConfig, step: int) -> dict[str, float]:
    """Metrics of the run's evaluation after so many steps, as metrics.jsonl has them; empty if there was none."""
    folder = log_directory(config)
    file = None if folder is None else Path(folder) / "metrics.jsonl"
    if file is None or not file.is_file():
        return {}
    found: dict[str, float] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # cut short by a kill; the run wrote it again
        if values.get("step") == step:
            found |= {name.removeprefix("eval/"): value for name, value in values.items()
                      if name.startswith("eval/") and value is not None}
    return found
