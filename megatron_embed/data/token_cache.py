"""Token ids that were written before a run (`data tokenize`), found again by a hash of text, prompt and role."""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import tokenizers
import transformers
from numpy.typing import NDArray

from megatron_embed.config.json_file import read_json_file
from megatron_embed.errors import ConfigError
from megatron_embed.names import Role

VERSION = 1
"""Raise it when the files change."""
_SUMMARY, _TOKENS, _TEXTS, _SORTED = "cache.json", "tokens.bin", "texts.bin", ".sorted.bin"
_TEXTS_AT_ONCE = 1 << 20
_DTYPES = ("<u2", "<u4")
"""Types of token ids: the smaller one if the vocabulary's size allows it."""
_TEXT = np.dtype([("key", "<u8"), ("check", "<u8"), ("start", "<u8"), ("length", "<u4"), ("truncated", "<u4")])
"""One text: its hash, where its tokens begin and how many they are, and 1 if it was truncated."""
_KNOWN_TEXTS = 1 << 21
"""Hashes of texts that are remembered while the cache is written, so that a text is mostly tokenized once."""


class Prompted(NamedTuple):
    """A text with its prompt."""

    role: Role
    prompt: str
    """Filled in."""
    text: str


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """What a tokenizer gave for a text."""

    ids: list[int]
    truncated: bool


def text_key(text: Prompted) -> bytes:
    """16 bytes by which the text is known."""
    return hashlib.blake2b(f"{text.role}\0{len(text.prompt)}\0{text.prompt}{text.text}".encode(),
                           digest_size=16).digest()


def tokenizer_digest(tokenizer: Any, rendered: Sequence[str]) -> str:
    """Hash of the rules by which a tokenizer of Transformers makes ids, and of the libraries that follow them.

    Args:
        rendered: texts in its chat template, if that is in use.
    """
    rules: Any = sorted(tokenizer.get_vocab().items()), str(tokenizer.special_tokens_map)
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules |= {"truncation": None, "padding": None}  # those of its latest call
    versions = [transformers.__version__, tokenizers.__version__]
    return hashlib.blake2b(json.dumps([rules, versions, rendered], sort_keys=True).encode(), digest_size=16).hexdigest()


class TokenCache:
    """The token ids of a directory that `TokenCacheWriter` wrote, memory-mapped: 32 bytes for a text, 2 or 4 for a
    token, on the disk.

    Args:
        settings: all that decides the ids, by the name of the setting; equal to those of the cache.
    Raises:
        ConfigError: there is no cache, it is damaged, or it was made with other settings.
    """

    def __init__(self, directory: str, settings: Mapping[str, Any]) -> None:
        key, folder = f"data.token_cache = {directory!r}", Path(directory)
        remedy = "write it with `megatron-embed data tokenize CONFIG`, or remove the key"
        try:
            summary = read_json_file(folder / _SUMMARY)
            made_with, tokens, count = dict(summary["settings"]), summary["tokens"], summary["texts"]
            if summary["dtype"] not in _DTYPES or not type(tokens) is type(count) is int:
                raise ValueError(f"{_SUMMARY}: dtype, tokens or texts")
            dtype = np.dtype(summary["dtype"])
            sizes = {_TOKENS: tokens * dtype.itemsize, _TEXTS: count * _TEXT.itemsize}
            whole = all((folder / name).stat().st_size == size for name, size in sizes.items())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{key}: no token cache can be read there ({error}); {remedy}",
                              key="data.token_cache") from error
        if not whole or summary.get("version") != VERSION:
            raise ConfigError(f"{key}: is damaged, or of another version; {remedy}", key="data.token_cache")
        for name, value in json.loads(json.dumps(settings)).items():
            if made_with.get(name) != value:
                raise ConfigError(f"{key}: was made with another {name} ({_shown(made_with.get(name))}) than the run's "
                                  f"({_shown(value)}); {remedy}", key="data.token_cache")
        self._key, self._tokens = key, _mapped(folder / _TOKENS, dtype)
        self._texts = _mapped(folder / _TEXTS, _TEXT)
        self._keys = self._texts["key"]

    def __len__(self) -> int:
        return len(self._texts)

    def find(self, texts: Sequence[Prompted]) -> list[TokenizedText | None]:
        """The cached tokens of each text; None: it is not in the cache."""
        hashes = np.frombuffer(b"".join(map(text_key, texts)), dtype="<u8").reshape(-1, 2)
        positions = np.searchsorted(self._keys, hashes[:, 0])
        found: list[TokenizedText | None] = []
        for position, (key, check) in zip(positions.tolist(), hashes.tolist(), strict=True):
            entry = self._texts[position].tolist() if position < len(self._texts) else None
            if entry is None or entry[:2] != (key, check):
                found.append(None)
                continue
            start, length, truncated = entry[2:]
            if start + length > len(self._tokens):
                raise ConfigError(f"{self._key}: is damaged; write it with `megatron-embed data tokenize CONFIG`",
                                  key="data.token_cache")
            found.append(TokenizedText(self._tokens[start:start + length].tolist(), bool(truncated)))
        return found


