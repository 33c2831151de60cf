from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from megatron_embed.batch import MicroBatch
from megatron_embed.config.schema import TrainFile
from megatron_embed.data.dataset import open_records
from megatron_embed.data.packing import (
    DocumentsPerQuery,
    PackingSpec,
    build_embed_batch,
    build_encode_batches,
    pack,
    padding_fraction,
)
from megatron_embed.data.records import Record, text_id
from megatron_embed.data.tokenizer import RoleTokenizer
from megatron_embed.errors import ConfigError, DataError, UserError
from tests.data.conftest import MINI_EN, MINI_ZH, real_texts


@pytest.fixture(scope="module")
def tokenizer(minilm_dir: str) -> RoleTokenizer:
    return RoleTokenizer(minilm_dir, add_eos=False, query_prompt="query: ", query_max_length=24, document_max_length=64)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return list(open_records((TrainFile(path=str(MINI_EN)),)))[:6]


def record(query: str, *documents: str, **fields: object) -> Record:
    return replace(Record(query=query, positive=documents[:1], negatives=documents[1:], instruction=None,
                          source="rows.jsonl:1"), **fields)


def sequences(micro_batch: MicroBatch) -> list[list[int]]:
    bounds = micro_batch.cu_seqlens.tolist()
    return [micro_batch.token_ids[a:b].tolist() for a, b in pairwise(bounds)]


def test_pack_by_hand():
    bin_ = pack([[5, 6, 7], [8], [9, 10]], [4, 0, 2], tokens=None, alignment=4, pad_token_id=1)
    assert bin_.token_ids.tolist() == [5, 6, 7, 8, 9, 10, 1, 1]
    assert bin_.position_ids.tolist() == [0, 1, 2, 0, 0, 1, 0, 0]
    assert bin_.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert bin_.rows.tolist() == [4, 0, 2]
    assert (bin_.num_sequences, bin_.num_tokens) == (3, 6)
    assert padding_fraction([bin_]) == 0.25
    assert {bin_.token_ids.dtype, bin_.position_ids.dtype, bin_.rows.dtype} == {torch.int64}
    assert bin_.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize(("tokens", "alignment", "size"), [(None, 1, 6), (None, 2, 6), (None, 7, 7), (6, 1, 6),
                                                           (16, 8, 16)])
def test_pack_sizes(tokens: int | None, alignment: int, size: int):
    bin_ = pack([[1] * 6], [0], tokens=tokens, alignment=alignment, pad_token_id=0)
    assert bin_.token_ids.numel() == bin_.position_ids.numel() == size


@pytest.mark.parametrize(("tokens", "alignment"), [(5, 1), (10, 4)])
def test_pack_refuses_a_size_that_does_not_fit(tokens: int, alignment: int):
    with pytest.raises(ValueError, match=f"a bin of {tokens} tokens, alignment {alignment}, cannot hold 6 tokens"):
        pack([[1] * 6], [0], tokens=tokens, alignment=alignment, pad_token_id=0)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 6])
@pytest.mark.parametrize("num_negatives", [0, 1, 3])
def test_embed_batch_holds_every_text_where_its_numbers_say(records: list[Record], tokenizer: RoleTokenizer,
                                                            micro_batch_size: int, num_negatives: int):
    batch = build_embed_batch(records, tokenizer, PackingSpec(micro_batch_size=micro_batch_size, alignment=8),
                              DocumentsPerQuery(negatives=num_negatives))
    groups = [[r.positive[0], *r.negatives[:num_negatives]] for r in records]
    documents = [text for group in groups for text in group]
    assert (batch.num_queries, batch.num_documents, batch.num_rows) == (6, len(documents), 6 + len(documents))
    assert [documents[i] for i in batch.positive_index] == [r.positive[0] for r in records]
    assert batch.document_query.tolist() == [q for q, group in enumerate(groups) for _ in group]
    assert batch.query_ids.tolist() == [text_id(tokenizer.fill_prompt("query") + r.query) for r in records]
    assert batch.document_ids.tolist() == [text_id(text) for text in documents]

    expected = (tokenizer.tokenize([r.query for r in records], "query").token_ids
                + tokenizer.tokenize(documents, "document").token_ids)
    assert len(batch.micro_batches) == 6 // micro_batch_size
    tokens_of_row: dict[int, list[int]] = {}
    for index, micro_batch in enumerate(batch.micro_batches):
        rows = micro_batch.rows.tolist()
        queries = [row for row in rows if row < 6]
        assert queries == list(range(index * micro_batch_size, (index + 1) * micro_batch_size))
        assert rows == sorted(rows)
        assert {batch.document_query[row - 6].item() for row in rows if row >= 6} == set(queries)
        assert micro_batch.token_ids.numel() % 8 == 0
        assert micro_batch.token_ids.numel() - micro_batch.num_tokens < 8
        tokens_of_row.update(zip(rows, sequences(micro_batch), strict=True))
    assert [tokens_of_row[row] for row in range(batch.num_rows)] == expected


