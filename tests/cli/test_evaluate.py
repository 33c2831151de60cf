"""`evaluate` at several widths, in two stages, on pairs, and as a gate; the same numbers on one rank and two."""

import json
import shutil

import numpy as np
import pytest
from sentence_transformers import CrossEncoder, SentenceTransformer

from megatron_embed.__main__ import main
from megatron_embed.evaluation.beir import load_beir
from megatron_embed.evaluation.retrieval import retrieval_metrics
from megatron_embed.run.required_metrics import parse_requirement
from tests.helpers.commands import evaluated, small_beir  # noqa: F401  a fixture
from tests.helpers.cross_encoders import cross_encoder  # noqa: F401  a fixture
from tests.helpers.mining_runs import model  # noqa: F401  a fixture
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command
from tests.helpers.toys import MINI_EN, MINILM


def test_widths_and_two_stages(model, small_beir):
    arguments = ["--model", str(model), "--data", str(small_beir), "--dims", "4,16", "--two-stage", "8",
                 "--candidates", "10"]
    one, two = evaluated(arguments, 1), evaluated(arguments, 2)
    assert one == pytest.approx(two, abs=1e-6)
    names = {name.rpartition("/")[0] for name in one}
    assert names == {"", "dim_4", "dim_16", "two_stage_8"}
    assert one["dim_4/ndcg@10"] != one["ndcg@10"] > 0
    assert one["two_stage_8/recall@100"] < one["recall@100"] == 1.0
    whole = evaluated(arguments[:4], 1)
    assert whole == pytest.approx({name: value for name, value in one.items() if "/" not in name}, abs=1e-9)


def test_a_reranker_orders_the_candidates(model, cross_encoder, small_beir, tmp_path):
    """The numbers of the stock libraries: the best seven of Sentence Transformers, ordered by its CrossEncoder."""
    arguments = ["--model", str(model), "--data", str(small_beir), "--reranker", str(cross_encoder), "--candidates",
                 "7", "--reranker-weight", "0.5", "--per-query", str(tmp_path / "queries.jsonl")]
    one, two = evaluated(arguments, 1), evaluated(arguments, 2)
    assert one == pytest.approx(two, abs=1e-6)
    rows = [json.loads(line) for line in (tmp_path / "queries.jsonl").read_text().splitlines()]
    assert [row.pop("query") for row in rows] == load_beir(str(small_beir)).query_ids
    assert {name: np.mean([row[name] for row in rows]) for name in two} == pytest.approx(two, abs=1e-12)
    assert {name.rpartition("/")[0] for name in one} == {"", "reranked", "reranked_0.5"}
    data, stock = load_beir(str(small_beir)), SentenceTransformer(str(model), device="cpu")
    judge, run = CrossEncoder(str(cross_encoder), device="cpu"), {}
    similarity = stock.encode(data.query_texts) @ stock.encode(list(data.document_texts)).T
    for row, (query, text) in enumerate(zip(data.query_ids, data.query_texts, strict=True)):
        best = np.argsort(-similarity[row])[:7]
        scores = judge.predict([(text, data.document_texts[document]) for document in best])
        run[query] = {data.document_ids[document]: float(score) for document, score in zip(best, scores, strict=True)}
    expected = retrieval_metrics(data.qrels, run)
    assert {name.removeprefix("reranked/"): value for name, value in one.items()
            if name.startswith("reranked/")} == pytest.approx(expected, abs=1e-6)
    assert one["reranked/ndcg@10"] != one["ndcg@10"] != one["reranked_0.5/ndcg@10"]


