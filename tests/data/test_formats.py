"""Rows of every trainer that is recognised are the same rows as ours; what is not quite one is refused by its line."""

import dataclasses
import gzip
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_embed.config.schema import TrainFile
from megatron_embed.data.dataset import RecordFile, RecordSet, open_records
from megatron_embed.data.formats import RowReader
from megatron_embed.data.packing import DocumentsPerQuery, PackingSpec, build_embed_batch
from megatron_embed.data.records import Record, RerankRecord
from megatron_embed.data.row_source import open_rows
from megatron_embed.data.tokenizer import RoleTokenizer
from megatron_embed.errors import ConfigError, DataError
from tests.helpers.foreign_rows import FORMATS, INSTRUCTION, WITH_INSTRUCTION, as_lines, message, our_rows

WriteRows = Callable[..., str]


def written(name: str, folder: Path) -> RecordSet:
    return open_records((FORMATS[name](folder, our_rows()),))


def batch_tensors(records: RecordSet, minilm_dir: str, prompt: str) -> list[torch.Tensor]:
    tokenizer = RoleTokenizer(minilm_dir, add_eos=False, query_max_length=48, document_max_length=64,
                              query_prompt=prompt)
    batch = build_embed_batch(list(records), tokenizer, PackingSpec(micro_batch_size=4, alignment=8),
                              DocumentsPerQuery(negatives=1))
    return [*(micro.token_ids for micro in batch.micro_batches), *(micro.rows for micro in batch.micro_batches),
            batch.positive_index, batch.document_query, batch.query_ids, batch.document_ids]


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_every_format_make_the_batch_of_the_same_rows_in_ours(name: str, tmp_path: Path, minilm_dir: str,
                                                                     write_rows: WriteRows):
    records = written(name, tmp_path)
    ours = open_records((TrainFile(path=write_rows(our_rows(), "ours.jsonl")),))
    assert len(records) == len(ours) == 12
    for record, expected in zip(records, ours, strict=True):
        assert (record.query, record.positive, record.negatives) == (
            expected.query, expected.positive, expected.negatives)
        assert record.instruction == (INSTRUCTION if name in WITH_INSTRUCTION else None)
        assert record.score is None
    prompt = "Instruct: {instruction}\nQuery:" if name in WITH_INSTRUCTION else "query: "
    for mine, theirs in zip(batch_tensors(records, minilm_dir, prompt), batch_tensors(ours, minilm_dir, prompt),
                            strict=True):
        assert torch.equal(mine, theirs)


def read_twice(file: TrainFile) -> tuple[list[object], list[object]]:
    """The records of a file's rows, read with all checks, and trusted, one reader for both."""
    reader = RowReader(file, None)
    rows = list(open_rows(file.path, "data.train", streaming=file.streaming).scan())
    return [reader.read(*row) for row in rows], [reader.read(*row, trusted=True) for row in rows]


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "beir"])
def test_a_trusted_row_gives_the_record_of_a_checked_one(name: str, tmp_path: Path):
    checked, trusted = read_twice(FORMATS[name](tmp_path, our_rows()))
    assert len(checked) == 12
    assert trusted == checked


@pytest.mark.parametrize("row", [
    {"query": "q", "positive": "p", "negatives": None, "instruction": None, "teacher_scores": [1]},
    {"query": "q", "positive": ["p"], "negatives": "n", "positive_ids": [1], "negative_ids": ["b"]},
    {"text_a": "a", "text_b": "b", "score": 1, "instruction": "i"},
    {"query": "q", "documents": ["a", "b"], "labels": [1, 0.5], "document_ids": [7, "b"], "teacher_scores": [2, 3]},
    {"query": "q", "docs": ["a", "b"], "labels": [1, 0]},
    {"query": "q", "docs": [{"text": "a", "title": "t", "label": 1}, {"text": "b", "label": 0}]},
    {"query": "q", "response": "r", "label": 1, "system": "s"},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], "label": None,
     "positive_messages": [[{"role": "assistant", "content": "p"}]], "negative_messages": None},
    {"query": "q", "pos": ["p"], "neg": "n", "pos_id": [1], "neg_id": ["x"], "prompt": "", "pos_scores": [2],
     "neg_scores": [1]},
    {"query": "q", "positive_passages": [{"text": "p", "title": " ", "docid": 4}],
     "negative_passages": [{"text": "n", "title": "t", "docid": ""}]},
    {"query": "q", "positive": "p", "negative": None, "negative_1": ["n", "m"], "score": [1, 2, 3]},
    {"anchor": "a", "positive": "p", "negative_2": "n", "label": 3, "instruction": None},
    {"question": "q", "positive_ctxs": [{"text": "p", "passage_id": 3}], "hard_negative_ctxs": None,
     "negative_ctxs": [{"text": "n", "psg_id": "4", "title": "t"}]},
    {"question": "q", "pos_doc": {"text": "p", "title": None}, "neg_doc": ["n", {"text": "m"}]},
], ids=lambda row: "-".join(row)[:40])
def test_a_trusted_row_of_unusual_values_gives_the_record_of_a_checked_one(row: dict[str, object],
                                                                           write_rows: WriteRows):
    checked, trusted = read_twice(TrainFile(path=write_rows([row])))
    assert trusted == checked
    assert len(checked) == 1


