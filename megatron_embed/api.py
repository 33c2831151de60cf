"""What `megatron_embed.load` gives: the models of the command line, from Python."""

import argparse
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from megatron_embed.config.load import config_of_values, load_config, to_dict
from megatron_embed.config.schema import RunConfig
from megatron_embed.data.jsonl import shortened
from megatron_embed.data.pair_tokenizer import Pair
from megatron_embed.errors import ConfigError
from megatron_embed.evaluation.encode import TextEncoder
from megatron_embed.evaluation.score import PairScorer
from megatron_embed.evaluation.sparse_vectors import sparse_vectors
from megatron_embed.loading.model_directory import ModelDirectory, find_model, open_encoder
from megatron_embed.loading.reranker import is_reranker, open_scorer
from megatron_embed.models.encoder import DTYPES
from megatron_embed.names import POOLINGS, Role, Similarity
from megatron_embed.platform.launcher import process_rank
from megatron_embed.platform.terminal_text import setup_logging
from megatron_embed.run.environment import set_environment
from megatron_embed.training.metrics import OnStep


class Embedder:
    """Texts to vectors. Under several ranks every method is called by all of them together."""

    def __init__(self, encoder: TextEncoder, model: ModelDirectory) -> None:
        self._encoder, self._model = encoder, model

    def __repr__(self) -> str:
        encoder = self._encoder
        return (f"Embedder({str(self._model.peft or self._model.path)!r}, family={self._model.shape.family!r}, "
                f"dim={self.dim}, pooling={encoder.pooling!r}, similarity={self.similarity!r})")

    @property
    def dim(self) -> int:
        """Numbers of a vector."""
        return self._encoder.dim

    @property
    def similarity(self) -> Similarity | Literal["maxsim"]:
        """The similarity function that the directory names."""
        return self._model.saved.similarity if self._model.saved.vectors is None else "maxsim"

    def encode(self, texts: str | Sequence[str], role: Role = "document", *,
               show_progress: bool = False) -> Any:
        """float32 vectors, [texts, dim] in the order of the texts, or [dim] of a single one; of a multi-vector model
        a list with [vectors, dim] of each text, or that of a single one; of a sparse model a matrix of scipy in
        compressed rows, [texts, vocabulary], of one row for a single text. Which it is depends on the directory, so
        type checkers are told nothing.

        Args:
            texts: any number, or one string.
            role: whose prompt and maximum length the directory's files give: "query" or "document".
            show_progress: a bar, if stderr is a terminal.
        Raises:
            ConfigError: another role, or an item that is not a string.
            EmptyTextError: a text without tokens.
            UserError: a vector that is not finite.
        """
        if role not in ("query", "document"):
            raise ConfigError(f"role = {role!r}: must be 'query' or 'document'")
        one = isinstance(texts, str)
        given = checked_texts([texts] if isinstance(texts, str) else texts, "texts")
        if self._model.saved.vectors is not None:
            several = self._encoder.vectors(given, role, show_progress=show_progress)
            rows = [row.numpy() for row in several.vectors.split(several.counts.tolist())]
            return rows[0] if one else rows
        if self._model.saved.sparse:
            return sparse_vectors(self._encoder, given, role, show_progress=show_progress)
        vectors: np.ndarray = self._encoder.encode(given, role, show_progress=show_progress).numpy()
        return vectors[0] if one else vectors

    def rerank(self, query: str, documents: Sequence[str] | None = None, *,
               passages: Sequence[str] | None = None) -> np.ndarray:
        """Raises ConfigError: an embedding model scores no pairs."""
        raise ConfigError(f"{self._model.path}: an embedding model, which gives vectors and no scores of pairs; load a "
                          "reranker to rerank, or compare encode(query, 'query') with encode(documents)")


