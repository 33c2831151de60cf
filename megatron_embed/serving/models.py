"""The models of a server: texts in, vectors or scores out, by way of the queue that all models share."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as functional

from megatron_embed.data.pair_tokenizer import Pair, PairTokenizer
from megatron_embed.data.tokenizer import RoleTokenizer
from megatron_embed.errors import EmptyTextError
from megatron_embed.names import Activation, Role, Similarity
from megatron_embed.serving.batching import Batcher, Engine, Tokens
from megatron_embed.serving.errors import RequestError

Kind = Literal["embedding", "reranker"]
KIND_NAMES: dict[Kind, str] = {"embedding": "embedding model", "reranker": "reranker"}
TOKENIZER_THREADS = 2


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server accepts."""

    max_texts: int = 2048
    """Texts of a request."""
    max_bytes: int = 32 << 20
    """Bytes of a request's body."""
    max_waiting_texts: int = 16384
    """Texts accepted and not yet answered; a request beyond them is answered 429."""
    timeout_seconds: float = 300
    """For a request to be computed, and for its body to arrive."""
    batch_tokens: int = 8192
    """Largest token budget of a batch."""


class Prepared(NamedTuple):
    """A request's texts or pairs, ready for an engine."""

    items: Sequence[Any]
    costs: list[int]
    """Tokens of each."""


class Queue:
    """Admission of requests, threads that tokenize, and the batcher."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting_texts = 0
        self.batcher = Batcher(limits.batch_tokens)
        self._tokenizing = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenize")

    async def compute(self, engine: Engine, count: int,
                      prepare: Callable[[], Prepared]) -> tuple[np.ndarray, Prepared]:
        """[count, dim] float32, and what `prepare` gave, which is called in another thread.

        Raises:
            RequestError: too many texts, here (413) or waiting (429); not computed in time (504); the model failed.
            UserError: from `prepare`, a text that cannot be computed.
        """
        with self._admit(count):
            try:
                async with asyncio.timeout(self.limits.timeout_seconds):
                    prepared = await asyncio.get_running_loop().run_in_executor(self._tokenizing, prepare)
                    future = self.batcher.submit(engine, prepared.items, prepared.costs)
                    rows = await asyncio.wrap_future(future)
            except TimeoutError:
                raise RequestError(504, f"not computed within {self.limits.timeout_seconds:g} s; send fewer texts in a "
                                   "request, or start the server with a larger --timeout", code="timeout") from None
        if not np.isfinite(rows).all():
            raise RequestError(500, "the model gave a value that is not finite", code="model_failed")
        return rows, prepared

    @contextlib.contextmanager
    def _admit(self, count: int) -> Iterator[None]:
        if count > self.limits.max_texts:
            raise RequestError(413, f"{count} texts in one request; at most {self.limits.max_texts} are accepted: "
                               "divide them among several, or start the server with a larger --max-texts",
                               code="too_many_texts")
        if self.waiting_texts and self.waiting_texts + count > self.limits.max_waiting_texts:
            raise RequestError(429, f"{self.waiting_texts} texts are waiting already, of at most "
                               f"{self.limits.max_waiting_texts}; send the request again later", code="overloaded",
                               retry_after=1)
        self.waiting_texts += count
        try:
            yield
        finally:
            self.waiting_texts -= count


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Vectors of a request's texts."""

    vectors: np.ndarray
    """[texts, dim] float32."""
    tokens: list[int]
    """Tokens of each text, after truncation, prompt and special tokens included."""


