"""Settings of the training data: files, what a step takes of their rows, lengths and prompts."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_embed.config.require import require
from megatron_embed.names import ROLES, Role

DEFAULT_LENGTH = 512
"""Maximum number of tokens of a text if neither the run nor its model sets one."""

MOST_WORKERS = 64
"""Processes that prepare batches for a replica, at most."""


@dataclass(frozen=True, kw_only=True)
class TrainFile:
    path: str
    """A JSONL file or a JSON array (.jsonl, .json), a CSV or TSV file (each with .gz or .zst too), a Parquet or Arrow
    file, a directory of such files or a pattern (data/*.jsonl), a BEIR folder, a directory saved by `datasets`, or a
    data set of the hub (org/name, org/name:config/split). Formats: docs/data.md."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column of the file -> field that it is, as in {question: query, answer: positive}; other columns keep their
    names. A row may lack the column of a field that may be absent; one that no row has is refused."""
    score_range: tuple[float, ...] = ()
    """Lowest and highest score of this file's pairs, such as [0, 5]; they become 0 and 1, as cosine_similarity needs
    them. Empty: scores are taken as they stand."""
    streaming: bool = False
    """True, for a data set of the hub: every process streams the rows into a temporary file instead of downloading the
    whole set into the cache of `datasets` first."""
    rows: int | None = None
    """Number of rows to take from the start of a stream, >= 1; null: all."""
    instruction: str | None = None
    """Replaces `{instruction}` in the query prompt for rows of this file without an instruction of their own."""
    query_prompt: str | None = None
    """Replaces `data.query_prompt` for the rows of this file."""
    document_prompt: str | None = None
    """Replaces `data.document_prompt` for the rows of this file."""
    corpus: str | None = None
    """File of rows `{"docid", "title"?, "text"}`, if the rows of `path` name their documents by id."""
    in_batch_negatives: bool = True
    """False: the only negatives of this file's queries are their own hard negatives, as for class labels, which many
    rows share."""
    weight: float = 1.0
    """Sampling weight of this file, relative to its share by rows; no unit, > 0."""
    max_epochs: float | None = None
    """Passes over this file's rows after which no step takes it any more; its share goes to the other files, in
    proportion. null: any number."""

    def __post_init__(self) -> None:
        require(bool(self.path), "data.train.path", self.path, "must name a file")
        require(self.rows is None or self.rows >= 1, "data.train.rows", self.rows, "must be >= 1 or null")
        require(self.rows is None or self.streaming, "data.train.rows", self.rows,
                "has no effect without streaming: true; set that, or remove it")
        fields = list(self.columns.values())
        twice = next((name for name in fields if fields.count(name) > 1), None)
        require(twice is None, "data.train.columns", self.columns, f"gives {twice!r} two columns; keep one of them")
        require(all(self.columns) and all(fields), "data.train.columns", self.columns, "must name columns and fields, "
                "as in {question: query}")
        require(not self.score_range or (len(self.score_range) == 2 and self.score_range[0] < self.score_range[1]),
                "data.train.score_range", list(self.score_range), "must be the lowest and the highest score, such as "
                "[0, 5]")
        require(self.weight > 0, "data.train.weight", self.weight, "must be > 0; remove a file that should not be used")
        require(self.max_epochs is None or self.max_epochs > 0, "data.train.max_epochs", self.max_epochs,
                "must be > 0 or null")
        require("{instruction}" not in (self.document_prompt or ""), "data.train.document_prompt",
                 self.document_prompt, "only a query prompt can contain {instruction}; write the document's prompt out")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: tuple[TrainFile, ...] = ()
    """Files of rows; a plain string is short for {path: STRING}."""
    shuffle: bool = True
    """False: step k takes rows k*global_batch_size ... in file order. True: a seeded permutation per epoch with no
    query or document twice in a global batch, each global batch from one entry of `train`."""
    mixed_batches: bool = False
    """True, with `shuffle`: a global batch takes rows of all entries of `train`."""
    sampling_temperature: float = 1.0
    """Temperature for sampling the entries of `train`: an entry with n rows is sampled in proportion to weight *
    n^(1/sampling_temperature); no unit, >= 1. 1: by rows; larger: more evenly."""
    sampling_cap: int | None = None
    """Rows that an entry of `train` counts as at most when the entries are sampled, so that a very large one does not
    leave the others few steps; null: all."""
    allow_changes: bool = False
    """True: a run that is started again may have other rows or weights than it began with; the log says from which step
    on, and so does audit.jsonl. It takes the rows that it would take at this step if it had always had them. False:
    that is refused."""
    num_positives: int = 1
    """Positives per query, the first of the row or sampled (document_sampling); a row with fewer contributes those it
    has. Each is a term of the loss, in which the query's other positives are not negatives; a query's terms together
    have weight 1."""
    document_sampling: Literal["first", "random"] | None = None
    """Positives and negatives that a step takes of a row with more than num_positives or num_negatives: the first ones,
    or a new sample each time the row is used, determined by seed, row and step. null: first; for a reranker, which
    takes all positives, random if `shuffle` is true."""
    validation_fraction: float = 0.0
    """Share of each entry's rows held out from training; every evaluation computes the objective's metrics on them. 0:
    none."""
    validation: tuple[TrainFile, ...] = ()
    """Files of rows held out from training, as in `train`, instead of a share of those; every evaluation computes the
    objective's metrics on them."""
    num_negatives: int = 0
    """Hard negatives per query, the first of the row or sampled (document_sampling); a row with fewer contributes those
    it has."""
    query_max_length: int | None = None
    """Maximum number of tokens of a query, including special tokens and prompt. null: the length that the model was
    trained with (sentence_bert_config.json, or a checkpoint's own), otherwise 512; at most the model's positions.
    Without effect where embedding.query_expansion brings every query to its own number of tokens."""
    document_max_length: int | None = None
    """Maximum number of tokens of a document, like query_max_length."""
    index_directory: str | None = None
    """Directory of the indexes of `train` and `validation`: what the check of all rows found, so that the next start
    reads none of them. A file that was changed is read again. All ranks write it together. null: for 16 MiB of rows or
    more, megatron_embed/index in the user's cache directory (XDG_CACHE_HOME, ~/.cache); "none": every process reads
    all rows at each start."""
    workers: int | None = None
    """Processes that read and tokenize the batches of the next steps, for all ranks of a replica on a node together; 0:
    a thread of each rank, one step ahead. null: 1 where several ranks of a replica share a node, otherwise 0. The
    batches are the same."""
    token_cache: str | None = None
    """Directory of the token ids of `train` and `validation`, which `megatron-embed data tokenize` has written: a run
    of an embedding model looks them up instead of tokenizing. Refused if the tokenizer, the prompts, the lengths or the
    rows are others now."""
    query_prompt: str | None = None
    """Exact prefix of a query, including a trailing space. null: the model directory's prompt, if it has one; "":
    none."""
    document_prompt: str | None = None
    """Exact prefix of a document, including a trailing space. null: the model directory's prompt, if it has one; "":
    none."""

    def max_length(self, role: Role) -> int:
        """Maximum number of tokens of a role; 512 if the model directory sets it and has not been read."""
        length = self.query_max_length if role == "query" else self.document_max_length
        return DEFAULT_LENGTH if length is None else length

    def prompt(self, role: Role) -> str:
        """Prompt of a role; empty if the model directory sets it and has not been read."""
        return (self.query_prompt if role == "query" else self.document_prompt) or ""

    @property
    def files(self) -> tuple[TrainFile, ...]:
        """All files: those to train on, then those to validate on."""
        return (*self.train, *self.validation)

    @property
    def validates(self) -> bool:
        """Whether the objective's metrics are computed on held-out rows."""
        return bool(self.validation_fraction or self.validation)

    @property
    def all_in_batch(self) -> bool:
        """Whether every file's queries have in-batch negatives."""
        return all(file.in_batch_negatives for file in self.files)

    @property
    def samples_documents(self) -> bool:
        """Whether an embedding model's steps sample documents, so that any document of a row may be used."""
        return self.document_sampling == "random"

    def __post_init__(self) -> None:
        require(self.num_positives >= 1, "data.num_positives", self.num_positives, "must be >= 1")
        require(self.num_negatives >= 0, "data.num_negatives", self.num_negatives, "must be >= 0")
        require(self.sampling_temperature >= 1, "data.sampling_temperature", self.sampling_temperature, "must be >= 1")
        require(self.sampling_cap is None or self.sampling_cap >= 1, "data.sampling_cap", self.sampling_cap,
                "must be >= 1 or null")
        require(0 <= self.validation_fraction < 1, "data.validation_fraction", self.validation_fraction,
                "must be in [0, 1); usual: 0.01")
        require(not (self.validation and self.validation_fraction), "data.validation_fraction",
                self.validation_fraction, "data.validation is set too; keep one of them")
        require(self.index_directory != "", "data.index_directory", self.index_directory,
                'must name a directory, or be null for the cache directory or "none" for no index that is kept')
        require(self.token_cache != "", "data.token_cache", self.token_cache, "must name a directory or be null")
        require(self.workers is None or 0 <= self.workers <= MOST_WORKERS, "data.workers", self.workers,
                f"must be 0 to {MOST_WORKERS} or null")
        for file in self.validation:
            rule = "has no effect on rows that are not trained on; remove it"
            require(file.weight == 1, "data.validation.weight", file.weight, rule)
            require(file.max_epochs is None, "data.validation.max_epochs", file.max_epochs, rule)
        if self.mixed_batches or not self.shuffle:
            rule = ("has no effect with mixed_batches: true or shuffle: false, which take the rows as they are; "
                    "remove it")
            require(self.sampling_temperature == 1, "data.sampling_temperature", self.sampling_temperature, rule)
            require(self.sampling_cap is None, "data.sampling_cap", self.sampling_cap, rule)
            for file in self.train:
                require(file.weight == 1, "data.train.weight", file.weight, rule)
        if self.mixed_batches or not self.shuffle or len(self.train) == 1:
            for file in self.train:
                require(file.max_epochs is None, "data.train.max_epochs", file.max_epochs, "needs a mixture of several "
                        "files, shuffled, a global batch from one of them; remove it, and set training.epochs")
        for role in ROLES:
            value = getattr(self, f"{role}_max_length")
            require(value is None or value >= 4, f"data.{role}_max_length", value, "must be >= 4 tokens")
