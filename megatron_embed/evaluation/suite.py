"""Everything that a run is evaluated on, and the metrics by name."""

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
from megatron_embed.evaluation.retrieval import CUTOFFS, Embed, Widths, evaluate_retrieval
from megatron_embed.evaluation.sts import StsData, evaluate_sts
from megatron_embed.names import Role, Similarity

RETRIEVAL_METRICS = ("map", *(f"{name}@{k}" for k in CUTOFFS for name in ("ndcg", "mrr", "recall", "precision")))
STS_METRICS = ("pearson", "spearman")
PREFIX = "eval/"
"""Of a metric's name in files and on dashboards."""
RERANK_METRICS = ("map", *(f"{name}@{k}" for k in RERANK_CUTOFFS for name in ("ndcg", "mrr")))


@dataclass(frozen=True, kw_only=True)
class EvaluationSuite:
    """The sets of a run. A metric's plain name is the mean over the sets that have it; `SET/name` is of one of them."""

    retrieval: Sequence[BeirData]
    sts: Sequence[StsData]
    reranking: Sequence[RerankData]
    dims: tuple[int, ...] = ()
    """Truncated widths that retrieval and pairs are measured at too, as `dim_WIDTH/name`."""

    def __bool__(self) -> bool:
        """Whether there is anything to evaluate."""
        return bool(self.retrieval or self.sts or self.reranking)

    def metric_names(self) -> list[str]:
        """Every metric that an evaluation of the sets gives."""
        names: list[str] = []
        widths = ("", *(f"dim_{width}/" for width in self.dims))
        kinds: tuple[tuple[str, Sequence[BeirData | StsData | RerankData], Sequence[str], Sequence[str]], ...] = (
            ("", self.retrieval, widths, RETRIEVAL_METRICS), ("", self.sts, widths, STS_METRICS),
            ("rerank/", self.reranking, ("",), RERANK_METRICS))
        for prefix, sets, measured, metrics in kinds:
            own = [f"{width}{metric}" for width in measured for metric in metrics]
            if sets:
                names += [f"{prefix}{metric}" for metric in own]
            if len(sets) > 1:
                names += [f"{prefix}{data.name}/{metric}" for data in sets for metric in own]
        return names

    def require_metric(self, wanted: str | None, of_held_out: Sequence[str]) -> None:
        """Refuses an `evaluation.best_metric` that no evaluation of the run gives; `of_held_out`: rows' metrics."""
        if wanted is None:
            return
        names = [*of_held_out, *self.metric_names()]
        if not names:
            raise ConfigError(f"evaluation.best_metric = {wanted!r}: there is nothing to evaluate; name a set in "
                              "evaluation.retrieval, sts or reranking, set data.validation_fraction or "
                              "data.validation, or leave it out", key="evaluation.best_metric")
        if wanted.removeprefix(PREFIX) not in names:
            near = difflib.get_close_matches(wanted.removeprefix(PREFIX), names, n=1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"evaluation.best_metric = {wanted!r}: not among the metrics of this run's evaluations; "
                              f"{meant}there are {', '.join(names)}", key="evaluation.best_metric")

    def samples(self, size: int) -> list[tuple[BeirData | StsData, Role, list[str]]]:
        """(set, role, texts) of up to `size` texts of each set, to look at their vectors: queries, then documents."""
        half = size // 2
        taken: list[tuple[BeirData | StsData, Role, list[str]]] = []
        for data in self.retrieval:
            judged = {document for labels in data.qrels.values() for document, label in labels.items() if label > 0}
            relevant = [number for number, name in enumerate(data.document_ids) if name in judged][:half]
            taken += [(data, "query", data.query_texts[:half]),
                      (data, "document", [data.document_texts[number] for number in relevant])]
        for pairs in self.sts:
            taken += [(pairs, role, texts[:half]) for role, texts in pairs.texts.items()]
        return [sample for sample in taken if sample[2]]

    def evaluate(self, embed_for: Callable[[str | None], Embed], similarity: Similarity, *,
                 group: dist.ProcessGroup | None = None, device: torch.device | None = None) -> dict[str, float]:
        """Metrics of retrieval and pairs by name. Called by all ranks of the group; see evaluate_retrieval.

        `embed_for`: a set's instruction, or null, to what embeds its texts.
        """
        widths = Widths(dims=self.dims)
        of_retrieval = [(data.name, evaluate_retrieval(embed_for(data.instruction), data, similarity=similarity,
                                                       widths=widths, group=group, device=device))
                        for data in self.retrieval]
        of_sts = [(data.name, evaluate_sts(embed_for(data.instruction), data, similarity=similarity, dims=self.dims))
                  for data in self.sts]
        return together(of_retrieval) | together(of_sts)


def best_metric(config: RunConfig) -> str | None:
    """The metric by which checkpoints are compared; null where nothing is evaluated."""
    evaluation = config.evaluation
    if evaluation.best_metric is not None:
        return evaluation.best_metric.removeprefix(PREFIX)
    if evaluation.names_sets:
        return "ndcg@10" if evaluation.retrieval else "spearman" if evaluation.sts else "rerank/ndcg@10"
    return "loss" if config.data.validates else None


def together(results: Sequence[tuple[str, Mapping[str, float]]]) -> dict[str, float]:
    """Means over the sets, and each set's own metrics where there are several."""
    if len(results) < 2:
        return dict(results[0][1]) if results else {}
    means = {name: sum(metrics[name] for _, metrics in results) / len(results) for name in results[0][1]}
    return means | {f"{data}/{name}": value for data, metrics in results for name, value in metrics.items()}