class TokenCacheWriter:
    """Writes a cache beside its final place, and moves it there once it is whole.

    Args:
        directory: that of the cache; one that is there is replaced.
        largest: the largest token id.
    Raises:
        ConfigError: the directory cannot be written, or holds something else.
    """

    def __init__(self, directory: str, settings: Mapping[str, Any], largest: int) -> None:
        self._final = Path(os.path.realpath(directory))
        self._settings = settings
        self._dtype = np.dtype(_DTYPES[0] if largest < 1 << 16 else _DTYPES[1])
        self._known: set[bytes] = set()
        self._count = self.num_tokens = 0
        with self._explained():
            is_replaced = not self._final.exists() or (self._final / _SUMMARY).is_file() or (
                self._final.is_dir() and not any(self._final.iterdir()))
        if not is_replaced:
            raise ConfigError(f"data.token_cache = {directory!r}: exists and is not a token cache; choose another name",
                              key="data.token_cache")
        self._unfinished = self._final.with_name(f".{self._final.name}.unfinished")
        with self._explained():
            shutil.rmtree(self._unfinished, ignore_errors=True)
            self._unfinished.mkdir(parents=True)
            self._tokens: BinaryIO = (self._unfinished / _TOKENS).open("wb")
            self._texts: BinaryIO = (self._unfinished / _TEXTS).open("w+b")

    def new(self, texts: Iterable[Prompted]) -> list[Prompted]:
        """Those of the texts that are not known to be in the cache, each once."""
        by_key = {text_key(text): text for text in texts}
        if len(self._known) > _KNOWN_TEXTS:
            self._known.clear()
        return [text for key, text in by_key.items() if key not in self._known]

    def add(self, texts: Sequence[Prompted], tokenized: Sequence[TokenizedText]) -> None:
        """Append what the tokenizer gave for these texts."""
        keys = [text_key(text) for text in texts]
        self._known.update(keys)
        entries = np.zeros(len(texts), dtype=_TEXT)
        hashes = np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2)
        entries["key"], entries["check"] = hashes[:, 0], hashes[:, 1]
        entries["length"] = [len(text.ids) for text in tokenized]
        entries["truncated"] = [text.truncated for text in tokenized]
        ends = np.cumsum(entries["length"], dtype=np.uint64) + np.uint64(self.num_tokens)
        entries["start"] = ends - entries["length"]
        ids = np.fromiter((token for text in tokenized for token in text.ids), dtype=self._dtype)
        with self._explained():
            self._tokens.write(ids.tobytes())
            self._texts.write(entries.tobytes())
        self._count += len(texts)
        self.num_tokens += len(ids)

    def finish(self) -> int:
        """Sort the texts and move the cache to its place. Returns the number of different texts."""
        with self._explained():
            self._tokens.close()
            self._texts.close()
            texts = _mapped(self._unfinished / _TEXTS, _TEXT)
            keys = np.array(texts["key"])
            order = np.argsort(keys, kind="stable")
            keys = keys[order]
            order = order[np.concatenate([[True], keys[1:] != keys[:-1]])[:len(order)]]
            del keys
            with (self._unfinished / _SORTED).open("wb") as file:
                for start in range(0, len(order), _TEXTS_AT_ONCE):
                    file.write(texts[order[start:start + _TEXTS_AT_ONCE]].tobytes())
            (self._unfinished / _SORTED).replace(self._unfinished / _TEXTS)
            (self._unfinished / _SUMMARY).write_text(json.dumps({
                "version": VERSION, "texts": len(order), "tokens": self.num_tokens, "dtype": self._dtype.str,
                "settings": self._settings, "written": time.strftime("%Y-%m-%d %H:%M:%S")}), encoding="utf-8")
            shutil.rmtree(self._final, ignore_errors=True)
            self._unfinished.rename(self._final)
        return len(order)

    def __enter__(self) -> "TokenCacheWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._tokens.close()
        self._texts.close()
        shutil.rmtree(self._unfinished, ignore_errors=True)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"data.token_cache = {str(self._final)!r}: cannot be written "
                              f"({error.strerror or error}); free space there, or choose another directory",
                              key="data.token_cache") from error


def _mapped(file: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.zeros(0, dtype=dtype)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
