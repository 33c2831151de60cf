"""Ranking metrics on lists of documents with binary or graded labels, as trec_eval defines them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from megatron_embed.config.data import TrainFile
from megatron_embed.data.columns import COLUMNS_OPTION
from megatron_embed.data.dataset import RecordFile
from megatron_embed.data.number_checks import check_grade
from megatron_embed.data.pair_batches import pairs_of
from megatron_embed.data.pair_tokenizer import Pair
from megatron_embed.data.records import RerankRecord
from megatron_embed.errors import DataError
from megatron_embed.evaluation.finite import require_finite
from megatron_embed.evaluation.retrieval import Embed, retrieval_metrics
from megatron_embed.names import Role, Similarity

CUTOFFS = (1, 3, 5, 10)
METRICS = (*(f"{measure}@{k}" for measure in ("ndcg", "mrr") for k in CUTOFFS), "map")

ScorePairs = Callable[[Sequence[Pair]], Tensor]
"""[pairs] scores, larger is better."""


@dataclass(frozen=True, kw_only=True)
class RerankData:
    """A reranking test set."""

    name: str
    """FOLDER_FILE, without the file's extension."""
    lists: tuple[RerankRecord, ...]


def load_rerank_file(path: str, key: str = "--data", columns: dict[str, str] | None = None) -> RerankData:
    """Load and validate a file of rows `{"query", "documents", "labels"}`, or of another format of labelled lists.

    Args:
        columns: those of --columns; None: there is no such option.
    Raises:
        ConfigError: the file cannot be opened; the message names `key`.
        DataError: a row cannot be used, or a label is not an integer, as trec_eval's gains are.
    """
    records = RecordFile(TrainFile(path=path, columns=columns or {}), "rerank", key,
                         columns_key=None if columns is None else COLUMNS_OPTION)
    lists = tuple(record for record in records if isinstance(record, RerankRecord))
    for record in lists:
        for label in record.labels:
            if label != int(label):
                raise DataError(f"{record.source}: label {label:g}: ranking metrics take whole numbers (0 is not "
                                "relevant); round it, or use grades")
            check_grade(label, "label", record.source)
    file = Path(path).resolve()
    return RerankData(name=f"{file.parent.name}_{file.name.split('.')[0]}", lists=lists)


def similarity_of_pairs(encode: Embed, pairs: Sequence[Pair], *, similarity: Similarity) -> Tensor:
    """Similarity of query and document, [pairs], so that an embedding model can rank lists. Encodes each text once."""
    texts: dict[Role, list[str]] = {"query": list(dict.fromkeys(pair.query for pair in pairs)),
                                    "document": list(dict.fromkeys(pair.document for pair in pairs))}
    embeddings = {role: encode(own, role).float() for role, own in texts.items()}
    if similarity == "cosine":
        embeddings = {role: normalize(vectors, dim=-1) for role, vectors in embeddings.items()}
    rows = {role: {text: row for row, text in enumerate(own)} for role, own in texts.items()}
    queries = embeddings["query"][torch.tensor([rows["query"][pair.query] for pair in pairs])]
    documents = embeddings["document"][torch.tensor([rows["document"][pair.document] for pair in pairs])]
    return (queries * documents).sum(dim=-1)


def evaluate_reranking(score: ScorePairs, data: RerankData) -> dict[str, float]:
    """Means over the lists of `ndcg@k` and `mrr@k` for k in 1, 3, 5, 10, and of `map`.

    A list without a relevant document counts as 0. nDCG's gains are the labels; for the other metrics a label above 0
    means relevant. Equal scores, compared as float32, are ordered by trec_eval's rule: the later document comes first.

    Args:
        score: called once with all pairs, list after list.
    Raises:
        UserError: a score that is not finite.
    """
    pairs = [pair for record in data.lists for pair in pairs_of(record)]
    scores = require_finite(score(pairs).float(), "scores", data.name)
    qrels, run, first = {}, {}, 0
    for index, record in enumerate(data.lists):
        names = [f"{position:09d}" for position in range(len(record.documents))]
        values = scores[first : first + len(names)].tolist()
        qrels[str(index)] = {name: int(label) for name, label in zip(names, record.labels, strict=True)}
        run[str(index)] = dict(zip(names, values, strict=True))
        first += len(names)
    metrics = retrieval_metrics(qrels, run, ks=CUTOFFS)
    return {name: metrics[name] for name in METRICS}
