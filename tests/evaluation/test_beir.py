"""load_beir: what it reads, and its refusals, each with the words of its message."""

import tracemalloc
from pathlib import Path

import pytest
import torch

from megatron_embed.data.corpus import Picked
from megatron_embed.errors import DataError
from megatron_embed.evaluation.beir import load_beir
from megatron_embed.evaluation.retrieval import evaluate_retrieval
from tests.helpers.beir_helpers import CORPUS, QRELS, write_folder
from tests.helpers.ranks import run_on_ranks
from tests.helpers.toys import open_model, run_config, save_model, toy_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples" / "data"


def test_titles_judged_queries_and_graded_labels(tmp_path):
    data = load_beir(write_folder(tmp_path / "teas"))
    assert data.name == "teas"
    assert data.document_ids == ["d1", "d2"]
    assert list(data.document_texts) == ["Tea is hot", "ice"]
    assert data.query_ids == ["q1", "q2"]
    assert data.query_texts == ["warm?", "cold?"]
    assert data.qrels == {"q1": {"d1": 1, "d2": 0}, "q2": {"d2": 2}}


def test_real_set_takes_its_name_from_the_folder_above():
    data = load_beir(str(EXAMPLES / "mini_zh" / "beir"))
    assert (data.name, len(data.document_ids), len(data.query_ids), len(data.qrels)) == ("mini_zh", 480, 200, 200)
    assert data.query_texts[0] == "广三铁路在哪年建成？"


@pytest.mark.parametrize("header", ["", "query-id\tcorpus-id\tscore\r\n", "\ufeffquery-id\tcorpus-id\tscore\n"])
def test_integer_ids_absent_titles_and_headers(tmp_path, header):
    data = load_beir(
        write_folder(tmp_path, [{"_id": 7, "text": "a"}, {"_id": 8, "text": "b", "title": None}],
                     [{"_id": 1, "text": "q"}], header + "1\t7\t1\n\n1\t8\t-1\r\n")
    )
    assert data.document_ids == ["7", "8"]
    assert list(data.document_texts) == ["a", "b"]
    assert data.qrels == {"1": {"7": 1, "8": -1}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"_id": "d3", "text"', r"corpus\.jsonl:3: not valid JSON: Expecting ':'"),
        ("[1]", r"corpus\.jsonl:3: a JSON array, \[1\], where one JSON object per line"),
        ('{"text": "x"}', r"corpus\.jsonl:3: the row lacks _id; it needs _id \(or docid\) and text"),
        ('{"_id": "", "text": "x"}', r"corpus\.jsonl:3: _id = '': must be a non-empty string"),
        ('{"_id": true, "text": "x"}', r"corpus\.jsonl:3: _id = True: must be a non-empty string"),
        ('{"_id": "d3"}', r"corpus\.jsonl:3: the row lacks text; it needs _id \(or docid\) and text"),
        ('{"_id": "d3", "text": null}', r"corpus\.jsonl:3: text = None is a JSON null; it must be a string"),
        ('{"_id": "d3", "text": "a \\ud83d"}', r"corpus\.jsonl:3: text holds half a surrogate pair"),
        ('{"_id": "d3", "text": "x", "title": 3}', r"corpus\.jsonl:3: title = 3 is a JSON number; it must be a string"),
        ('{"_id": "d1", "text": "x"}', r"corpus\.jsonl:3: _id = 'd1': an earlier line has this id"),
    ],
)
def test_bad_rows(tmp_path, line, message):
    with pytest.raises(DataError, match=f"^{tmp_path}/{message}"):
        load_beir(write_folder(tmp_path, [*CORPUS, line]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q1\td1\t0.5", r"qrels/test\.tsv:5: score = '0\.5': must be an integer"),
        ("q1\td1", r"qrels/test\.tsv:5: 2 fields between tabs, expected 3"),
        ("q1 0 d1 1", r"qrels/test\.tsv:5: 1 fields between tabs, expected 3"),
        ("q1\td1\t3", r"qrels/test\.tsv:5: query 'q1', document 'd1': judged 3, but 1 on an earlier line"),
        ("q1\td1\t2147483648", r"qrels/test\.tsv:5: score = 2147483648: ranking metrics take grades up to 1000000"),
        ("q1\td1\t-1" + "0" * 400, r"qrels/test\.tsv:5: score = -10+.*: ranking metrics take grades up to 1000000"),
        ("query-id\tcorpus-id\tscore", r"qrels/test\.tsv:5: score = 'score': must be an integer"),
    ],
)
def test_bad_judgements(tmp_path, line, message):
    with pytest.raises(DataError, match=f"^{tmp_path}/{message}"):
        load_beir(write_folder(tmp_path, qrels=QRELS + line + "\n"))


