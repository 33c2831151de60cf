"""Lists to batches of pairs: which negatives, which micro-batch, nothing lost."""

import json

import pytest
import torch

from megatron_embed.config.schema import TrainFile
from megatron_embed.data.dataset import open_records
from megatron_embed.data.loader import RerankLoader
from megatron_embed.data.packing import PackingSpec
from megatron_embed.data.pair_batches import (
    build_rerank_batch,
    group_size,
    pairs_of,
    sample_negatives,
    split_rerank_to_count,
)
from megatron_embed.data.pair_tokenizer import PairTemplate, PairTokenizer
from megatron_embed.data.records import RerankRecord
from megatron_embed.data.sampler import GlobalBatchSampler
from tests.helpers.toys import MINILM

LABELS = (0, 2, 0, 0, 1, 0, -1, 0)
SIZES = (1, 8, 3, 5)


@pytest.fixture(scope="module")
def tokenizer():
    return PairTokenizer(str(MINILM), template=PairTemplate(text="[CLS] {query} [SEP] {document} [SEP]"), max_length=32)


def record(size=8, teacher=True):
    return RerankRecord(query="which one", documents=tuple(f"document number {index}" for index in range(size)),
                        labels=tuple(map(float, LABELS[:size])), instruction=None, source="rows:1",
                        teacher_scores=tuple(map(float, range(size))) if teacher else None)


def test_negatives_are_sampled_again_and_positives_stay():
    whole, sampled = record(), set()
    for step in range(40):
        smaller = sample_negatives(whole, 2, (7, step, 3))
        assert smaller == sample_negatives(whole, 2, (7, step, 3))
        indices = [whole.documents.index(document) for document in smaller.documents]
        assert indices == sorted(indices) and {1, 4} <= set(indices) and len(indices) == 4 == group_size(whole, 2)
        assert smaller.labels == tuple(whole.labels[index] for index in indices)
        assert smaller.teacher_scores == tuple(float(index) for index in indices)
        sampled |= set(indices)
    assert sampled == set(range(len(LABELS)))
    assert sample_negatives(whole, 2, None).documents == tuple(whole.documents[index] for index in (0, 1, 2, 4))
    assert sample_negatives(whole, 0, (1,)) is whole and sample_negatives(whole, 6, (1,)) is whole


def test_loader_samples_by_row_and_step_whatever_the_ranks(tmp_path, tokenizer):
    rows = [{"query": f"question {row}", "positive": [f"answer {row}"],
             "negatives": [f"wrong {row} {index}" for index in range(5)]} for row in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = open_records((TrainFile(path=str(tmp_path / "rows.jsonl")),), "rerank")
    sampler = GlobalBatchSampler(records, global_batch_size=4, shuffle=True, seed=3)

    def pairs(rank, ranks, step):
        with RerankLoader(records, sampler, tokenizer, PackingSpec(), dp_rank=rank, dp_size=ranks, num_negatives=2,
                          seed=3) as loader:
            batch = loader.batch(step)
        assert batch.group_sizes == (3,) * (4 // ranks) and batch.labels.tolist() == [1, 0, 0] * (4 // ranks)
        return [micro.token_ids.tolist() for micro in batch.micro_batches]

    for step in (0, 1, 5):
        assert pairs(0, 1, step) == pairs(0, 2, step) + pairs(1, 2, step)
    by_row = {}
    for step in range(0, 8, 2):
        for ids in pairs(0, 1, step) + pairs(0, 1, step + 1):
            by_row.setdefault(tuple(ids[:4]), set()).add(tuple(ids))
    assert len(by_row) == 8 and max(map(len, by_row.values())) > 1, "every epoch drew the same negatives"


@pytest.mark.parametrize("tokens", [None, 96])
def test_a_query_stays_whole(tokenizer, tokens):
    records = [record(size) for size in SIZES]
    packing = PackingSpec(micro_batch_size=2, alignment=4, uniform_size=True, micro_batch_tokens=tokens)
    batch = build_rerank_batch(records, tokenizer, packing)
    assert batch.group_sizes == SIZES and batch.num_documents == sum(SIZES) == len(batch.labels)
    count = len(batch.micro_batches)
    for filled in (batch, split_rerank_to_count(batch, count + 1), split_rerank_to_count(batch, 9)):
        assert len({micro.token_ids.numel() for micro in filled.micro_batches}) == 1
        owner = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
        held = [micro.valid_rows.tolist() for micro in filled.micro_batches]
        assert sorted(row for rows in held for row in rows) == list(range(sum(SIZES)))
        queries = [set(owner[rows].tolist()) for rows in held]
        assert sum(map(len, queries)) == len(SIZES)
    assert sum(micro.repeated for micro in filled.micro_batches) == 9 - len(SIZES)


def test_token_types_reach_the_micro_batch():
    encoder = PairTokenizer(str(MINILM), template=None, max_length=32)
    batch = build_rerank_batch([record(2, teacher=False)], encoder, PackingSpec(alignment=16))
    (micro,) = batch.micro_batches
    rows = encoder.tokenize(pairs_of(record(2)))
    assert micro.token_types[: micro.num_tokens].tolist() == rows.token_types[0] + rows.token_types[1]
    assert not micro.token_types[micro.num_tokens :].any() and batch.teacher_scores is None