def test_rows_with_fewer_negatives_contribute_what_they_have(tokenizer: RoleTokenizer):
    rows = [record("a", "p1", "n1", "n2", "n3"), record("b", "p2"), record("c", "p3", "n4")]
    rows[2] = replace(rows[2], positive=("p3", "another positive"))
    batch = build_embed_batch(rows, tokenizer, PackingSpec(micro_batch_size=2), DocumentsPerQuery(negatives=2))
    assert batch.document_ids.tolist() == [text_id(text) for text in ("p1", "n1", "n2", "p2", "p3", "n4")]
    assert batch.positive_index.tolist() == [0, 3, 4]
    assert batch.document_query.tolist() == [0, 0, 0, 1, 2, 2]
    assert [m.rows.tolist() for m in batch.micro_batches] == [[0, 1, 3, 4, 5, 6], [2, 7, 8]]
    assert batch.num_truncated == 0


def test_positives_travel_with_their_queries(tokenizer: RoleTokenizer):
    rows = [record("a", "p1", "n1"), record("b", "p2"), record("c", "p3")]
    rows[0] = replace(rows[0], positive=("p1", "p4", "p5"))
    batch = build_embed_batch(rows, tokenizer, PackingSpec(micro_batch_size=2),
                              DocumentsPerQuery(negatives=2, most_positives=2))
    assert batch.positive_query.tolist() == [0, 0, 1, 2]
    assert batch.positive_ids.tolist() == [text_id(text) for text in ("p1", "p4", "p2", "p3")]
    assert batch.capacity == (3, 9, 6)
    assert batch.micro_capacity == (2, 6, 4)


def test_uniform_size_gives_the_bins_of_a_step_one_size(records: list[Record], tokenizer: RoleTokenizer):
    sizes = {}
    for constant in (False, True):
        batch = build_embed_batch(records, tokenizer, PackingSpec(alignment=4, uniform_size=constant),
                                  DocumentsPerQuery(negatives=1))
        sizes[constant] = [m.token_ids.numel() for m in batch.micro_batches]
    assert len(set(sizes[False])) > 1
    assert sizes[True] == [max(sizes[False])] * 6


def test_truncated_rows_of_both_roles_are_counted(records: list[Record], minilm_dir: str):
    tokenizer = RoleTokenizer(minilm_dir, add_eos=False, query_max_length=14, document_max_length=64)
    queries = [len(ids) for ids in _whole([r.query for r in records], minilm_dir)]
    documents = [len(ids) for ids in _whole([text for r in records for text in (r.positive[0], *r.negatives[:1])],
                                            minilm_dir)]
    longer_queries, longer_documents = sum(n > 14 for n in queries), sum(n > 64 for n in documents)
    assert 0 < longer_queries < len(queries)
    assert longer_documents > 0
    batch = build_embed_batch(records, tokenizer, PackingSpec(micro_batch_size=6), DocumentsPerQuery(negatives=1))
    assert batch.num_truncated == longer_queries + longer_documents


def _whole(texts: list[str], model_dir: str) -> list[list[int]]:
    tokenizer = RoleTokenizer(model_dir, add_eos=False, query_max_length=10**6, document_max_length=10**6)
    return tokenizer.tokenize(texts, "query").token_ids