def test_first_line_that_is_not_a_header_is_not_dropped(tmp_path):
    with pytest.raises(DataError, match=r"test\.tsv:1: score = '1\.0': must be an integer"):
        load_beir(write_folder(tmp_path, qrels="q1\td1\t1.0\n"))


def test_invalid_utf8_and_empty_text(tmp_path):
    folder = write_folder(tmp_path)
    (tmp_path / "queries.jsonl").write_bytes(b'{"_id": "q1", "text": "a"}\n{"_id": "q2", "text": "\xff"}\n')
    with pytest.raises(DataError, match=r"queries\.jsonl:2: not UTF-8: byte 0xff"):
        load_beir(folder)
    (tmp_path / "queries.jsonl").write_text('{"_id": "q1", "text": ""}\n{"_id": "q2", "text": "b"}\n')
    assert load_beir(folder).query_texts == ["", "b"]
    (tmp_path / "qrels" / "test.tsv").write_bytes(b"q1\td1\t1\nq2\td\xff\t1\n")
    with pytest.raises(DataError, match=r"test\.tsv:2: not UTF-8 \(invalid start byte\)"):
        load_beir(folder)


def test_empty_files(tmp_path):
    with pytest.raises(DataError, match=r"queries\.jsonl:1: no rows"):
        load_beir(write_folder(tmp_path / "a", queries=[]))
    with pytest.raises(DataError, match=r"test\.tsv:1: no judgements"):
        load_beir(write_folder(tmp_path / "b", qrels="query-id\tcorpus-id\tscore\n"))


def test_missing_files_say_what_is_there(tmp_path):
    folder = write_folder(tmp_path)
    (tmp_path / "qrels" / "dev.tsv").write_text(QRELS)
    with pytest.raises(DataError, match=r"qrels/train\.tsv: no such file; splits that exist: dev, test$"):
        load_beir(folder, split="train")
    (tmp_path / "queries.jsonl").unlink()
    with pytest.raises(DataError, match=r"queries\.jsonl: no such file; a BEIR folder contains"):
        load_beir(folder)
    with pytest.raises(DataError, match=r"nowhere/corpus\.jsonl: no such file"):
        load_beir(str(tmp_path / "nowhere"))


def test_texts_stay_on_the_disk(tmp_path):
    """12 MB of texts: what is held is far less, parts are views, and what is read is what the file says."""
    rows = [{"_id": f"d{index}", "title": f"t{index}", "text": f"{index} " * 1000} for index in range(2000)]
    folder = write_folder(tmp_path, rows, qrels="q1\td1\t1\n")
    tracemalloc.start()
    try:
        data = load_beir(folder)
        part = data.document_texts[::-1][:1000]
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 1_500_000 < sum(len(row["text"]) for row in rows)
    assert (len(part), part[0], part[-1]) == (1000, f"t1999 {rows[1999]['text']}", f"t1000 {rows[1000]['text']}")


def test_a_corpus_that_changes_is_refused(tmp_path):
    data = load_beir(write_folder(tmp_path))
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d1", "text": "other"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"corpus\.jsonl:1: the file was changed after it was checked"):
        evaluate_retrieval(lambda texts, role: torch.ones(len(list(texts)), 2), data)


class Read(list):
    """Texts that record which of them were read; with `gone`, reading text 5 fails."""

    def __init__(self, texts, *, gone=False):
        super().__init__(texts)
        self.read, self.gone = [], gone

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Picked(self, range(len(self))[index])
        if index == 5 and self.gone:
            raise DataError("corpus.jsonl:6: the file was changed")
        self.read.append(index)
        return super().__getitem__(index)


def _encoded(directory, gone):
    """(shape, texts that this rank read), or the error that it met."""
    from megatron_embed.evaluation.encode import TextEncoder
    from megatron_embed.loading.model_directory import find_model

    opened = open_model(run_config(directory))
    encoder = TextEncoder(opened.chunks, opened.topology, toy_tokenizer(directory), pooling="mean",
                          dim=find_model(directory).shape.hidden_size, kernel="sdpa", causal=False)
    texts = Read([f"text {index}" for index in range(10)], gone=gone)
    try:
        vectors = encoder.encode(texts, "document")
    except DataError as error:
        return str(error)
    assert vectors.equal(encoder.encode(list(texts), "document"))
    return tuple(vectors.shape), texts.read


def test_ranks_read_their_share_and_fail_together(tmp_path):
    """Texts 1, 3, ... are the second rank's; the first meets no error of its own."""
    directory = save_model(tmp_path / "bert", "bert", tokenizer=True)
    assert run_on_ranks(_encoded, 2, directory, False) == [((10, 32), [0, 2, 4, 6, 8]), ((10, 32), [1, 3, 5, 7, 9])]
    assert run_on_ranks(_encoded, 2, directory, True) == ["corpus.jsonl:6: the file was changed"] * 2
