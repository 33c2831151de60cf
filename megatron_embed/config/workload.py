"""What each task asks of a run's sizes, as far as the settings tell: `RunConfig.workload`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from megatron_embed.config.schema import RunConfig


@dataclass(frozen=True)
class Workload(ABC):
    """Texts and documents of a query, by the settings of a run."""

    config: "RunConfig"

    has_head: ClassVar[bool]
    """Whether the model has a head behind its pooling."""
    inherits_text_settings: ClassVar[bool]
    """Whether prompts and lengths that are null are the model directory's own."""

    @property
    @abstractmethod
    def rows(self) -> Literal["contrastive", "pairs", "rerank"]:
        """Kind of the training rows."""

    @property
    @abstractmethod
    def texts_per_query(self) -> list[tuple[int, int]]:
        """(count, tokens) of the texts that belong to a query, each as long as it may be."""

    @property
    @abstractmethod
    def gathered_documents(self) -> int:
        """Documents of the global batch whose embeddings the ranks exchange."""

    @abstractmethod
    def least_tokens(self, documents: int | None) -> tuple[int, str]:
        """Tokens that a micro-batch must hold, and what they are in words.

        Args:
            documents: the most that a query of the data has; None: as many as the settings allow.
        """

    @property
    def couples_batch(self) -> bool:
        """Whether the loss of a row depends on rows of other micro-batches of the step: that of a sparse model does, by
        its regularizers."""
        return self.config.objective.couples_batch or self.config.embedding.head == "sparse"

    @property
    def tokens_per_query(self) -> int:
        """Tokens of all texts that belong to a query, each as long as it may be."""
        return sum(count * tokens for count, tokens in self.texts_per_query)


class EmbeddingWorkload(Workload):
    """An embedding model: a query and its documents are texts of their own."""

    has_head = False
    inherits_text_settings = True

    @property
    def rows(self) -> Literal["contrastive", "pairs"]:
        return self.config.objective.rows

    @property
    def texts_per_query(self) -> list[tuple[int, int]]:
        data = self.config.data
        return [(1, data.max_length("query")), (self._allowed_documents, data.max_length("document"))]

    @property
    def gathered_documents(self) -> int:
        return self.config.training.global_batch_size * self._allowed_documents

    def least_tokens(self, documents: int | None) -> tuple[int, str]:
        query, document = self.config.data.max_length("query"), self.config.data.max_length("document")
        if self.couples_batch:
            return max(query, document), f"max(query_max_length, document_max_length) = max({query}, {document})"
        count = "(num_positives + num_negatives)" if documents is None else "(documents of a query in data.train)"
        documents = self._allowed_documents if documents is None else documents
        return query + documents * document, (
            f"query_max_length + {count} * document_max_length = {query} + {documents} * {document}")

    @property
    def _allowed_documents(self) -> int:
        return self.config.data.num_positives + self.config.data.num_negatives


class RerankWorkload(Workload):
    """A reranker: each document is read together with its query."""

    has_head = True
    inherits_text_settings = False  # its prompt and length are its template's

    @property
    def rows(self) -> Literal["rerank"]:
        return "rerank"

    @property
    def texts_per_query(self) -> list[tuple[int, int]]:
        """The pairs of a row with one positive and as many negatives as are taken."""
        data = self.config.data
        pair = self.config.reranker.max_length or data.max_length("query") + data.max_length("document")
        return [(1 + data.num_negatives, pair)]

    @property
    def gathered_documents(self) -> int:
        return 0

    def least_tokens(self, documents: int | None) -> tuple[int, str]:
        return 1, "one token"  # how long a pair and how large a group may be follows from model and rows


WORKLOADS: dict[str, type[Workload]] = {"embedding": EmbeddingWorkload, "reranker": RerankWorkload}
"""The workload of each task."""
