"""The evaluation sets of a run and the names of their metrics."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_embed.config.schema import RunConfig
from megatron_embed.errors import ConfigError
from megatron_embed.evaluation.beir import BeirData
from megatron_embed.evaluation.reranking import CUTOFFS as RERANK_CUTOFFS
from megatron_embed.evaluation.reranking import RerankData
from megatron_embed.evaluation.retrieval import CUTOFFS, Embed, Rankings, evaluate_retrieval
from megatron_embed.evaluation.stored_vectors import precision_prefixes
from megatron_embed.evaluation.sts import StsData, evaluate_sts
from megatron_embed.names import Precision, Role, Similarity

RETRIEVAL_METRICS = ("map", *(f"{name}@{k}" for k in CUTOFFS for name in ("ndcg", "mrr", "recall", "precision")))
STS_METRICS = ("pearson", "spearman")
PREFIX = "eval/"
"""Prefix of a metric's name in files and on dashboards."""
RERANK_METRICS = ("map", *(f"{name}@{k}" for k in RERANK_CUTOFFS for name in ("ndcg", "mrr")))


@dataclass(frozen=True, kw_only=True)
class EvaluationSuite:
    """The evaluation sets of a run. A metric's plain name is the mean over its sets; `SET/name` belongs to one set."""

    retrieval: Sequence[BeirData]
    sts: Sequence[StsData]
    reranking: Sequence[RerankData]
    dims: tuple[int, ...] = ()
    """Truncated widths at which retrieval and pairs are measured too, as `dim_WIDTH/name`."""
    precisions: tuple[Precision, ...] = ()
    """Precisions at which retrieval is measured too, at every width, as `binary/name` and `dim_WIDTH/binary/name`."""

    scores: tuple[str, ...] = ()
    """Scores of a joint model by which retrieval is measured too, as `sparse/name`."""

    def __bool__(self) -> bool:
        """Whether there is anything to evaluate."""
        return bool(self.retrieval or self.sts or self.reranking)

    def metric_names(self) -> list[str]:
        """Names of all metrics of an evaluation."""
        names: list[str] = []
        widths = ("", *(f"dim_{width}/" for width in self.dims))
        stored = [prefix for prefix, *_ in precision_prefixes(self.dims, self.precisions)]
        stored += [f"{score}/" for score in self.scores]
        kinds: tuple[tuple[str, Sequence[BeirData | StsData | RerankData], Sequence[str], Sequence[str]], ...] = (
            ("", self.retrieval, (*widths, *stored), RETRIEVAL_METRICS), ("", self.sts, widths, STS_METRICS),
            ("rerank/", self.reranking, ("",), RERANK_METRICS))
        for prefix, sets, measured, metrics in kinds:
            own = [f"{width}{metric}" for width in measured for metric in metrics]
            if sets:
                names += [f"{prefix}{metric}" for metric in own]
            if len(sets) > 1:
                names += [f"{prefix}{data.name}/{metric}" for data in sets for metric in own]
        return names

    def require_metric(self, wanted: str | None, validation_metrics: Sequence[str]) -> None:
        """Raise ConfigError if no evaluation of the run computes `evaluation.best_metric`."""
        if wanted is None:
            return
        names = [*validation_metrics, *self.metric_names()]
        if not names:
            raise ConfigError(f"evaluation.best_metric = {wanted!r}: there is nothing to evaluate; name a set in "
                              "evaluation.retrieval, sts or reranking, set data.validation_fraction or "
                              "data.validation, or leave it out", key="evaluation.best_metric")
        if wanted.removeprefix(PREFIX) not in names:
            near = difflib.get_close_matches(wanted.removeprefix(PREFIX), names, n=1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"evaluation.best_metric = {wanted!r}: not a metric of this run's evaluations; "
                              f"{meant}the metrics are {', '.join(names)}", key="evaluation.best_metric")

    def samples(self, size: int) -> list[tuple[BeirData | StsData, Role, list[str]]]:
        """(set, role, texts) with up to `size` texts of each set for the projector: queries, then documents."""
        half = size // 2
        taken: list[tuple[BeirData | StsData, Role, list[str]]] = []
        for data in self.retrieval:
            relevant = {name for labels in data.qrels.values() for name, label in labels.items() if label > 0}
            documents = [index for index, name in enumerate(data.document_ids) if name in relevant][:half]
            taken += [(data, "query", data.query_texts[:half]),
                      (data, "document", [data.document_texts[index] for index in documents])]
        for pairs in self.sts:
            taken += [(pairs, role, texts[:half]) for role, texts in pairs.texts.items()]
        return [sample for sample in taken if sample[2]]

    def evaluate(self, embed_for: Callable[[str | None], Embed], similarity: Similarity, *,
                 group: dist.ProcessGroup | None = None, device: torch.device | None = None) -> dict[str, float]:
        """Metrics of retrieval and pairs by name. Called by all ranks of the group; see evaluate_retrieval.

        `embed_for`: a set's instruction, or None -> the function that embeds its texts.
        """
        rankings = Rankings(dims=self.dims, precisions=self.precisions)
        retrieval = [(data.name, evaluate_retrieval(embed_for(data.instruction), data, similarity=similarity,
                                                    rankings=rankings, group=group, device=device))
                     for data in self.retrieval]
        sts = [(data.name, evaluate_sts(embed_for(data.instruction), data, similarity=similarity, dims=self.dims))
               for data in self.sts]
        return average(retrieval) | average(sts)


def best_metric(config: RunConfig) -> str | None:
    """The metric by which checkpoints are compared, or None without any evaluation."""
    evaluation = config.evaluation
    if evaluation.best_metric is not None:
        return evaluation.best_metric.removeprefix(PREFIX)
    if evaluation.names_sets:
        return "ndcg@10" if evaluation.retrieval else "spearman" if evaluation.sts else "rerank/ndcg@10"
    return "loss" if config.data.validates else None


def average(results: Sequence[tuple[str, Mapping[str, float]]]) -> dict[str, float]:
    """Means over the sets, and each set's own metrics if there are several sets."""
    if len(results) < 2:
        return dict(results[0][1]) if results else {}
    means = {name: sum(metrics[name] for _, metrics in results) / len(results) for name in results[0][1]}
    return means | {f"{data}/{name}": value for data, metrics in results for name, value in metrics.items()}
