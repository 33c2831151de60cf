"""Checks of `doctor --config` on all that a run reads: the model, its tokenizer, data, evaluation sets, packages.

They look at names and sizes of files only. Every node of a job runs them, so torch and Transformers stay unloaded.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_embed.config.json_file import LARGEST_INDEX, read_json_file
from megatron_embed.data.beir import is_beir_folder, require_split
from megatron_embed.data.csv_rows import CSV_ENDINGS
from megatron_embed.data.jsonl import ENDINGS
from megatron_embed.data.row_source import RowsKind, files_of, require_rows
from megatron_embed.data.vocabulary import has_tokenizer_files
from megatron_embed.errors import CheckpointError, ConfigError, DataError, UserError
from megatron_embed.names import EXPORT_PACKAGES
from megatron_embed.planning.shapes import (
    ADAPTER_FILE,
    base_model,
    checkpoint_at,
    find_shape,
    hub_cache,
    model_files,
)
from megatron_embed.platform.doctor import Check

if TYPE_CHECKING:
    from megatron_embed.config.data import TrainFile
    from megatron_embed.config.schema import RunConfig
    from megatron_embed.models.families import ModelShape

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_FETCHED = "on the hub, not on this machine: fetched when the run starts"


def check_inputs(config: "RunConfig") -> list[Check]:
    """Whether everything is there that training reads before its first step."""
    checks = [_run_check("model.path", config.model.path, lambda: _check_model(config.model.path))]
    if not checks[0].remedy and (files := model_files(config.model.path)) is not None:
        checks.append(_run_check("tokenizer", str(files), lambda: _check_tokenizer(files)))
    if not config.data.train:
        checks.append(Check(name="data.train", value="[]", remedy="data.train = []: training needs at least one "
                                "file of rows; add `train: [FILE.jsonl]` under data"))
    for key, files_of_rows in (("data.train", config.data.train), ("data.validation", config.data.validation)):
        for file in files_of_rows:
            checks.append(_run_check(key, file.path, lambda file=file, key=key: _check_rows(file, key)))
            if (corpus := file.corpus) is not None:
                checks.append(_run_check(f"{key}.corpus", corpus, lambda corpus=corpus, key=key: _note_of(
                    corpus, require_rows(corpus, f"{key}.corpus"), f"{key}.corpus")))
    return [*checks, *_check_evaluations(config), *_check_packages(config)]


def _check_evaluations(config: "RunConfig") -> Iterator[Check]:
    evaluation = config.evaluation
    for item in evaluation.retrieval:
        yield _run_check("evaluation.retrieval", item.path,
                         lambda path=item.path: _check_retrieval(path, evaluation.split))
    for item in evaluation.sts:
        yield _run_check("evaluation.sts", item.path, lambda path=item.path: _note_of(
            path, require_rows(path, "evaluation.sts"), "evaluation.sts"))
    for path in evaluation.reranking:
        yield _run_check("evaluation.reranking", path, lambda path=path: _note_of(
            path, require_rows(path, "evaluation.reranking"), "evaluation.reranking"))


def _run_check(key: str, value: str, look: Callable[[], str]) -> Check:
    """The note that `look` returns, or the remedy that it raises."""
    try:
        return Check(name=key, value=value, note=look())
    except UserError as error:
        text = str(error)
        return Check(name=key, value=value, remedy=text if text.startswith(key) else f"{key} = {value!r}: {text}")


def _check_model(path: str) -> str:
    """Raises CheckpointError if training could not open the model."""
    folder = Path(path).expanduser()
    files, checkpoint = model_files(path), checkpoint_at(path)
    if not folder.is_dir() and files is None:
        return _check_hub_name(path)
    if checkpoint is None and (folder / ADAPTER_FILE).is_file():
        if not (folder / "adapter_model.safetensors").is_file():
            raise CheckpointError("no adapter_model.safetensors; save the adapter with safe_serialization=True")
        base = base_model(folder)
        try:
            return _check_model(base)
        except CheckpointError as error:
            raise CheckpointError(f"{folder / ADAPTER_FILE}: base_model_name_or_path = {base!r}: {error}") from None
    if files is None:
        raise CheckpointError("no config.json, so this is not a model directory; give a Hugging Face or PEFT "
                              "directory, a checkpoint or a run's directory")
    find_shape(path)
    if checkpoint is None:
        _check_weights(files)
    elif not (checkpoint / "model" / ".metadata").is_file():
        raise CheckpointError(f"{checkpoint}: no model/.metadata, so the checkpoint has no weights; take another one")
    return ""


def readable_shape(path: str) -> "ModelShape | None":
    """The model's shape, None where it is not known or cannot be read (which `check_inputs` tells)."""
    try:
        return find_shape(path)
    except CheckpointError:
        return None