def test_pairs(model, tmp_path):
    rows = [json.loads(line) for line in MINI_EN.read_text().splitlines()[:30]]
    pairs = [{"text_a": row["query"], "text_b": row["positive"][0], "score": index % 7}
             for index, row in enumerate(rows)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    metrics = evaluated(["--model", str(model), "--data", str(path), "--dims", "8"], 2)
    stock = SentenceTransformer(str(model), device="cpu")
    first, second = (stock.encode([pair[key] for pair in pairs]) for key in ("text_a", "text_b"))
    expected = np.corrcoef((first * second).sum(axis=1), [pair["score"] for pair in pairs])[0, 1]
    assert metrics.keys() == {"pearson", "spearman", "dim_8/pearson", "dim_8/spearman"}
    assert metrics["pearson"] == pytest.approx(expected, abs=1e-4)


def test_given_prompts_take_the_place_of_the_directorys(model, small_beir, tmp_path):
    """As if the texts began with them; a directory's own are replaced, and one with an open place is refused."""
    own = shutil.copytree(model, tmp_path / "own")
    settings = json.loads((own / "config_sentence_transformers.json").read_text())
    (own / "config_sentence_transformers.json").write_text(json.dumps(settings | {"prompts": {
        "query": "Instruct: {instruction} Query: ", "document": "passage: "}}))
    prompts = ["--query-prompt", "Instruct: find the capital Query: ", "--document-prompt", "text of a book: "]
    written = shutil.copytree(small_beir, tmp_path / "written")
    for name, prompt in (("queries", prompts[1]), ("corpus", prompts[3])):
        rows = [json.loads(line) for line in (written / f"{name}.jsonl").read_text().splitlines()]
        for row in rows:
            row["text"], row["title"] = f"{prompt}{row.get('title') or ''} {row['text']}", ""
        (written / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = evaluated(["--model", str(model), "--data", str(written)], 1)
    metrics = evaluated(["--model", str(own), "--data", str(small_beir), *prompts], 1)
    assert metrics == pytest.approx(expected, abs=1e-6)
    assert metrics != pytest.approx(evaluated(["--model", str(model), "--data", str(small_beir)], 1), abs=1e-6)
    for extra, words in (([], "the prompt of the directory, 'Instruct: {instruction} Query: ', contains {instruction}"),
                         (["--query-prompt", "{instruction}"], "the prompt given, '{instruction}', contains {"),
                         (["--query-prompt", "", "--document-prompt", "{instruction}"], "documents have no instr")):
        code, _, err, _ = run_on_ranks(command, 1, ["evaluate", "--model", str(own), "--data", str(small_beir),
                                                    *extra])[0]
        assert code == 2 and words in err


def test_encode_takes_the_prompt_of_its_role(model, tmp_path):
    """The vectors of texts with the prompt in front, by the stock library; another role's prompt is refused."""
    (tmp_path / "texts.jsonl").write_text('{"text": "a river"}\n{"text": "tea", "title": "Assam"}\n')
    given = ["encode", "--model", str(model), "--input", str(tmp_path / "texts.jsonl"), "--output",
             str(tmp_path / "vectors.npy"), "--query-prompt", "find: "]
    assert run_on_ranks(command, 1, [*given, "--role", "query"])[0][0] == 0
    stock = SentenceTransformer(str(model), device="cpu").encode(["find: a river", "find: Assam tea"])
    assert np.abs(np.load(tmp_path / "vectors.npy") - stock).max() < 1e-5
    for role in ([], ["--role", "document"]):
        code, _, err, _ = run_on_ranks(command, 1, [*given, *role])[0]
        assert code == 2 and "--query-prompt 'find: ': no text here is a query; leave it out, or add --role" in err


def test_a_reranker_takes_no_prompt(cross_encoder, tmp_path, capsys):
    (tmp_path / "lists.jsonl").write_text('{"query": "a", "documents": ["b", "c"], "labels": [1, 0]}\n')
    assert main(["evaluate", "--model", str(cross_encoder), "--data", str(tmp_path / "lists.jsonl"),
                 "--document-prompt", "passage: "]) == 2
    assert "--document-prompt 'passage: ': " in (err := capsys.readouterr().err) and "is a reranker" in err


@pytest.mark.parametrize("arguments, words", [
    (["--dims", "64"], "--dims 64: the model's vectors have 32 dimensions; choose 1 to 32"),
    (["--dims", "8,x"], "'x' is not a whole number above 0"),
    (["--dims", "8,16,08"], "--dims: '8,16,08' names 08 twice; keep one of them"),
    (["--reranker-weight", "0.5,.5"], "--reranker-weight: '0.5,.5' names .5 twice; keep one of them"),
    (["--candidates", "5"], "--candidates 5: only search in two stages has candidates; add --two-stage, --precision"),
    (["--reranker-weight", "0.5"], "--reranker-weight 0.5: has no effect without --reranker"),
    (["--reranker-weight", "1"], "'1' must be numbers between 0 and 1"),
    (["--reranker", str(MINILM)], "not a reranker"),
    (["--per-query", "missing/queries.jsonl"], "--per-query missing/queries.jsonl: must be a .jsonl file, not a"),
])
def test_refusals(arguments, words, model, small_beir):
    given = ["evaluate", "--model", str(model), "--data", str(small_beir), *arguments]
    code, out, err, _ = run_on_ranks(command, 1, given)[0]
    assert (code, out) == (2, "")
    assert words in err


def test_a_file_of_pairs_has_no_split(model, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"text_a": "a", "text_b": "b", "score": 1}\n')
    for option in (["--split", "dev"], ["--two-stage", "8"], ["--reranker", "dir"]):
        assert main(["evaluate", "--model", str(model), "--data", str(path), *option]) == 2
        assert f"{option[0]} {option[1]}: has no effect on a file of pairs" in capsys.readouterr().err
    assert main(["evaluate", "--model", str(model), "--data", str(path)]) == 2
    assert "1 rows with 1 different scores" in capsys.readouterr().err


def test_one_document_and_a_query_without_a_relevant_one(model, cross_encoder, tmp_path):
    """Fewer documents than any cut, width or candidate list asks for; characters beyond the basic plane."""
    (tmp_path / "qrels").mkdir()
    rows = {"corpus.jsonl": [{"_id": "d", "title": "\U00020bb7", "text": "\U00020bb7\u91ce\u5bb6 \U0001f600"}],
            "queries.jsonl": [{"_id": "q1", "text": "\U0001f600"}, {"_id": "q2", "text": "tea"}]}
    for name, lines in rows.items():
        (tmp_path / name).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    (tmp_path / "qrels" / "test.tsv").write_text("q1\td\t2\nq2\td\t0\n")
    metrics = evaluated(["--model", str(model), "--data", str(tmp_path), "--dims", "4", "--two-stage", "8",
                         "--reranker", str(cross_encoder), "--reranker-weight", "0.5", "--candidates", "5"], 2)
    assert len(metrics) == 5 * 21
    for name, value in metrics.items():
        k = int(name.partition("@")[2] or 1)
        assert value == (0.5 / k if "precision" in name else 0.5), name


def gate(model, data, *requirements, ranks=1):
    options = [part for requirement in requirements for part in ("--require", requirement)]
    return run_on_ranks(command, ranks, ["evaluate", "--model", str(model), "--data", str(data), "--dims", "8",
                                         *options])


def test_a_metric_below_its_bound_ends_every_rank_with_code_2(model, small_beir):
    results = gate(model, small_beir, "ndcg@10>=0.9999", "dim_8/recall@100:1", "mrr@10:0.9999", ranks=2)
    assert [code for code, *_ in results] == [2, 2]
    metrics = json.loads(results[0][1].splitlines()[-1])
    (line,) = [line for line in results[0][2].splitlines() if "error" in line]
    assert line == (f"megatron-embed: error: --require: ndcg@10 = {metrics['ndcg@10']!r} is below the required 0.9999; "
                    f"mrr@10 = {metrics['mrr@10']!r} is below the required 0.9999")
    assert results[1][1:3] == ("", "")


def test_bounds_that_hold(model, small_beir):
    """A value equal to its bound is enough."""
    (code, out, err, _), = gate(model, small_beir, "ndcg@10>=0", "recall@100:1")
    assert code == 0 and "error" not in err
    assert json.loads(out.splitlines()[-1])["recall@100"] == 1


@pytest.mark.parametrize("bound, words", [
    ("ndgc@10:0.5", "--require ndgc@10>=0.5: this evaluation gives no metric 'ndgc@10'; did you mean 'ndcg@10'?"),
    ("reranked/ndcg@10:0.5", "gives no metric 'reranked/ndcg@10'"),
    ("ndcg@10", "'ndcg@10' has no bound; write 'ndcg@10>=0.5' in quotes"),
    ("ndcg@10:high", "'ndcg@10:high' must be a metric and a number"),
    ("ndcg@10>=nan", "'ndcg@10>=nan' must be a metric and a number"),
])
def test_refused_before_the_model_is_opened(bound, words, small_beir, capsys):
    code = main(["evaluate", "--model", "/nowhere", "--data", str(small_beir), "--require", bound])
    assert code == 2
    assert words in capsys.readouterr().err


def test_refused_for_pairs_and_lists(tmp_path, capsys):
    pairs, lists = tmp_path / "pairs.jsonl", tmp_path / "lists.jsonl"
    pairs.write_text('{"text_a": "a", "text_b": "b", "score": 1}\n{"text_a": "a", "text_b": "c", "score": 0}\n')
    lists.write_text('{"query": "a", "documents": ["b", "c"], "labels": [1, 0]}\n')
    for file, known in ((pairs, "pearson, spearman"), (lists, "map")):
        assert main(["evaluate", "--model", "/nowhere", "--data", str(file), "--require", "accuracy:0.5"]) == 2
        assert known in capsys.readouterr().err


@pytest.mark.parametrize("text", ["ndcg@10>=0.5", "ndcg@10:0.5", "ndcg@10 >= 0.5", "ndcg@10:5e-1"])
def test_both_spellings(text):
    requirement = parse_requirement(text)
    assert (requirement.metric, requirement.least, str(requirement)) == ("ndcg@10", 0.5, "ndcg@10>=0.5")
