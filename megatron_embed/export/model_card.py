"""README.md of an exported model: what it is, how it is used, how it was trained and how well it did."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_embed import __version__
from megatron_embed.checkpoint.log_files import log_exists, objects_of_log
from megatron_embed.config.json_file import read_optional_json_object
from megatron_embed.config.load import load_config
from megatron_embed.config.schema import RunConfig
from megatron_embed.convert.checkpoint_directory import CheckpointDirectory, open_checkpoint
from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.models.dense_settings import embedding_width
from megatron_embed.models.families import model_shape
from megatron_embed.models.joint_files import VECTORS_FILE, WEIGHTS_FILE
from megatron_embed.models.saved_settings import default_pooling, read_saved_settings
from megatron_embed.names import RANGES_FILE, ExportFormat, ModelPooling

logger = logging.getLogger(__name__)

_EMBEDDING_USE = """```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH")
queries = model.encode_query(["what is asked"])
documents = model.encode_document(["what may answer it", "something else"])
print(model.similarity(queries, documents))
```"""
_SPARSE_USE = """```python
from sentence_transformers import SparseEncoder

model = SparseEncoder("PATH")
queries = model.encode_query(["what is asked"])
documents = model.encode_document(["what may answer it", "something else"])
print(model.similarity(queries, documents), model.decode(queries[0], top_k=5))
```"""
_MULTI_VECTOR_USE = """```python
from sentence_transformers import MultiVectorEncoder  # version 6 or later

model = MultiVectorEncoder("PATH")
queries = model.encode_query(["what is asked"])
documents = model.encode_document(["what may answer it", "something else"])
print(model.similarity(queries, documents))
```"""
_PYLATE_USE = """```python
from pylate import models

model = models.ColBERT("PATH")
queries = model.encode(["what is asked"], is_query=True)
documents = model.encode(["what may answer it", "something else"], is_query=False)
```"""
_PLAIN_USE = """```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModel.from_pretrained("PATH")
states = model(**tokenizer(["a text"], return_tensors="pt")).last_hidden_state  # HOW
```"""
_PEFT_USE = """```python
from peft import PeftConfig, PeftModel
from transformers import AUTO

base = AUTO.from_pretrained(PeftConfig.from_pretrained("PATH").base_model_name_or_pathMORE)
model = PeftModel.from_pretrained(base, "PATH")
```"""
_AUTO = {None: ("AutoModel", ""), "score": ("AutoModelForSequenceClassification", ", num_labels=1"),
         "yes_no": ("AutoModelForCausalLM", "")}
_RERANKER_USE = """```python
from sentence_transformers import CrossEncoder

model = CrossEncoder("PATH")
print(model.predict([("what is asked", "what may answer it"), ("what is asked", "something else")]))
```"""


def write_card(directory: Path, config: RunConfig, *, step: int, dim: int | None, title: str | None = None,
               use: str | None = None, library: str = "sentence-transformers") -> None:
    """Puts README.md into a complete export, in place of the one that came with the model it was trained from.

    Args:
        step: optimizer steps of the exported weights; the evaluation after them is quoted, if there was one.
        dim: dimensions of the vectors; None: a reranker.
        title: None: the name of `checkpoint.export_at_end`.
        use: how it is loaded; None: as Sentence Transformers does.
        library: that loads it, by the hub's name.
    """
    uses = {"multi_vector": _MULTI_VECTOR_USE, "sparse": _SPARSE_USE}
    use = use or (_RERANKER_USE if dim is None else uses.get(config.embedding.head or "", _EMBEDDING_USE))
    prompts = _saved_prompts(directory) or {role: config.data.prompt(role) for role in ("query", "document")}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in _head(config, library, dim).items()), "---", "",
             f"# {title or directory_title(config)}", "", _what(config, dim) + _ranges(directory), "",
             "## Use", "", use, "", *_prompts(prompts), "## Training", "",
             "| setting | value |", "|---|---|",
             *(f"| {name} | {value} |" for name, value in _training(config, step, dim)), ""]
    metrics = evaluation_after(config, step)
    if metrics:
        lines += [f"## Evaluation after step {step}", "", "| metric | value |", "|---|---|",
                  *(f"| {name} | {value:.4f} |" for name, value in metrics.items()), ""]
    (directory / "README.md").write_text("\n".join(lines), encoding="utf-8")


def write_converted_card(directory: Path, *, source: str, destination: str, kind: ExportFormat) -> None:
    """Puts README.md into a converted checkpoint: of the run that wrote it, else of the model as it came.

    A model that was not trained here keeps the card that it came with.

    Args:
        directory: complete but for its card.
        source: the checkpoint.
        destination: the name that the directory will have.
        kind: whose files they are.
    Raises:
        CheckpointError: the prompts that the checkpoint came with, which were copied, cannot be read.
    """
    checkpoint = open_checkpoint(source)
    prompts = _saved_prompts(directory)
    info, title, file = checkpoint.info, Path(destination).absolute().name, checkpoint.path / "config.yaml"
    library = {"hf": "transformers", "peft": "peft", "pylate": "PyLate"}.get(kind, "sentence-transformers")
    pooling, dim = _pooling_of(checkpoint.hf) if info.head is None else (None, None)
    use = _use(kind, info.head, pooling)
    if pooling == "tokens" and kind != "hf":
        use = _PYLATE_USE if kind == "pylate" else _MULTI_VECTOR_USE
    if pooling == "splade" and kind != "hf":
        use = _SPARSE_USE
    config = _run_of(file)
    if config is not None:
        from megatron_embed.checkpoint.load import steps_done  # loads Megatron, which comparing does anyway

        write_card(directory, config, step=steps_done(checkpoint.path), dim=dim, title=title, use=use, library=library)
    elif file.is_file() or not (directory / "README.md").is_file():
        (directory / "README.md").write_text(_unknown_run(checkpoint, prompts, title, use, library, dim),
                                              encoding="utf-8")


def _pooling_of(hf: Path) -> tuple[ModelPooling | None, int]:
    """The pooling of a directory, and the numbers of a vector; None where it names none, or modules that pass through
    without being computed."""
    shape = model_shape(hf)
    try:
        saved = read_saved_settings(hf)
    except CheckpointError:
        return None, shape.hidden_size
    if saved.vectors is not None:
        return "tokens", embedding_width(saved.dense, shape, "tokens")
    if saved.sparse:
        return "splade", shape.vocab_size
    return saved.pooling, embedding_width(saved.dense, shape, saved.pooling or default_pooling(shape))


def _run_of(file: Path) -> RunConfig | None:
    """The configuration beside a checkpoint; None where there is none, or another version's."""
    try:
        return load_config(str(file), []) if file.is_file() else None
    except ConfigError:
        return None


