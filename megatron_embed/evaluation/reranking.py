"""Ranking metrics of a reranker on lists of labelled documents, graded labels included, as trec_eval defines them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from megatron_embed.config.data import TrainFile
from megatron_embed.data.dataset import RecordFile
from megatron_embed.data.number_checks import check_grade
from megatron_embed.data.pair_batches import pairs_of
from megatron_embed.data.pair_tokenizer import Pair
from megatron_embed.data.records import RerankRecord
from megatron_embed.errors import DataError, UserError
from megatron_embed.evaluation.retrieval import Embed, retrieval_metrics
from megatron_embed.names import Role, Similarity

CUTOFFS = (1, 3, 5, 10)
_MEASURES = ("ndcg", "mrr")

ScorePairs = Callable[[Sequence[Pair]], Tensor]
"""[pairs] scores, larger is better."""


@dataclass(frozen=True, kw_only=True)
class RerankData:
    """A reranking test set."""

    name: str
    """Of the folder and the file, without its ending."""
    lists: tuple[RerankRecord, ...]


def load_rerank_file(path: str, key: str = "--data") -> RerankData:
    """The lists of a file of rows `{"query", "documents", "labels"}` (or another format of lists), validated whole.

    Raises:
        ConfigError: the file cannot be opened; the message names `key`.
        DataError: a row cannot be used, or a label is no whole number (trec_eval's gains are).
    """
    lists = tuple(record for record in RecordFile(TrainFile(path=path), "rerank", key)
                  if isinstance(record, RerankRecord))
    for record in lists:
        for label in record.labels:
            if label != int(label):
                raise DataError(f"{record.source}: label {label:g}: ranking metrics take whole numbers (0 is not "
                                "relevant); round it, or give grades")
            check_grade(label, "label", record.source)
    file = Path(path).resolve()
    return RerankData(name=f"{file.parent.name}_{file.name.split('.')[0]}", lists=lists)


def similarity_of_pairs(encode: Embed, pairs: Sequence[Pair], *, similarity: Similarity) -> Tensor:
    """[pairs] similarity of query and document: what an embedding model says of lists. Every text is encoded once."""
    texts: dict[Role, list[str]] = {"query": list(dict.fromkeys(pair.query for pair in pairs)),
                                    "document": list(dict.fromkeys(pair.document for pair in pairs))}
    rows = {role: encode(some, role).float() for role, some in texts.items()}
    if similarity == "cosine":
        rows = {role: normalize(vectors, dim=-1) for role, vectors in rows.items()}
    places = {role: {text: place for place, text in enumerate(some)} for role, some in texts.items()}
    queries = rows["query"][torch.tensor([places["query"][pair.query] for pair in pairs])]
    documents = rows["document"][torch.tensor([places["document"][pair.document] for pair in pairs])]
    return (queries * documents).sum(dim=-1)


def evaluate_reranking(score: ScorePairs, data: RerankData) -> dict[str, float]:
    """Means over the lists of `ndcg@k` and `mrr@k` for k in 1, 3, 5, 10, and of `map`.

    A list without a relevant document counts 0. Gains of nDCG are the labels; relevant for the others means above 0.
    Equal scores, compared as float32, are ordered by trec_eval's rule: the later document of the list first.

    Args:
        score: called once with all pairs, list after list.
    Raises:
        UserError: a score that is not finite.
    """
    pairs = [pair for record in data.lists for pair in pairs_of(record)]
    scores = score(pairs).float()
    bad = int((~torch.isfinite(scores)).sum())
    if bad:
        raise UserError(f"{data.name}: {bad} of {len(scores)} scores are not finite; the model has diverged or "
                        "overflowed")
    qrels, run, first = {}, {}, 0
    for number, record in enumerate(data.lists):
        names = [f"{place:09d}" for place in range(len(record.documents))]
        values = scores[first : first + len(names)].tolist()
        qrels[str(number)] = {name: int(label) for name, label in zip(names, record.labels, strict=True)}
        run[str(number)] = dict(zip(names, values, strict=True))
        first += len(names)
    metrics = retrieval_metrics(qrels, run, ks=CUTOFFS)
    return {**{f"{measure}@{k}": metrics[f"{measure}@{k}"] for measure in _MEASURES for k in CUTOFFS},
            "map": metrics["map"]}
