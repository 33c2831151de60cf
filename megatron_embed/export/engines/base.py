"""What an engine that serves exports offers: its files, and its vectors and scores for the comparison."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_embed.errors import ConfigError
from megatron_embed.export.verify import library_errors
from megatron_embed.names import Role

BATCH_SIZE = 8
"""Texts that are compared at once: of several lengths, so that padding is part of the comparison."""


@dataclass(frozen=True, kw_only=True)
class PairScores:
    """An engine's scores of pairs, [pairs] float32."""

    raw: Tensor
    """Before the activation."""
    final: Tensor | None
    """As the engine returns them to a user; None: it applies no activation of the directory's."""
    rounding: Tensor | None = None
    """By how much `raw` may be off because it was computed from `final` in float32, infinite where that is 1; None: it
    was not."""


class Engine(ABC):
    """An engine by its name in messages; reads a directory that `export/` has written or another one of its layout."""

    name: str

    def check_installed(self) -> None:  # noqa: B027  # the stock libraries are
        """Raises ConfigError, saying how to get it, if the engine is not there."""

    @abstractmethod
    def vectors(self, directory: Path, texts: Sequence[str], role: Role | None) -> Tensor:
        """[texts, dim] float32 of texts with the directory's prompt of `role`. Raises CheckpointError if it cannot."""

    @abstractmethod
    def scores(self, directory: Path, pairs: Sequence[tuple[str, str]]) -> PairScores:
        """Scores of (query, document). Raises CheckpointError if it cannot."""

    def close(self) -> None:  # noqa: B027  # most engines hold nothing
        """End what the engine holds, such as a process."""


def require(package: str, needed_for: str, extra: str = "export") -> Any:
    """The imported package. Raises ConfigError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(f"{needed_for} needs the package {package.partition('.')[0]} ({error}); "
                          f"pip install 'megatron_embed[{extra}]'") from error


def stock_features(directory: Path, texts: Sequence[str], role: Role | None) -> Iterator[dict[str, Tensor]]:
    """Padded batches of token ids and masks, [texts, tokens] int64, as Sentence Transformers makes them."""
    from sentence_transformers import SentenceTransformer

    with library_errors(directory, "Sentence Transformers"):
        model = SentenceTransformer(str(directory), device="cpu", local_files_only=True)
        prompt = "" if role is None else (model.prompts or {}).get(role) or ""
        for start in range(0, len(texts), BATCH_SIZE):
            yield _tensors(model.preprocess(list(texts[start : start + BATCH_SIZE]), prompt=prompt or None))


def stock_pair_features(directory: Path, pairs: Sequence[tuple[str, str]]) -> Iterator[dict[str, Tensor]]:
    """The same of pairs, as CrossEncoder makes them."""
    from sentence_transformers import CrossEncoder

    with library_errors(directory, "Sentence Transformers"):
        model = CrossEncoder(str(directory), device="cpu", local_files_only=True)
        prompt = (model.prompts or {}).get(model.default_prompt_name or "")
        for start in range(0, len(pairs), BATCH_SIZE):
            yield _tensors(model.preprocess(list(pairs[start : start + BATCH_SIZE]), prompt=prompt or None))


def _tensors(features: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in features.items() if isinstance(value, torch.Tensor) and value.dim() == 2}