@pytest.mark.parametrize("name", ["tevatron-passages", "ours"])
@pytest.mark.parametrize("packing", ["", ".gz"])
def test_a_row_changed_after_the_check_is_refused(name: str, packing: str, tmp_path: Path, write_rows: WriteRows):
    """Whatever the new row is: one that could be used is refused as well, and so is one of the same length."""
    rows = our_rows() if name == "ours" else [
        json.loads(line) for line in Path(FORMATS[name](tmp_path, our_rows()).path).read_text("utf-8").splitlines()]
    path = Path(write_rows(rows, "rows.jsonl"))
    written = path.read_bytes()
    if packing:
        path = path.with_name("rows.jsonl.gz")
        path.write_bytes(gzip.compress(written))
    records = RecordFile(str(path))
    if not packing:
        assert records[1].query == rows[1]["query"]
    changed = written.replace(b'"query"', b'"quarz"', 1)
    path.write_bytes(gzip.compress(changed) if packing else changed)
    later = path.stat().st_mtime_ns + 10**7
    os.utime(path, ns=(later, later))
    with pytest.raises(DataError, match="the file was changed after it was checked; start the run again"):
        records[2]


def test_rows_of_a_table_are_checked_at_every_access(tmp_path: Path):
    """Nothing says whether the file behind a memory-mapped table changed."""
    records = RecordFile(FORMATS["parquet"](tmp_path, our_rows()))
    records._rows._table = records._rows._table.map(lambda row: {"query": ""})
    with pytest.raises(DataError, match="query = '' is empty"):
        records[0]


@pytest.mark.parametrize(("name", "scores"), [
    ("flag-embedding", (0.9, 0.1)), ("tevatron-scores", (7.5, -1.0)), ("st-anchor", None)])
def test_scores_of_a_teacher(name: str, scores: tuple[float, ...] | None, tmp_path: Path):
    assert {record.teacher_scores for record in written(name, tmp_path)} == {scores}


@pytest.mark.parametrize(("name", "ids"), [
    ("tevatron-passages", ("2", "3")), ("tevatron-ids", ("2", "3")), ("tevatron-scores", ("2", "3")),
    ("dpr", ("p1", "n1")), ("beir", ("d11", "d10")), ("nemo", None)])
def test_ids_of_documents(name: str, ids: tuple[str, ...] | None, tmp_path: Path):
    assert written(name, tmp_path)[1].document_ids == ids


def test_the_format_is_said_once_per_file(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        written("flag-embedding", tmp_path)
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"{tmp_path}/rows.jsonl: 12 rows of the format FlagEmbedding (query, pos, neg)"]


PAIRS: list[dict[str, object]] = [
    {"text_a": "a", "text_b": "b", "score": 3.2}, {"sentence1": "a", "sentence2": "b", "score": 3.2},
    {"sentence1": "a", "sentence2": "b", "label": 3.2}, {"anchor": "a", "positive": "b", "labels": 3.2},
    {"query": "a", "positive": "b", "label": 3.2}, {"query": "a", "response": "b", "label": 3.2},
    {"messages": [message("a")], "positive_messages": [[message("b")]], "label": 3.2}]


@pytest.mark.parametrize("row", PAIRS, ids=lambda row: "-".join(row))
def test_pairs_with_a_score(row: dict[str, object], write_rows: WriteRows):
    path = write_rows([row])
    assert RecordFile(path, "pairs")[0] == Record(query="a", positive=("b",), negatives=(), instruction=None,
                                                  source=f"{path}:1", score=3.2)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the row is a pair with a score, and this objective\.loss"):
        RecordFile(path)
    listed = RecordFile(path, "rerank")[0]
    assert (listed.documents, listed.labels) == (("b",), (3.2,))