def test_instructions_reach_the_query(bpe_dir: str):
    tokenizer = RoleTokenizer(bpe_dir, add_eos=False, query_prompt="{instruction}: ", query_max_length=64,
                              document_max_length=64)
    rows = [record("a", "p", instruction="find"), record("b", "p", instruction="judge")]
    batch = build_embed_batch(rows, tokenizer, PackingSpec(micro_batch_size=2), DocumentsPerQuery())
    expected = tokenizer.tokenize(["a", "b"], "query", ["find", "judge"]).token_ids
    assert sequences(batch.micro_batches[0])[:2] == expected
    assert expected[0][:-1] != expected[1][:-1]
    with pytest.raises(ConfigError, match="needs an instruction and the row has none"):
        build_embed_batch([record("a", "p")], tokenizer, PackingSpec(), DocumentsPerQuery())


def test_a_text_without_tokens_is_refused(bpe_dir: str):
    tokenizer = RoleTokenizer(bpe_dir, add_eos=False, query_max_length=64, document_max_length=64)
    message = r"rows\.jsonl:1: the text '' has no tokens in this tokenizer.*; remove the row"
    with pytest.raises(DataError, match=message):
        build_embed_batch([record("a", "p"), record("b", "p", "")], tokenizer, PackingSpec(),
                          DocumentsPerQuery(negatives=1))
    with pytest.raises(UserError, match="document text number 2: the text '' has no tokens in this tokenizer"):
        build_encode_batches(["a", ""], "document", tokenizer, PackingSpec(micro_batch_tokens=8))


@pytest.mark.parametrize("role", ["query", "document"])
@pytest.mark.parametrize("constant", [True, False])
def test_encode_batches_hold_every_text_once_within_the_budget(tokenizer: RoleTokenizer, role: str,
                                                               constant: bool):
    texts = [*real_texts(MINI_ZH, 40), *real_texts(MINI_EN, 40)]
    batches = build_encode_batches(texts, role, tokenizer,
                                   PackingSpec(micro_batch_tokens=300, alignment=16, uniform_size=constant))
    expected = tokenizer.tokenize(texts, role).token_ids
    rows = [row for micro_batch in batches for row in micro_batch.rows.tolist()]
    assert sorted(rows) == list(range(160))
    assert [ids for micro_batch in batches for ids in sequences(micro_batch)] == [expected[row] for row in rows]
    sizes = [micro_batch.token_ids.numel() for micro_batch in batches]
    assert len(batches) > 3
    assert max(sizes) <= 300
    assert all(size % 16 == 0 for size in sizes)
    assert not constant or len(set(sizes)) == 1
    lengths = [len(expected[row]) for row in rows]
    assert lengths == sorted(lengths, reverse=True)
    assert padding_fraction(batches) < 0.2


def test_a_text_longer_than_the_budget_has_a_bin_of_its_own(tokenizer: RoleTokenizer):
    batches = build_encode_batches(["word " * 50, "a", "b"], "document", tokenizer,
                                   PackingSpec(micro_batch_tokens=10, alignment=4))
    assert [micro_batch.rows.tolist() for micro_batch in batches] == [[0], [1, 2]]
    assert [micro_batch.token_ids.numel() for micro_batch in batches] == [52, 8]
    assert build_encode_batches([], "query", tokenizer,
                                PackingSpec(micro_batch_tokens=9, alignment=4, uniform_size=True)) == ()
    assert padding_fraction([]) == 0.0


def test_cut_texts_are_said_once(tokenizer: RoleTokenizer, caplog: pytest.LogCaptureFixture):
    """Every evaluation of a run embeds the same texts; another number of them is news."""
    packing, long = PackingSpec(micro_batch_tokens=300), "word " * 500
    tokenizer.notices.clear()
    with caplog.at_level("INFO", logger="megatron_embed"):
        for texts in ([long, "a"], [long, "a"], [long]):
            build_encode_batches(texts, "document", tokenizer, packing)
    assert [entry.getMessage() for entry in caplog.records] == [
        f"1 of {count} document texts truncated to the maximum length" for count in (2, 1)]
