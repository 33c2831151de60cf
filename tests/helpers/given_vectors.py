"""Rows and a model for mining whose vectors are known."""

from collections import defaultdict

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers.util import cos_sim, mine_hard_negatives, pairwise_cos_sim
from torch.nn.functional import normalize

from megatron_embed.data.records import Record

DIM = 12

def vector(text):
    """The vector of a text, the same in every call; related texts ("q3", "d3.1") are near each other."""
    query_id = int(text[1:].split(".")[0])
    common = np.random.default_rng(query_id).standard_normal(DIM)
    own = np.random.default_rng(sum(text.encode()) * 7919 + query_id).standard_normal(DIM)
    return (common + own).astype(np.float32)


class GivenVectors:
    """As much of a SentenceTransformer as mining uses."""

    device = torch.device("cpu")
    similarity = staticmethod(cos_sim)
    similarity_pairwise = staticmethod(pairwise_cos_sim)

    def encode_document(self, texts, **options):
        assert options["normalize_embeddings"]
        return normalize(torch.from_numpy(np.stack([vector(text) for text in texts])), dim=1).numpy()

    encode_query = encode_document


def rows():
    """40 queries, some in several rows, with one to three positives, some of which several queries share."""
    records = []
    for query_id in range(40):
        positives = tuple(f"d{query_id}.{copy}" for copy in range(1 + query_id % 3))
        records.append(record(f"q{query_id}", positives))
        if query_id % 7 == 0:
            records.append(record(f"q{query_id}", (f"d{query_id + 1}.0",)))
    return records


def record(query, positive, negatives=(), instruction=None):
    return Record(query=query, positive=positive, negatives=negatives, instruction=instruction, source=f"{query}:1")

CORPUS = [f"d{query_id}.{copy}" for query_id in range(60) for copy in range(3, 6)]

def theirs(records, corpus, **options):
    """query -> negatives, best first."""
    pairs = [(row.query, text) for row in records for text in row.positive]
    data = Dataset.from_dict({"anchor": [query for query, _ in pairs], "positive": [text for _, text in pairs]})
    mined = mine_hard_negatives(data, GivenVectors(), corpus=corpus, verbose=False, **options)
    negatives_of_query = defaultdict(dict)
    for row in mined:
        negatives_of_query[row["anchor"]].setdefault(row["negative"])
    return {query: list(negatives) for query, negatives in negatives_of_query.items()}
