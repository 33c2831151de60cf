"""Shapes of models by hub name, so that planning needs neither hub nor weights."""

import functools
import os
from pathlib import Path

from megatron_embed.checkpoint.files import INFO_FILE, latest_checkpoint
from megatron_embed.config.json_file import read_json_file
from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.models.dense_settings import DenseSettings
from megatron_embed.models.families import ModelShape, model_shape
from megatron_embed.models.joint_files import JointHeads, find_joint_heads
from megatron_embed.models.modules_json import transformer_folder
from megatron_embed.models.quantization import StoredQuantization, stored_quantization
from megatron_embed.models.saved_settings import read_saved_settings
from megatron_embed.names import ModelPooling

FOLDER = Path(__file__).with_name("shapes")
"""One config.json per model of configs/, as released, with only the keys of the shape."""


def known_models() -> list[str]:
    """Hub names whose shapes ship with the package."""
    return sorted(file.parent.relative_to(FOLDER).as_posix() for file in FOLDER.glob("*/*/config.json"))


ADAPTER_FILE = "adapter_config.json"
"""Settings file of a PEFT directory."""


def checkpoint_at(path: str) -> Path | None:
    """The checkpoint at `path`, or the newest one of the run whose directory it is; None if there is none."""
    folder = Path(path).expanduser()
    return folder if (folder / INFO_FILE).is_file() else latest_checkpoint(folder)


def model_files(path: str) -> Path | None:
    """The directory with config.json and tokenizer of the model that training reads from `path`; None if there is none.

    `path` is a Hugging Face directory, a checkpoint, a run's directory (its newest checkpoint), a PEFT directory (its
    base model), or a hub name in the hub's cache on this machine. No library is loaded, nothing is fetched.

    Raises:
        CheckpointError: a PEFT directory that names no base model, or one with adapters of its own.
    """
    folder = Path(path).expanduser()
    if not path or not folder.is_dir():
        return _cached(path)
    checkpoint = checkpoint_at(path)
    if checkpoint is not None:
        folder = checkpoint / "hf"
    elif (folder / ADAPTER_FILE).is_file():
        base = base_model(folder)
        if (Path(base).expanduser() / ADAPTER_FILE).is_file():
            raise CheckpointError(f"{folder / ADAPTER_FILE}: base_model_name_or_path = {base!r} has adapters itself; "
                                  "merge them first (PEFT's merge_and_unload)")
        return model_files(base)
    elif (folder / "hf" / "config.json").is_file():
        folder = folder / "hf"
    folder = transformer_folder(folder)
    return folder if (folder / "config.json").is_file() else None


def stored_quantization_of(path: str) -> StoredQuantization | None:
    """The quantization of the weights that training reads from `path`; None: not quantized, or not here."""
    folder = model_files(path)
    return None if folder is None else stored_quantization(folder)


def has_adapters(path: str) -> bool:
    """Whether the model at `path` has adapters: a PEFT directory, or a checkpoint of a run that trained some."""
    checkpoint = checkpoint_at(path)
    if checkpoint is None:
        return (Path(path).expanduser() / ADAPTER_FILE).is_file()
    try:
        return bool(read_json_file(checkpoint / INFO_FILE).get("lora"))
    except (OSError, ValueError, AttributeError):
        return False


def base_model(folder: Path) -> str:
    """The base model that a PEFT directory names. Raises CheckpointError if it names none."""
    file = folder / ADAPTER_FILE
    try:
        base = read_json_file(file)["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{file}: base_model_name_or_path must name the directory of the model that the adapter "
                              "belongs to; write it there")
    return base


def hub_cache() -> Path:
    """Cache directory of the hub's client."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _cached(name: str) -> Path | None:
    """The files of a hub model in the cache."""
    folder = hub_cache() / f"models--{name.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    snapshot = folder / "snapshots" / revision
    return snapshot if (snapshot / "config.json").is_file() else None


@functools.cache
def joint_heads_at_hand(path: str) -> JointHeads | None:
    """The joint heads of the model's directory; None if it has none, or is not here."""
    files = model_files(path)
    return None if files is None else find_joint_heads(files)


@functools.cache
def modules_at_hand(path: str) -> tuple[tuple[DenseSettings, ...], ModelPooling | None]:
    """The Dense modules and the pooling that the directory of the model says; neither if it is not here.

    Raises:
        CheckpointError: see `model_files` and `read_saved_settings`.
    """
    files, folder = model_files(path), Path(path).expanduser()
    if files is None:
        return (), None
    saved = read_saved_settings(folder if (folder / "modules.json").is_file() else files, files)
    return saved.dense, "tokens" if saved.vectors is not None else "splade" if saved.sparse else saved.pooling


def find_shape(path: str) -> ModelShape | None:
    """The shape of the model that training reads from `path` (see `model_files`), or of a hub name that ships, or that
    an adapter here names as its base; None if it is neither.

    Raises:
        CheckpointError: a family that is not supported, or a PEFT directory that cannot be used.
    """
    folder = model_files(path)
    name, local = path, Path(path).expanduser()
    if folder is None and path and (local / ADAPTER_FILE).is_file():
        name = base_model(local)
    for directory in (folder, FOLDER / name):
        if directory is not None and name and (directory / "config.json").is_file():
            return model_shape(directory)
    return None


def shape_of(path: str) -> ModelShape:
    """The shape that `find_shape` finds.

    Raises:
        ConfigError: there is none.
    """
    shape = find_shape(path)
    if shape is None:
        raise ConfigError(f"model.path = {path!r}: not a directory with a model (Hugging Face, PEFT, a checkpoint or "
                          "a run), and not a model whose shape comes with this package; give a directory or one of "
                          f"{', '.join(known_models())}", key="model.path")
    return shape