def test_rows_without_a_score_are_no_pairs(write_rows: WriteRows):
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the row is not a pair with a score, which this"):
        RecordFile(write_rows([{"query": "a", "positive": "b"}]), "pairs")


def test_lists_with_labels(write_rows: WriteRows):
    rows = [{"query": "q", "documents": ["a", "b", "c", "d"], "labels": [0, 2, -1, 3], "teacher_scores": [1, 2, 3, 4],
             "instruction": "find", "document_ids": ["i", "j", "k", 7], "query_id": 1}]
    path = write_rows(rows)
    (record,) = RecordFile(path, "rerank")
    assert record == RerankRecord(query="q", documents=("a", "b", "c", "d"), labels=(0, 2, -1, 3), instruction="find",
                                  source=f"{path}:1", teacher_scores=(1, 2, 3, 4), document_ids=("i", "j", "k", "7"))
    (record,) = RecordFile(path)
    assert record == Record(query="q", positive=("d", "b"), negatives=("a", "c"), instruction="find",
                            source=f"{path}:1", teacher_scores=(4, 2, 1, 3), document_ids=("7", "j", "i", "k"))


def test_a_reranker_takes_positives_and_negatives_as_labels(write_rows: WriteRows):
    (record,) = RecordFile(write_rows([{"query": "q", "positive": ["a", "b"], "negatives": ["c"],
                                        "teacher_scores": [3, 2, 1]}]), "rerank")
    assert (record.documents, record.labels, record.teacher_scores) == (("a", "b", "c"), (1, 1, 0), (3, 2, 1))


@pytest.mark.parametrize(("extra", "scores"), [
    ({"label": 0.5}, (0, -0.5)), ({"label": [0.5]}, (0, -0.5)), ({"score": [2, 1.5]}, (2, 1.5)),
    ({"negative_2": "o", "labels": [1, 2]}, (0, -1, -2)), ({"negative_2": "o", "scores": [3, 2, 1]}, (3, 2, 1))])
def test_labels_beside_negatives_are_a_teachers(extra: dict[str, object], scores: tuple[float, ...],
                                               write_rows: WriteRows):
    (record,) = RecordFile(write_rows([{"anchor": "a", "positive": "p", "negative_1": "n", **extra}]))
    assert record.teacher_scores == scores
    assert record.score is None
    assert len(record.negatives) == len(scores) - 1


def test_what_an_entry_says_of_its_rows(write_rows: WriteRows):
    path = write_rows([{"query": "a", "positive": "b"}, {"query": "a", "positive": "b", "instruction": "own"}])
    for kind in ("contrastive", "rerank"):
        file = RecordFile(TrainFile(path=path, instruction="find", query_prompt="q: ", document_prompt=""), kind)
        assert [(r.instruction, r.query_prompt, r.document_prompt) for r in file] == [("find", "q: ", ""),
                                                                                     ("own", "q: ", "")]


