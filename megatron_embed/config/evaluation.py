"""Sections `checkpoint` and `evaluation`: what a run saves, exports and evaluates."""

from dataclasses import dataclass
from typing import Literal

from megatron_embed.config.require import require
from megatron_embed.names import FurtherExport


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    directory: str | None = None
    """Directory that training state is saved to and resumed from; null: nothing is saved."""
    save_every_steps: int = 500
    """Optimizer steps between checkpoints; the last step is always saved."""
    save_every_epochs: float | None = None
    """Passes over the training rows between checkpoints, > 0, in place of save_every_steps; null: that."""
    keep: int = 3
    """Number of newest checkpoints to keep; 0 keeps all."""
    keep_every_steps: int | None = None
    """Checkpoints after a multiple of this many steps are kept, however old: milestones to evaluate, to export, and to
    audit steps from. null: only `keep` and the best."""
    async_save: bool = False
    """True: tensors are copied to host memory and written while training continues, which takes that memory; a
    checkpoint is complete some steps later. A run waits for its last checkpoint, also when it stops early."""
    export_at_end: str | None = None
    """Directory for a Sentence Transformers export, or a cross-encoder export for a reranker; null: no export."""
    export_formats: tuple[FurtherExport, ...] = ()
    """Formats that `export_at_end` is also written in (docs/conversion.md), each to a directory of its own beside it,
    with the format's name: export_at_end out and [onnx, gguf-q8_0] give out, out-onnx and out-gguf-q8_0. int8 is
    calibrated on training rows. Empty: its own format only."""
    export: Literal["last", "best"] = "last"
    """Checkpoint that `export_at_end` exports: the last one, or the one with the best `evaluation.best_metric`."""

    @property
    def exports(self) -> dict[FurtherExport | None, str]:
        """The directories that are exported to, by format; None: the one of `export_at_end` itself."""
        if self.export_at_end is None:
            return {}
        further: dict[FurtherExport | None, str] = {kind: f"{self.export_at_end.rstrip('/')}-{kind}"
                                                    for kind in self.export_formats}
        return {None: self.export_at_end, **further}

    def __post_init__(self) -> None:
        require(self.save_every_steps >= 1, "checkpoint.save_every_steps", self.save_every_steps, "must be >= 1")
        every = self.save_every_epochs
        require(every is None or every > 0, "checkpoint.save_every_epochs", every, "must be > 0 or null")
        require(every is None or self.save_every_steps == 500, "checkpoint.save_every_epochs", every,
                f"checkpoint.save_every_steps = {self.save_every_steps} is set too; keep one of them")
        require(self.keep >= 0, "checkpoint.keep", self.keep, "must be >= 0")
        milestones = self.keep_every_steps
        require(milestones is None or milestones >= 1, "checkpoint.keep_every_steps", milestones,
                "must be >= 1 or null")
        require(milestones is None or self.keep > 0, "checkpoint.keep_every_steps", milestones,
                "has no effect with checkpoint.keep = 0, which keeps all; remove one of them")
        require(self.export_at_end is None or self.directory is not None, "checkpoint.export_at_end",
                 self.export_at_end, "the export is made from a checkpoint; set checkpoint.directory")
        formats = self.export_formats
        require(not formats or self.export_at_end is not None, "checkpoint.export_formats", list(formats),
                "nothing is exported; set checkpoint.export_at_end")
        require(len(set(formats)) == len(formats), "checkpoint.export_formats", list(formats),
                "names a format twice; keep one of them")
        require(self.export == "last" or self.export_at_end is not None, "checkpoint.export", self.export,
                "nothing is exported; set checkpoint.export_at_end")
        require(not self.async_save or self.directory is not None, "checkpoint.async_save", self.async_save,
                "nothing is saved; set checkpoint.directory")


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    path: str
    """A BEIR folder, or a file of pairs."""
    instruction: str | None = None
    """Replaces `{instruction}` in `data.query_prompt` for this set; null: embedding.instruction."""
    name: str | None = None
    """Name of the set in the names of metrics; null: the name of the folder or file."""

    def __post_init__(self) -> None:
        require(bool(self.path), "evaluation.path", self.path, "must name a folder or file")
        require(self.name is None or (self.name != "" and "/" not in self.name), "evaluation.name", self.name,
                "must be a word without a slash, or null")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    every_steps: int = 500
    """Optimizer steps between evaluations; the last step is always evaluated."""
    at_start: bool = True
    """Evaluate the model before the first step of a new run too: a row of step 0 in the metrics, which never counts as
    the best."""
    retrieval: tuple[EvaluationSet, ...] = ()
    """BEIR folders (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv)."""
    reranking: tuple[str, ...] = ()
    """Files of lists, rows {"query", "documents": [...], "labels": [...]} or {"query", "docs": [{"text", "label"}]}."""
    split: str = "test"
    """Name of the qrels file of a BEIR folder."""
    drop_own_id: bool = False
    """True: remove the document with the query's own id from its ranking in `retrieval`, as BEIR and MTEB do for sets
    whose queries are documents themselves (ArguAna, Quora)."""
    sts: tuple[EvaluationSet, ...] = ()
    """Files of pairs {"text_a", "text_b", "score"}, or of another format of pairs: Pearson and Spearman correlation of
    cosine similarity (or dot product) and score."""
    best_metric: str | None = None
    """Metric, of those that an evaluation logs as `eval/NAME`, that selects the best checkpoint, which is kept beside
    the newest ones; `best` points to it. For `loss`, `loss@DIM`, `loss@PRECISION` and `negative_similarity` smaller is
    better, for all others larger. null: ndcg@10; without retrieval sets spearman or rerank/ndcg@10; with held-out rows
    alone loss, if `patience` or checkpoint.export: best needs it."""
    patience: int | None = None
    """Number of consecutive evaluations without a better `best_metric` after which the run ends as if train_steps were
    reached; >= 1; null: no early stopping."""

    @property
    def names_sets(self) -> bool:
        """Whether there is any evaluation set besides held-out rows."""
        return bool(self.retrieval or self.sts or self.reranking)

    def __post_init__(self) -> None:
        require(self.every_steps >= 1, "evaluation.every_steps", self.every_steps, "must be >= 1")
        require(not self.drop_own_id or bool(self.retrieval), "evaluation.drop_own_id", self.drop_own_id,
                "nothing is searched; name a BEIR folder in evaluation.retrieval, or remove it")
        require(self.patience is None or self.patience >= 1, "evaluation.patience", self.patience,
                "must be >= 1 evaluations, or null")
