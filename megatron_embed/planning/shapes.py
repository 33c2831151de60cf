"""Shapes of models by hub name, so that planning needs neither hub nor weights."""

from pathlib import Path

from megatron_embed.errors import ConfigError
from megatron_embed.models.families import ModelShape, model_shape

FOLDER = Path(__file__).with_name("shapes")
"""One config.json per model of configs/, as released; keys that say nothing of the shape are left out."""


def known_models() -> list[str]:
    """Hub names whose shapes ship with the package."""
    return sorted(file.parent.relative_to(FOLDER).as_posix() for file in FOLDER.glob("*/*/config.json"))


def find_shape(path: str) -> ModelShape | None:
    """The shape of a local directory (a checkpoint's too), or of a hub name that ships; null if it is neither.

    Raises:
        CheckpointError: a family that is not supported.
    """
    for folder in (Path(path).expanduser(), Path(path).expanduser() / "hf", FOLDER / path):
        if path and (folder / "config.json").is_file():
            return model_shape(folder)
    return None


def shape_of(path: str) -> ModelShape:
    """As `find_shape`.

    Raises:
        ConfigError: there is none.
    """
    shape = find_shape(path)
    if shape is None:
        raise ConfigError(f"model.path = {path!r}: no directory with a config.json, and no model whose shape ships "
                          f"with this package; give a directory or one of {', '.join(known_models())}")
    return shape