def _use(kind: ExportFormat, head: str | None, pooling: str | None) -> str:
    """Python code that loads it."""
    if kind == "peft":
        auto, more = _AUTO[head]
        return _PEFT_USE.replace("AUTO", auto).replace("MORE", more)
    if kind == "hf" and head is None:
        known = pooling not in (None, "tokens", "splade")
        how = f"their pooling to one vector: {pooling}" if known else "token vectors"
        return _PLAIN_USE.replace("HOW", how)
    return _EMBEDDING_USE if head is None else _RERANKER_USE


def _unknown_run(checkpoint: CheckpointDirectory, prompts: dict[str, str], title: str, use: str, library: str,
                 dim: int | None) -> str:
    """The card of a model of whose training nothing is known."""
    kind = "sentence-similarity" if dim else "text-ranking"
    if library == "transformers" and dim:
        kind = "feature-extraction"
    head = {"library_name": library, "pipeline_tag": kind, "tags": ["megatron-embed"]}
    what = f"vectors of {dim} numbers" if dim else "scores of a query with a document"
    rows = [("architecture", ", ".join(checkpoint.info.source_architectures) or checkpoint.info.family),
            ("dtype of the checkpoint", checkpoint.info.dtype)]
    return "\n".join([
        "---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", "", f"# {title}", "",
        f"Texts to {what}; converted by megatron_embed {__version__} from a checkpoint that does not say how it was "
        "trained.", "", "## Use", "", use, "", *_prompts(prompts), "## Model", "",
        "| setting | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""])


def _saved_prompts(directory: Path) -> dict[str, str]:
    """Those that Sentence Transformers finds in a directory, by role. Raises CheckpointError."""
    prompts = read_optional_json_object(directory / "config_sentence_transformers.json").get("prompts")
    return {role: prompts[role] for role in ("query", "document") if prompts.get(role)} if isinstance(prompts, dict) \
        else {}


def directory_title(config: RunConfig) -> str:
    """The name that the export's directory will have; without one, the model's."""
    return Path(config.checkpoint.export_at_end or config.model.path).name


def _is_local(path: str) -> bool:
    return os.path.exists(path)


def _name(path: str) -> str:
    """A file or directory without the folders of this machine, or the hub's name."""
    return Path(path).name if _is_local(path) else path


def _head(config: RunConfig, library: str, dim: int | None) -> dict[str, Any]:
    """Metadata for hubs, which name the base model unless it is a directory of this machine."""
    kind = "text-ranking" if dim is None else "sentence-similarity"
    base = {} if _is_local(config.model.path) else {"base_model": config.model.path}
    tags = [library, "cross-encoder" if dim is None else "feature-extraction", "megatron-embed"]
    return {"library_name": library, "pipeline_tag": kind, "tags": tags, **base}


def _ranges(directory: Path) -> str:
    return (f" `{RANGES_FILE}` has `ranges` for Sentence Transformers' `quantize_embeddings`, by the number of "
            "components of a vector.") if (directory / RANGES_FILE).is_file() else ""


def _what(config: RunConfig, dim: int | None) -> str:
    by = f"fine-tuned from {_name(config.model.path)} by megatron_embed {__version__}."
    if dim is None:
        return f"A reranker: scores a query with a document; {by}"
    widths = config.embedding.matryoshka_dims
    also = f" Trained to be cut to {', '.join(map(str, widths))} numbers as well." if widths else ""
    stored = dict.fromkeys("binary" if precision == "rescore" else precision
                           for precision in config.embedding.precision if precision != "float32")
    also += f" Trained to be stored as {' and '.join(stored)} as well." if stored else ""
    if config.training.query_side_only:
        old = config.objective.compatible_with or config.model.path
        also += (f" For queries alone: documents keep the vectors of {_name(old)}, with which new ones are embedded "
                 "too.")
    if config.embedding.head == "multi_vector":
        return (f"A multi-vector embedding model: texts to a vector of {dim} numbers for every token, compared by "
                f"MaxSim; {by}")
    if config.embedding.head == "joint":
        dense, sparse, several = config.objective.score_weights
        return (f"A joint embedding model, as BGE-M3: texts to a unit vector and, for each token, a weight and a unit "
                f"vector; trained for the sum of {dense:g} * dense + {sparse:g} * sparse + {several:g} * multi-vector "
                f"scores; {by} `{VECTORS_FILE}` and `{WEIGHTS_FILE}` give tokens their vectors and weights, as "
                "FlagEmbedding's BGEM3FlagModel reads them; Sentence Transformers gives the texts' own vectors.")
    if config.embedding.head == "sparse":
        return (f"A sparse embedding model (SPLADE): texts to a weight for each of {dim} tokens of the vocabulary, "
                f"most of them 0, compared by dot product; {by}")
    unit = ("unit vectors, compared by their cosine" if config.embedding.unit_length
            else "compared by their dot product")
    return f"An embedding model: texts to vectors of {dim} numbers ({unit}); {by}{also}"


def _prompts(prompts: Mapping[str, str]) -> list[str]:
    lines = [f"- {role}: `{prompt!r}`" for role, prompt in prompts.items() if prompt]
    return ["Prompts, which `encode_query` and `encode_document` put before a text:", "", *lines, ""] if lines else []


def _training(config: RunConfig, step: int, dim: int | None) -> list[tuple[str, object]]:
    training, parallel, data, objective = config.training, config.parallel, config.data, config.objective
    sizes = {"tensor": parallel.tensor_model_parallel_size, "pipeline": parallel.pipeline_model_parallel_size,
             "context": parallel.context_parallel_size, "expert": parallel.expert_model_parallel_size}
    layout = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    rows: list[tuple[str, object]] = [
        ("data", ", ".join(_name(file.path) for file in data.train)), ("loss", objective.loss)]
    if dim is not None:
        rows += [(key, vars(objective)[key]) for key in ("temperature", "negatives") if objective.takes(key)]
        rows += [(name, _name(other)) for name, other in (
            ("guide", objective.guide_model), ("teacher", objective.teacher_model),
            ("vectors of documents that were kept", objective.compatible_with)) if other is not None]
        rows.append(("hard negatives per query", data.num_negatives))
    rows += [("optimizer steps", step), ("queries per step", training.global_batch_size),
             ("learning rate", f"{training.learning_rate:g}, {training.lr_decay_style}"),
             ("maximum tokens of query / document", f"{data.max_length('query')} / {data.max_length('document')}"),
             ("dtype", config.model.dtype), ("seed", training.seed)]
    if config.lora.rank:
        rows.append(("adapters (merged)", f"rank {config.lora.rank}, alpha {config.lora.alpha:g}"))
    return rows + ([("model-parallel layout", layout)] if layout else [])


def evaluation_after(config: RunConfig, step: int) -> dict[str, float]:
    """Metrics of the run's evaluation after so many steps, as metrics.jsonl has them; empty if there was none."""
    file = None if config.log_directory is None else Path(config.log_directory) / "metrics.jsonl"
    if file is None or not log_exists(file):
        return {}
    metrics: dict[str, float] = {}
    try:
        for values in objects_of_log(file):
            if values.get("step") == step:
                metrics |= {name.removeprefix("eval/"): value for name, value in values.items()
                            if name.startswith("eval/") and isinstance(value, int | float)}
    except OSError as error:
        logger.warning("%s: cannot be read (%s); what its evaluations found is left out", file, error.strerror)
    return metrics
