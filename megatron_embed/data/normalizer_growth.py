"""How long a tokenizer's normalizer may make a text: each replacement multiplies what the one before it has made."""

import base64
import json
from pathlib import Path
from typing import Any

from megatron_embed.config.json_file import LARGEST_TOKENIZER, json_value, read_bytes
from megatron_embed.errors import CheckpointError

MOST_GROWTH = 10_000
"""Characters that a character may become; Unicode's own normalization makes at most 18 of one."""
_GROWING = (b"Replace", b"Prepend", b"Precompiled", b"\\u00")
"""Words of steps that may lengthen a text; the last one could hide any of them."""


def refuse_growth_in_file(directory: Path) -> None:
    """Raises CheckpointError if the normalizer of a tokenizer.json makes texts far too long; a file that cannot be
    read is left to the tokenizer's own reader."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        return
    try:
        raw = read_bytes(file, LARGEST_TOKENIZER)
        values = json_value(raw) if any(word in raw for word in _GROWING) else {}
    except (OSError, ValueError):
        return
    if isinstance(values, dict):
        refuse_growth(values.get("normalizer"), str(directory))


def refuse_growth_of(tokenizer: Any, directory: str) -> None:
    """The same of a loaded tokenizer of Transformers."""
    normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
    if normalizer is not None:
        refuse_growth(json.loads(normalizer.__getstate__()), directory)


def refuse_growth(normalizer: object, directory: str) -> None:
    """Raises CheckpointError for a normalizer, as tokenizer.json describes it, that makes texts far too long."""
    grown = _grown(normalizer, 1)
    if grown > MOST_GROWTH:
        raise CheckpointError(f"{directory}: tokenizer.json: its normalizer may make {grown:,.0f} characters of one, "
                              f"more than {MOST_GROWTH:,}; take the tokenizer from a source that you trust")


def _grown(step: object, length: float) -> float:
    """The longest text that a step may make of one of so many characters."""
    if not isinstance(step, dict):
        return length
    for inner in step["normalizers"] if isinstance(step.get("normalizers"), list) else ():
        length = _grown(inner, length)
    content = step.get("content", step.get("prepend"))
    added = len(content) if isinstance(content, str) else 0
    if step.get("type") == "Prepend":
        return length + added
    if step.get("type") == "Replace":
        pattern = step.get("pattern")
        plain = pattern.get("String") if isinstance(pattern, dict) else None
        # A regular expression may match between any two characters.
        return length * max(1, added / len(plain)) if isinstance(plain, str) and plain else (length + 1) * (added + 1)
    return length * _longest_precompiled(step.get("precompiled_charsmap"))


def _longest_precompiled(text: object) -> int:
    """Characters of the longest replacement in a map of SentencePiece: the size of a trie, the trie, and texts that
    end in zeros."""
    if not isinstance(text, str):
        return 1
    try:
        raw = base64.b64decode(text)
    except ValueError:
        return 1  # the tokenizer's own reader refuses it
    texts = raw[4 + int.from_bytes(raw[:4], "little"):]
    return max(1, *map(len, texts.split(b"\0")))
