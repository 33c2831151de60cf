"""Vectors of texts by a model that is no model: random, but the same for the same text, of unit length; and the losses
of one process that compare with them, by autograd."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional

OLD, GUIDE, TEACHER = 1, 2, 3
"""Parts of the seeds."""
COMPATIBLE_WEIGHT, MASK_MARGIN, GUIDE_DIM = 0.7, 0.1, 6
LEAST_GAP = 1e-5
"""Between a guide's similarity and the bound that it is compared with."""


def hashed_vectors(dim: int, salt: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """[texts] int64 ids -> [texts, dim] float32."""
    def lookup(ids: torch.Tensor) -> torch.Tensor:
        rows = [np.random.default_rng([salt, name % 2**63]).standard_normal(dim) for name in ids.tolist()]
        return functional.normalize(torch.from_numpy(np.array(rows, dtype=np.float64).reshape(-1, dim)), dim=1).float()

    return lookup


def vectors_of(texts: Sequence[str], dim: int, salt: int) -> torch.Tensor:
    """[texts, dim] float64, those of `hashed_vectors`."""
    from megatron_embed.data.records import text_id

    return hashed_vectors(dim, salt)(torch.tensor([text_id(text) for text in texts], dtype=torch.int64)).double()


def fixed_vectors(others: str, dim: int) -> Any:
    """What an objective of these cases looks up. `dim`: of the model in training."""
    from megatron_embed.objectives.fixed_vectors import FixedVectors

    return {"": FixedVectors(), "compatible": FixedVectors(old_document=hashed_vectors(dim, OLD)),
            "query side": FixedVectors(old_document=hashed_vectors(dim, OLD)),
            "guided": FixedVectors(guide_query=hashed_vectors(GUIDE_DIM, GUIDE),
                                   guide_document=hashed_vectors(GUIDE_DIM, GUIDE)),
            "distilled": FixedVectors(teacher_query=hashed_vectors(dim, TEACHER),
                                      teacher_document=hashed_vectors(dim, TEACHER))}[others]


def _documents(records: Sequence[Any]) -> list[str]:
    from tests.helpers.exactness_cases import NUM_NEGATIVES

    return list(itertools.chain.from_iterable((record.positive[0], *record.negatives[:NUM_NEGATIVES])
                                              for record in records))


def old_documents(records: Sequence[Any], dim: int) -> torch.Tensor:
    """[documents, dim] of the index."""
    return vectors_of(_documents(records), dim, OLD)


def loss_with_index(case: Any, query: torch.Tensor, positive: torch.Tensor, pools: Any,
                    records: Sequence[Any]) -> torch.Tensor:
    """InfoNCE of the queries against the index's vectors of the documents that they are compared with."""
    from tests.helpers.embedding_reference import excluded_pairs
    from tests.helpers.exactness_cases import ROWS

    logits = query @ old_documents(records, query.shape[1]).T / ROWS[case.rows].temperature
    if ROWS[case.rows].masked:
        logits = logits.masked_fill(excluded_pairs(records), -torch.inf)
    losses = [functional.cross_entropy(logits[queries][:, documents], torch.searchsorted(documents, positive[queries]),
                                       reduction="sum") for queries, documents in pools]
    return torch.stack(losses).sum() / len(records)


def guided_pairs(records: Sequence[Any], positive: torch.Tensor) -> torch.Tensor:
    """[queries, documents] bool: those that the guide finds more similar than the positive by more than the margin."""
    queries = vectors_of([record.query for record in records], GUIDE_DIM, GUIDE)
    similarity = queries @ vectors_of(_documents(records), GUIDE_DIM, GUIDE).T
    above = similarity - similarity.gather(1, positive[:, None]) - MASK_MARGIN
    assert float(above.abs().min()) > LEAST_GAP
    excluded = (above > 0).scatter_(1, positive[:, None], False)
    assert 0.1 < float(excluded.double().mean()) < 0.7
    return excluded


def distance_to_teacher(query: torch.Tensor, document: torch.Tensor, records: Sequence[Any]) -> torch.Tensor:
    """The mean over all texts of 1 - cosine with the teacher's vector."""
    teacher = vectors_of([*(record.query for record in records), *_documents(records)], query.shape[1], TEACHER)
    return 1 - functional.cosine_similarity(torch.cat([query, document]), teacher, dim=1).mean()