ST = {"anchor": "a", "positive": "b"}
FLAG = {"query": "q", "pos": ["p"], "neg": ["n"]}
TEVATRON = {"query": "q", "positive_passages": [{"text": "p"}]}
SWIFT = {"messages": [message("q")], "positive_messages": [[message("p")]]}
LIST = {"query": "q", "documents": ["a"], "labels": [1]}
RESPONSE = {"query": "q", "response": "p"}
REFUSED: list[tuple[dict[str, object], dict[str, object], str]] = [
    (FLAG, {**FLAG, "pos": []}, r"pos = \[\] is empty"),
    (FLAG, {**FLAG, "neg": ["n", ""]}, r"neg\[1\] = '' is empty"),
    (FLAG, {**FLAG, "pos_scores": [1]}, "pos_scores is given without neg_scores"),
    (FLAG, {**FLAG, "pos_scores": [1, 2], "neg_scores": [1]}, "pos_scores has 2 numbers for 1 texts of pos; give one"),
    (FLAG, {**FLAG, "pos_scores": ["x"], "neg_scores": [1]}, r"pos_scores\[0\] = 'x' is a JSON string; it must be a n"),
    (FLAG, {**FLAG, "prompt": 3}, "prompt = 3 is a JSON number"),
    (FLAG, {"query": "q", "pos": ["p"], "negs": ["n"]}, r"unknown key 'negs' = \['n'\]; did you mean 'neg'"),
    (FLAG, {"query": "q", "response": "p"}, r"a row of the format ms-swift \(query, response\) in a file whose first"),
    (FLAG, {"query": "q"}, "pos is missing; the row has 'query'; add 'pos'"),
    (TEVATRON, {"query": "q", "positive_passages": []}, r"positive_passages = \[\] is empty"),
    (TEVATRON, {"query": "q", "positive_passages": ["p"]}, r"positive_passages\[0\] = 'p' is a JSON string; it must"),
    (TEVATRON, {"query": "q", "positive_passages": [{"title": "t"}]}, r"positive_passages\[0\].text is missing"),
    (TEVATRON, {"query": "q", "positive_passages": [{"text": ""}]}, r"positive_passages\[0\].text = '' is empty"),
    (TEVATRON, {"query": "q", "positive_passages": [{"text": "p", "title": 1}]}, r"\[0\].title = 1 is a JSON number"),
    (TEVATRON, {"query": "q", "positive_passages": "p"}, "positive_passages = 'p': it must be a list of passages"),
    (SWIFT, {**SWIFT, "positive_messages": [message("p")]}, r"positive_messages\[0\] = .* must be a list of message"),
    (SWIFT, {**SWIFT, "positive_messages": []}, r"positive_messages = \[\] is empty"),
    (SWIFT, {**SWIFT, "messages": [message("a"), message("b", "assistant")]}, "messages holds 2 messages beside the"),
    (SWIFT, {**SWIFT, "messages": [message("a", "tool")]}, r"messages\[0\].role = 'tool': it must be user or assist"),
    (SWIFT, {**SWIFT, "messages": [message([{"type": "image"}])]}, r"messages\[0\].content = .* is a JSON array"),
    (SWIFT, {**SWIFT, "messages": [message("", "system"), message("q")]}, r"messages\[0\].content = '' is empty"),
    (SWIFT, {**SWIFT, "positive_messages": [[message("i", "system"), message("p")]]}, r"\[0\]\[0\].role = 'system'"),
    (SWIFT, {**SWIFT, "negative_messages": [[message("n")]], "label": 1}, "label is given with 1 positives and 1 nega"),
    (RESPONSE, {**RESPONSE, "history": [["a", "b"]]}, "history = .* a conversation of several turns is not a query"),
    (RESPONSE, {**RESPONSE, "label": 1, "rejected_response": ["n"]}, "label and rejected_response are both given"),
    (RESPONSE, {**RESPONSE, "response": ["a", "b"], "label": 1}, "response has 2 texts and one label"),
    (ST, {**ST, "negatives": ["n"]}, r"unknown key 'negatives' = \['n'\]; did you mean 'negative'"),
    (ST, {**ST, "negative_1": 3}, "negative_1 = 3: it must be a string"),
    (ST, {**ST, "label": 1, "score": 2}, "label and score are both given; keep one"),
    (ST, {**ST, "negative": "n", "label": [1, 2, 3]}, "label has 3 numbers for 2 documents"),
    (ST, {**ST, "negative": "n", "label": True}, "label = True is a JSON boolean; it must be a number"),
    (LIST, {**LIST, "labels": [1, 0]}, "labels has 2 numbers for 1 documents; give one for each"),
    (LIST, {**LIST, "labels": [10**400]}, r"labels\[0\] = 1000.* is not finite"),
    (LIST, {**LIST, "labels": 1}, "labels = 1: it must be a list of numbers"),
    (LIST, {**LIST, "documents": [], "labels": []}, r"documents = \[\] is empty"),
    (LIST, {**LIST, "labels": [0]}, "no document of the row has a label above 0, so it has no positive"),
    (LIST, {**LIST, "document_ids": ["a", "b"]}, "document_ids has 2 ids for 1 documents"),
    ({"query": "q", "docs": [{"text": "a", "label": 1}]}, {"query": "q", "docs": [{"text": "a"}]},
     r"docs\[0\].label is missing"),
    ({"query": "q", "docs": ["a"], "labels": [1]}, {"query": "q", "docs": ["a"]}, "labels is missing"),
    ({"query": "q", "docs": ["a"], "labels": [1]}, {"query": "q", "docs": []}, r"docs = \[\]: it must be a list of at"),
    ({"query": "a", "positive": "b"}, {"query": "a", "positive": "b", "positive_ids": ["i", "j"]},
     "positive_ids has 2 ids for 1 texts"),
    ({"query": "a", "positive": "b"}, {"query": "a", "positive": "b", "teacher_scores": [1, 2]},
     "teacher_scores has 2 numbers for 1 texts of positive and negatives"),
    ({"question": "q", "positive_ctxs": [{"text": "p"}]}, {"question": "q", "positive_ctxs": []},
     r"positive_ctxs = \[\] is empty"),
    ({"query": "q", "pos_doc": "p"}, {"query": "q", "pos_doc": ["p"], "neg_doc": [1]}, r"neg_doc\[0\] = 1 is a JSON n"),
    ({"query": "q", "passages": [{"text": "p"}], "scores": [1]}, {"query": "q", "passages": [{"text": "p"}],
                                                                  "scores": []}, "scores has 0 numbers for 1 passages")]