class ServedEmbedder:
    """An embedding model."""

    kind: Kind = "embedding"

    def __init__(self, name: str, directory: Path, engine: Engine, tokenizer: RoleTokenizer, *, dim: int,
                 similarity: Similarity, normalize: bool, raw_vectors: bool) -> None:
        """
        Args:
            name: in requests and /v1/models.
            similarity: the directory's similarity function.
            normalize: whether the directory asks for unit vectors.
            raw_vectors: whether the engine gives vectors before normalization; else they are as the directory asks.
        """
        self.name, self.directory, self.dim, self.normalize = name, directory, dim, normalize
        self.similarity = similarity
        self.max_length = max(tokenizer.max_length("query"), tokenizer.max_length("document"))
        self._engine, self._tokenizer, self._raw_vectors = engine, tokenizer, raw_vectors

    async def encode(self, queue: Queue, texts: Sequence[str], role: Role = "document", *,
                     dimensions: int | None = None, normalize: bool | None = None,
                     truncate: bool = True) -> Embeddings:
        """The vectors of `megatron_embed.load(directory).encode(texts, role)`.

        Args:
            dimensions: components that vectors are cut to (matryoshka); unit vectors get unit length again.
            normalize: unit vectors; None: as the directory says.
            truncate: whether texts may lose tokens beyond the maximum length; else such a text is refused.
        Raises:
            RequestError: see `Queue.compute`; or a request that this model cannot answer (422).
            UserError: a text without tokens, or one that the tokenizer refuses.
        """
        if dimensions is not None and dimensions > self.dim:
            raise RequestError(422, f"dimensions = {dimensions}: the vectors of {self.name} have {self.dim}",
                               code="invalid_dimensions")
        if normalize is False and self.normalize and not self._raw_vectors:
            raise RequestError(422, "normalize = false: the graph of this engine normalizes inside; start the server "
                               "with --engine torch", code="not_supported")

        def prepare() -> Prepared:
            rows = self._tokenizer.tokenize(texts, role).token_ids
            if [] in rows:
                row = rows.index([])
                raise EmptyTextError(row, f"text number {row + 1}", texts[row])
            if not truncate:
                self._refuse_long(texts, role, rows)
            return Prepared([Tokens(ids, None) for ids in rows], [len(ids) for ids in rows])

        vectors, prepared = await queue.compute(self._engine, len(texts), prepare)
        unit = self.normalize if normalize is None else normalize
        if dimensions is not None:
            vectors = vectors[:, :dimensions]
        if unit and (self._raw_vectors or not self.normalize or dimensions is not None):
            vectors = functional.normalize(torch.from_numpy(vectors), dim=-1).numpy()
        return Embeddings(vectors=vectors, tokens=prepared.costs)

    def count_tokens(self, text: str, role: Role) -> tuple[int, int]:
        """Tokens of a text before truncation, and how many are read; prompt and special tokens included."""
        return self._tokenizer.count_tokens([text], role)[0], self._tokenizer.max_length(role)

    def _refuse_long(self, texts: Sequence[str], role: Role, rows: Sequence[Sequence[int]]) -> None:
        limit = self._tokenizer.max_length(role)
        full = [row for row, ids in enumerate(rows) if len(ids) >= limit]
        for row, tokens in zip(full, self._tokenizer.count_tokens([texts[row] for row in full], role), strict=True):
            if tokens > limit:
                raise RequestError(413, f"text number {row + 1} has {tokens} tokens; at most {limit} are read: send "
                                   "a shorter one, or send truncate = true", code="text_too_long")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of a query's documents."""

    scores: np.ndarray
    """[documents] float32, after the activation."""
    raw: np.ndarray
    """[documents] float32, before it; ranking uses these."""
    tokens: list[int]
    """Tokens of each pair, after truncation."""

    def ranking(self) -> list[int]:
        """Positions of the documents, the most relevant first."""
        order: list[int] = np.argsort(-self.raw, kind="stable").tolist()
        return order


class ServedReranker:
    """A reranker."""

    kind: Kind = "reranker"

    def __init__(self, name: str, directory: Path, engine: Engine, tokenizer: PairTokenizer, *,
                 activation: Activation) -> None:
        self.name, self.directory, self.activation = name, directory, activation
        self.max_length = tokenizer.max_length
        self._engine, self._tokenizer = engine, tokenizer

    async def rerank(self, queue: Queue, query: str, documents: Sequence[str], *, instruction: str | None = None,
                     truncate: bool = True) -> Scores:
        """The scores of `megatron_embed.load(directory).rerank(query, documents)`.

        Args:
            instruction: in place of the directory's own.
            truncate: whether pairs may lose tokens beyond the maximum length; else such a pair is refused.
        Raises:
            RequestError: see `Queue.compute`.
            UserError: a query that leaves no room for its document.
        """
        pairs = [Pair(query=query, document=document, instruction=instruction) for document in documents]

        def prepare() -> Prepared:
            self._tokenizer.check_query_length(pairs)
            rows = self._tokenizer.tokenize(pairs)
            if not truncate and rows.num_truncated:
                raise RequestError(413, f"{rows.num_truncated} of {len(pairs)} pairs have more than {self.max_length} "
                                   "tokens: send shorter ones, or send truncate = true", code="text_too_long")
            types = rows.token_types
            return Prepared([Tokens(ids, None if types is None else types[row])
                             for row, ids in enumerate(rows.token_ids)], [len(ids) for ids in rows.token_ids])

        rows, prepared = await queue.compute(self._engine, len(pairs), prepare)
        raw = rows[:, 0]
        scores = torch.from_numpy(raw).sigmoid().numpy() if self.activation == "sigmoid" else raw
        return Scores(scores=scores, raw=raw, tokens=prepared.costs)


Model = TypeVar("Model", ServedEmbedder, ServedReranker)


class ServedModels:
    """The registry of a server's models, and the queue that they share."""

    def __init__(self, models: Sequence[ServedEmbedder | ServedReranker], limits: Limits) -> None:
        self.limits = limits
        self.queue = Queue(limits)
        self.embedders = [model for model in models if isinstance(model, ServedEmbedder)]
        self.rerankers = [model for model in models if isinstance(model, ServedReranker)]

    @property
    def all(self) -> list[ServedEmbedder | ServedReranker]:
        return [*self.embedders, *self.rerankers]

    def embedder(self, name: str | None) -> ServedEmbedder:
        """The embedding model of that name: any name while there is one, None for the first. Raises RequestError
        (404)."""
        return self._choose(self.embedders, name, "embedding")

    def reranker(self, name: str | None) -> ServedReranker:
        """The same of rerankers."""
        return self._choose(self.rerankers, name, "reranker")

    def _choose(self, models: Sequence[Model], name: str | None, kind: Kind) -> Model:
        for model in models:
            if len(models) == 1 or name in (None, model.name):
                return model
        served = ", ".join(f"{model.name} ({KIND_NAMES[model.kind]})" for model in self.all)
        asked = f"no {KIND_NAMES[kind]} is served here" if not models else f"model = {name!r} is not served here"
        raise RequestError(404, f"{asked}; served: {served}", code="model_not_found")
