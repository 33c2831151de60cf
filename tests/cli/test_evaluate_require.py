"""`evaluate --require`: a gate for scripts, with the metrics printed either way."""

import json

import pytest

from megatron_embed.__main__ import main
from megatron_embed.run.required_metrics import parse_requirement
from tests.helpers.commands import small_beir  # noqa: F401  a fixture
from tests.helpers.mining_runs import model  # noqa: F401  a fixture
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command


def gate(model, data, *requirements, ranks=1):
    options = [part for requirement in requirements for part in ("--require", requirement)]
    return run_on_ranks(command, ranks, ["evaluate", "--model", str(model), "--data", str(data), "--dims", "8",
                                         *options])


def test_a_metric_below_its_bound_ends_every_rank_with_code_1(model, small_beir):
    results = gate(model, small_beir, "ndcg@10>=0.9999", "dim_8/recall@100:1", "mrr@10:0.9999", ranks=2)
    assert [code for code, *_ in results] == [1, 1]
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