def _check_hub_name(name: str) -> str:
    """Raises CheckpointError where a name that is not a directory here cannot be fetched either."""
    if Path(name).expanduser().exists():
        raise CheckpointError("a file; give a model directory or a hub name such as Qwen/Qwen3-Embedding-0.6B")
    if name.startswith(("/", ".", "~")) or name.count("/") != 1 or os.path.isdir(name.partition("/")[0]):
        raise CheckpointError("no such directory; give a model directory or a hub name such as "
                              "Qwen/Qwen3-Embedding-0.6B")
    if _offline_variable():
        raise CheckpointError(f"no such directory, and as a hub name it is not in the cache {str(hub_cache())!r}, and "
                              f"{_offline_variable()} forbids to fetch it; fetch it before, or give a directory")
    return _FETCHED


def _offline_variable() -> str:
    """The variable that keeps the hub's client off the network; empty where none does."""
    return next((name for name in _OFFLINE if os.environ.get(name, "").lower() in ("1", "on", "yes", "true")), "")


def _check_weights(folder: Path) -> None:
    """Raises CheckpointError if a safetensors file of the model is missing."""
    if (folder / "model.safetensors").is_file():
        return
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise CheckpointError(f"{folder}: no model.safetensors and no {index.name}; fetch the weights, as safetensors")
    try:
        shards = sorted(set(read_json_file(index, LARGEST_INDEX)["weight_map"].values()))
        missing = [name for name in shards if not (folder / name).is_file()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not readable ({error!r}); fetch it again") from None
    if missing:
        raise CheckpointError(f"{index}: {missing[0]} is missing ({len(missing)} of {len(shards)} files); fetch it "
                              "into the same directory")


def _check_tokenizer(folder: Path) -> str:
    if not has_tokenizer_files(folder):
        raise CheckpointError("no tokenizer files; copy tokenizer.json and tokenizer_config.json of the model into it")
    return ""


def _check_rows(file: "TrainFile", key: str) -> str:
    """Raises ConfigError or DataError if an entry of `data.train` names nothing that can be opened."""
    if is_beir_folder(file.path):
        require_split(Path(file.path), "train")
        return ""
    return _note_of(file.path, require_rows(file.path, key, streaming=file.streaming), key)


def _note_of(path: str, kind: RowsKind, key: str) -> str:
    if kind != "hub":
        return ""
    name = path.partition(":")[0]
    if os.path.isdir(name.partition("/")[0]):
        raise ConfigError(f"{key} = {path!r}: no such file or directory; the current directory is {os.getcwd()!r}",
                          key=key)
    return _FETCHED


def _check_retrieval(path: str, split: str) -> str:
    if not is_beir_folder(path):
        raise DataError("no corpus.jsonl and queries.jsonl; a BEIR folder holds these and qrels/SPLIT.tsv")
    require_split(Path(path), split)
    return ""


def _needs_datasets(path: str) -> bool:
    """Whether the library `datasets` reads an entry of `data.train`."""
    if is_beir_folder(path):
        return False
    return any(not name.endswith((*ENDINGS, *CSV_ENDINGS)) for name in files_of(path) or [path])


def _check_packages(config: "RunConfig") -> Iterator[Check]:
    """Packages that this configuration needs beside those that every run does, and that are missing."""
    paths, model = [file.path for file in config.data.files], config.model
    engine = [setting for setting, asked in (
        ("model.attention = 'te'", model.attention == "te"), ("model.backend = 'te'", model.backend == "te"),
        (f"model.fp8 = {model.fp8!r}", model.fp8 != "none"),
        ("parallel.tp_comm_overlap = True", config.parallel.tp_comm_overlap),
        ("optimizer.precision_aware = True", config.optimizer.precision_aware)) if asked]
    needed = {
        "wandb": ("logging.wandb = True", config.logging.wandb, "pip install wandb, or set it to false"),
        "transformer_engine": (next(iter(engine), ""), bool(engine), "pip install 'megatron_embed[gpu]'"),
        "bitsandbytes": (f"model.quantization = {model.quantization!r}" if model.quantization != "none" else
                         "optimizer.name = 'adamw_8bit'",
                         model.quantization != "none" or config.optimizer.name == "adamw_8bit",
                         "pip install 'megatron_embed[quantization]'"),
        "datasets": ("data.train", any(map(_needs_datasets, paths)),
                     "pip install datasets"),
        "pyarrow": ("data.train", any(path.endswith(".zst") for path in paths), "pip install pyarrow"),
        "tensorboard": ("logging.tensorboard = True", config.logging.tensorboard, "pip install tensorboard"),
        "pytrec_eval": ("evaluation", bool(config.evaluation.retrieval or config.evaluation.reranking),
                        "pip install pytrec-eval-terrier"),
        "scipy": ("evaluation.sts", bool(config.evaluation.sts), "pip install scipy"),
        "sentence_transformers": ("checkpoint.export_at_end", config.checkpoint.export_at_end is not None,
                                  "pip install sentence-transformers"),
        **{package: ("checkpoint.export_formats", True, "pip install 'megatron_embed[export]'")
           for kind in config.checkpoint.export_formats for package in EXPORT_PACKAGES[kind.partition("-")[0]]},
    }
    for package, (key, is_needed, remedy) in needed.items():
        if is_needed and importlib.util.find_spec(package) is None:
            yield Check(name=package, value="not installed", remedy=f"{key} needs the package {package}: {remedy}")