@pytest.mark.parametrize(("first", "bad", "words"), REFUSED, ids=[words[:50] for *_, words in REFUSED])
def test_a_bad_row_of_a_peer_is_refused_with_its_line(first: dict[str, object], bad: dict[str, object], words: str,
                                                     write_rows: WriteRows):
    path = write_rows([first, "", bad])
    with pytest.raises(DataError, match=words) as caught:
        RecordFile(path)
    assert str(caught.value).startswith(f"{path}:3: ")


def test_a_bad_row_of_a_table_is_named_by_its_number(tmp_path: Path):
    import datasets

    rows = [{"anchor": "a", "positive": "b"}, {"anchor": "c", "positive": ""}]
    path = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).to_parquet(path)
    with pytest.raises(DataError, match=r"rows\.parquet:2: positive = '' is empty"):
        RecordFile(path)
    datasets.Dataset.from_list([{"text_a": "a", "text_b": "b", "score": float("nan")}]).to_parquet(path)
    with pytest.raises(DataError, match=r"rows\.parquet:1: score = nan is not finite"):
        RecordFile(path, "pairs")


def test_tables_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ConfigError, match=r"data.train = .*rows\.parquet': cannot be read: .*name a \.parquet or"):
        RecordFile(str(tmp_path / "rows.parquet"))
    table = datasets.Dataset.from_list([{"anchor": "a", "positive": "b"}])
    datasets.DatasetDict({"train": table, "dev": table}).save_to_disk(tmp_path / "both")
    with pytest.raises(ConfigError, match=r"both': holds the splits train, dev; name the directory of one of them"):
        RecordFile(str(tmp_path / "both"))
    assert len(RecordFile(str(tmp_path / "both" / "dev"))) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty': a directory without a file of rows .* neither a BEIR folder .* nor "
                                          "saved by.*README"):
        RecordFile(str(tmp_path / "empty"))

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no way\nout")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ConfigError, match=r"data.train = 'org/name:de': cannot be read: no way; name a"):
        RecordFile("org/name:de")


@pytest.mark.parametrize(("path", "config", "split"), [
    ("org/name", None, "train"), ("org/name:de", "de", "train"), ("org/na.me:de/dev", "de", "dev")])
def test_hub_names(path: str, config: str | None, split: str, monkeypatch: pytest.MonkeyPatch):
    import datasets

    def load(repository: str, name: str | None, *, split: str) -> datasets.Dataset:
        asked.append((repository, name, split))
        return datasets.Dataset.from_list([{"anchor": "a", "positive": "b"}])

    asked: list[tuple[str, str | None, str]] = []
    monkeypatch.setattr(datasets, "load_dataset", load)
    file = RecordFile(path)
    assert asked == [(path.partition(":")[0], config, split)]
    assert file[0].source == f"{path}:1"
    assert file[0].positive == ("b",)


def test_rows_that_name_documents_by_id_need_their_corpus(tmp_path: Path):
    file = FORMATS["tevatron-ids"](tmp_path, our_rows(3))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the row names documents by id .*: \{path: .*, corpus: FILE\}"):
        RecordFile(file.path)
    with pytest.raises(ConfigError, match=r"data.train.corpus = 'gone\.jsonl': no such file"):
        RecordFile(dataclasses.replace(file, corpus="gone.jsonl"))
    own = FORMATS["nemo"](tmp_path, our_rows(3))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: corpus = .* is given, but rows of the format NeMo .* hold"):
        RecordFile(dataclasses.replace(own, corpus=file.corpus))


@pytest.mark.parametrize(("line", "words"), [
    ('{"docid": "0", "text": "again"}', r"corpus\.jsonl:7: id '0': an earlier line has this id"),
    ('{"docid": "9"}', r"corpus\.jsonl:7: the row lacks text; it needs _id \(or docid\) and text"),
    ('{"text": "x"}', r"corpus\.jsonl:7: the row lacks _id")])
