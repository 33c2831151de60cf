"""The files of a model directory that hold its tokenizer's vocabulary. Light to import: a run's preflight needs it."""

from pathlib import Path

from megatron_embed.names import VOCABULARY_FILES


def has_tokenizer_files(directory: Path) -> bool:
    """Whether a model directory holds a vocabulary; without one Transformers makes an empty tokenizer, silently."""
    return any((directory / name).is_file() for name in VOCABULARY_FILES)
