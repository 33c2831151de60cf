"""Settings of the training data: files, what a step takes of their rows, lengths and prompts."""

from dataclasses import dataclass
from typing import Literal

from megatron_embed.config.checks import require
from megatron_embed.names import ROLES, Role

DEFAULT_LENGTH = 512
"""Tokens of a text where neither the run nor its model says how many."""


@dataclass(frozen=True, kw_only=True)
class TrainFile:
    path: str
    """A JSONL file (.jsonl, .json, either with .gz or .zst), a Parquet or Arrow file, a BEIR folder, a directory that
    `datasets` saved, or a data set of the hub (org/name, org/name:config/split). Formats: docs/data.md."""
    streaming: bool = False
    """Of a data set of the hub, True: every process takes its rows as they come and keeps them in a temporary file,
    instead of fetching the whole set into the cache of `datasets` first."""
    rows: int | None = None
    """How many of a stream, its first ones, >= 1; null: all."""
    instruction: str | None = None
    """Replaces `{instruction}` in the query's prompt for the rows of this file that carry none of their own."""
    query_prompt: str | None = None
    """In place of `data.query_prompt` for the rows of this file."""
    document_prompt: str | None = None
    """In place of `data.document_prompt` for the rows of this file."""
    corpus: str | None = None
    """File of rows `{"docid", "title"?, "text"}`, where the rows of `path` name their documents by id."""
    in_batch_negatives: bool = True
    """False: queries of this file have no negatives but their own hard ones, as for labels of classes, which many rows
    share."""
    weight: float = 1.0
    """How often this file's turn comes, relative to its share by rows; no unit, > 0."""

    def __post_init__(self) -> None:
        require(bool(self.path), "data.train.path", self.path, "must name a file")
        require(self.rows is None or self.rows >= 1, "data.train.rows", self.rows, "must be >= 1 or null")
        require(self.rows is None or self.streaming, "data.train.rows", self.rows,
                "has no effect without streaming: true; set that, or remove it")
        require(self.weight > 0, "data.train.weight", self.weight, "must be > 0; remove a file that is not to be used")
        require("{instruction}" not in (self.document_prompt or ""), "data.train.document_prompt",
                 self.document_prompt, "only a query's prompt can hold {instruction}; write the document's prompt out")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: tuple[TrainFile, ...] = ()
    """Files of rows; a plain string is short for {path: STRING}."""
    shuffle: bool = True
    """False: step k takes rows k*global_batch_size ... in file order. True: a seeded permutation per epoch with no
    query or document twice in a global batch, each global batch from one entry of `train`."""
    mixed_batches: bool = False
    """True: with `shuffle`, a global batch takes rows of all entries of `train`."""
    sampling_temperature: float = 1.0
    """Over the entries of `train`: the turns of one with n rows are as weight * n^(1/sampling_temperature); no unit,
    >= 1. 1: by rows; larger: more evenly."""
    num_positives: int = 1
    """Positives per query, the first of the row or drawn (document_sampling); a row with fewer contributes what it has.
    Each is a term of the loss, for which the query's others are no negatives; a query's terms together weigh 1."""
    document_sampling: Literal["first", "random"] | None = None
    """Which positives and negatives of a row a step takes, where the row has more than num_positives or num_negatives:
    its first ones, or others each time that the row comes, drawn from seed, row and step. null: first; of a reranker,
    which takes all positives, random where `shuffle` is true."""
    validation_fraction: float = 0.0
    """Share of each entry's rows that is kept from training; at every evaluation the objective's metrics are taken over
    them. 0: none."""
    validation: tuple[TrainFile, ...] = ()
    """Files of rows that are not trained on, as in `train`, in place of a share of those; at every evaluation the
    objective's metrics are taken over them."""
    num_negatives: int = 0
    """Hard negatives per query, the first of the row or drawn (document_sampling); a row with fewer contributes what it
    has."""
    query_max_length: int | None = None
    """Tokens, special tokens and prompt included. null: the length that the model directory says it was trained with
    (sentence_bert_config.json, or a checkpoint's own), else 512; at most the model's positions."""
    document_max_length: int | None = None
    """The same of a document."""
    query_prompt: str | None = None
    """Exact prefix of a query, trailing space included. null: the model directory's, if it has one; "": none."""
    document_prompt: str | None = None
    """Exact prefix of a document, trailing space included. null: the model directory's, if it has one; "": none."""

    def max_length(self, role: Role) -> int:
        """Tokens of a role; 512 where they are the model directory's and that has not been read."""
        length = self.query_max_length if role == "query" else self.document_max_length
        return DEFAULT_LENGTH if length is None else length

    def prompt(self, role: Role) -> str:
        """Of a role; none where it is the model directory's and that has not been read."""
        return (self.query_prompt if role == "query" else self.document_prompt) or ""

    @property
    def files(self) -> tuple[TrainFile, ...]:
        """All of them: those to train on, then those to validate on."""
        return (*self.train, *self.validation)

    @property
    def validates(self) -> bool:
        """Whether the objective's metrics are taken over rows that are not trained on."""
        return bool(self.validation_fraction or self.validation)

    @property
    def all_in_batch(self) -> bool:
        """Whether every file's queries have in-batch negatives."""
        return all(file.in_batch_negatives for file in self.files)

    @property
    def samples_documents(self) -> bool:
        """Whether an embedding model's steps draw: any document of a row may then come."""
        return self.document_sampling == "random"

    def __post_init__(self) -> None:
        require(self.num_positives >= 1, "data.num_positives", self.num_positives, "must be >= 1")
        require(self.num_negatives >= 0, "data.num_negatives", self.num_negatives, "must be >= 0")
        require(self.sampling_temperature >= 1, "data.sampling_temperature", self.sampling_temperature, "must be >= 1")
        require(0 <= self.validation_fraction < 1, "data.validation_fraction", self.validation_fraction,
                "must be in [0, 1); usual: 0.01")
        require(not (self.validation and self.validation_fraction), "data.validation_fraction",
                self.validation_fraction, "data.validation is set too; keep one of them")
        for file in self.validation:
            require(file.weight == 1, "data.validation.weight", file.weight,
                    "has no effect on rows that are not trained on; remove it")
        if self.mixed_batches or not self.shuffle:
            rule = ("has no effect with mixed_batches: true or shuffle: false, which take the rows as they are; "
                    "remove it")
            require(self.sampling_temperature == 1, "data.sampling_temperature", self.sampling_temperature, rule)
            for file in self.train:
                require(file.weight == 1, "data.train.weight", file.weight, rule)
        for role in ROLES:
            value = getattr(self, f"{role}_max_length")
            require(value is None or value >= 4, f"data.{role}_max_length", value, "must be >= 4 tokens")