class Reranker:
    """Scores of query and document. Under several ranks every method is called by all of them together."""

    def __init__(self, scorer: PairScorer, model: ModelDirectory) -> None:
        self._scorer, self._model = scorer, model

    def __repr__(self) -> str:
        return (f"Reranker({str(self._model.peft or self._model.path)!r}, family={self._model.shape.family!r}, "
                f"max_length={self._scorer.tokenizer.max_length})")

    def rerank(self, query: str, documents: Sequence[str] | None = None, *, passages: Sequence[str] | None = None,
               instruction: str | None = None, show_progress: bool = False) -> np.ndarray:
        """float32 scores, [documents] in the order of the documents; larger is more relevant.

        Args:
            query: one query.
            documents: any number of them.
            passages: other name of `documents`, as in other libraries; give one of the two.
            instruction: in place of the directory's own.
            show_progress: a bar, if stderr is a terminal.
        Raises:
            ConfigError: an item that is not a string, one text in place of the documents, or none or both of
                `documents` and `passages`.
            DataError: a query that leaves no room for its document.
            UserError: a score that is not finite.
        """
        if documents is None or passages is not None:
            if (documents is None) == (passages is None):
                raise ConfigError("rerank: give the texts to score as documents (or, by its other name, passages)")
            documents = passages
        assert documents is not None
        if isinstance(documents, str):
            raise ConfigError(f"documents = {shortened(documents)}: one text, where a list of them is expected; write "
                              "[text]")
        checked_texts([query], "query")
        pairs = [Pair(query=query, document=document, instruction=instruction)
                 for document in checked_texts(documents, "documents")]
        return self._scorer.score(pairs, show_progress=show_progress).numpy()

    def encode(self, texts: str | Sequence[str], role: Role = "document") -> np.ndarray:
        """Raises ConfigError: a reranker has no vectors."""
        raise ConfigError(f"{self._model.path}: a reranker, which scores pairs and gives no vectors; use rerank(query, "
                          "documents), or load an embedding model")


def checked_texts(texts: Iterable[str], name: str) -> list[str]:
    """The texts. Raises ConfigError for an item that is not a string or has an unpaired surrogate."""
    checked = list(texts)
    for index, text in enumerate(checked):
        if not isinstance(text, str):
            raise ConfigError(f"{name}[{index}] = {shortened(text)} is a {type(text).__name__}; it must be a string")
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ConfigError(f"{name}[{index}] = {shortened(text)}: contains an unpaired surrogate at character "
                                  f"{error.start + 1}; give the whole character") from None
    return checked


def open_any(directory: str, *, pooling: str | None, max_length: int | None, dtype: str | None,
             normalize: bool) -> Embedder | Reranker:
    """See `megatron_embed.load`."""
    if pooling is not None and pooling not in POOLINGS:
        raise ConfigError(f"pooling = {pooling!r}: must be one of {', '.join(POOLINGS)}")
    if dtype is not None and dtype not in ("auto", *DTYPES):
        raise ConfigError(f"dtype = {dtype!r}: must be one of auto, {', '.join(DTYPES)}")
    if max_length is not None and max_length < 1:
        raise ConfigError(f"max_length = {max_length}: must be at least 1")
    args = argparse.Namespace(model=directory, pooling=pooling, max_length=max_length, dtype=dtype,
                              no_normalize=not normalize, overrides=[])
    if is_reranker(find_model(directory, "--model")):
        if pooling is not None or not normalize:
            raise ConfigError(f"{directory}: a reranker, which has no use for pooling or normalize; leave them out")
        scorer, model, _ = open_scorer(directory, max_length=max_length, dtype=dtype)
        return Reranker(scorer, model)
    encoder, model, _ = open_encoder(args, prompts=True, multi_vector=True)
    return Embedder(encoder, model)


def train_run(config: "str | os.PathLike[str] | Mapping[str, Any] | RunConfig", overrides: Sequence[str], *,
              on_step: OnStep | None) -> dict[str, float]:
    """See `megatron_embed.train`."""
    rank = process_rank()
    if not logging.getLogger().handlers:
        setup_logging(rank)
    if isinstance(config, RunConfig):
        settings = config_of_values(to_dict(config), overrides) if overrides else config
    elif isinstance(config, Mapping):
        settings = config_of_values(config, overrides)
    else:
        settings = load_config(os.fspath(config), list(overrides))
    set_environment(settings)
    from megatron_embed.run.assemble import run_training

    return run_training(settings, on_step)