def test_a_bad_corpus_is_refused_with_its_line(line: str, words: str, tmp_path: Path):
    file = FORMATS["tevatron-ids"](tmp_path, our_rows(3))
    with open(str(file.corpus), "a", encoding="utf-8") as corpus:
        corpus.write(line + "\n")
    with pytest.raises(DataError, match=words):
        RecordFile(file)


def test_an_id_that_the_corpus_lacks_is_refused_with_the_rows_line(tmp_path: Path):
    file = FORMATS["tevatron-ids"](tmp_path, our_rows(3))
    corpus = Path(str(file.corpus))
    corpus.write_text("\n".join(corpus.read_text(encoding="utf-8").splitlines()[:-1]) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: id '0' is not in .*corpus\.jsonl; add it there or remove"):
        RecordFile(file)
    corpus.write_text(corpus.read_text(encoding="utf-8") + '{"docid": "0", "text": " "}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: id '0' has an empty text in .*corpus\.jsonl"):
        RecordFile(file)


def test_beir_folders_say_what_they_leave_out_and_refuse_what_they_cannot_train_on(
        tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = FORMATS["beir"](tmp_path, our_rows(3)).path
    qrels = tmp_path / "qrels" / "train.tsv"
    judgements = qrels.read_text(encoding="utf-8")
    qrels.write_text(judgements.replace("q2\td21\t2\n", ""), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert len(open_records((TrainFile(path=folder),))) == 2
    assert "left out 1 queries without a document of a score above 0" in caplog.text
    qrels.write_text(judgements + "q0\td99\t1\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"train\.tsv:8: corpus-id = 'd99': not in corpus\.jsonl"):
        open_records((TrainFile(path=folder),))
    qrels.write_text("q0\td00\t0\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"train\.tsv:1: no query has a document with a score above 0"):
        open_records((TrainFile(path=folder),))
    qrels.rename(qrels.with_name("dev.tsv"))
    with pytest.raises(DataError, match=r"train\.tsv: no such file; splits that exist: dev"):
        open_records((TrainFile(path=folder),))


def test_rows_near_no_format_are_refused_in_words_of_the_nearest(write_rows: WriteRows):
    for row, words in [({"text_a": "a", "text_b": "b"}, "score is missing; the row has 'text_a', 'text_b'"),
                       ({"query": "a", "documents": ["b"]}, "labels is missing"),
                       ({"foo": 1}, "query is missing; the row has 'foo'"),
                       ({"question": "a", "pos_text": "b"}, "answer is missing; .* add 'answer', or say in data.train "
                        "which column it is: {path: FILE, columns: {COLUMN: answer}}"),
                       ({"sentence1": "a", "sentence_2": "b"}, "unknown key 'sentence_2' = 'b'; did you mean 'senten")]:
        with pytest.raises(DataError, match=words):
            RecordFile(write_rows([row]))


def test_a_packed_file_is_read_by_number_from_a_copy_and_refused_once_it_changed(tmp_path: Path):
    for name in ("gz", "zst"):
        file = FORMATS[name](tmp_path, our_rows())
        records = RecordFile(file)
        assert records[11].query == our_rows()[11]["query"]
        assert records[0].query == our_rows()[0]["query"]
        fresh = RecordFile(file)
        path = Path(file.path)
        path.write_bytes(path.read_bytes() + path.read_bytes())
        with pytest.raises(DataError, match=rf"rows\.jsonl\.{name}:1: the file was changed after it was checked"):
            fresh[3]
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"rows\.jsonl\.zst:\d+: cannot be read on: .*damaged or incomplete"):
        RecordFile(str(path))


def test_a_whole_json_array_in_a_file_of_lines_is_refused(tmp_path: Path):
    path = tmp_path / "nq.jsonl"
    path.write_text(json.dumps([{"question": "q", "positive_ctxs": [{"text": "p"}]}]), encoding="utf-8")
    with pytest.raises(DataError, match=r"nq\.jsonl:1: a JSON array, .*write one object per line"):
        RecordFile(str(path))


def test_negatives_of_dpr_are_the_hard_ones_first(tmp_path: Path):
    write = as_lines(lambda i, q, p, n: {"question": q, "positive_ctxs": [{"text": p}],
                                         "negative_ctxs": [{"text": "easy"}], "hard_negative_ctxs": [{"text": n}]})
    (record,) = RecordFile(write(tmp_path, our_rows(1)))
    assert record.negatives == (our_rows(1)[0]["negatives"][0], "easy")
