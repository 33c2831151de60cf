"""The files of a model directory that hold its tokenizer's vocabulary. Light to import: a run's preflight needs it."""

from pathlib import Path

# Transformers builds an empty vocabulary, without a word, for a directory that has only a config.json.
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "sentencepiece.bpe.model",
                    "spiece.model", "tekken.json", "tiktoken.model")


def has_tokenizer_files(directory: Path) -> bool:
    """Whether a model directory holds a vocabulary; without one Transformers makes an empty tokenizer, silently."""
    return any((directory / name).is_file() for name in VOCABULARY_FILES)
