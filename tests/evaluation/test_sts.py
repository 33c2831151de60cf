"""Correlations against scipy's fixture and Sentence Transformers' evaluator; refusals name file and line."""

import json
import lzma
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

from megatron_embed.errors import ConfigError, DataError, EmptyTextError, UserError
from megatron_embed.evaluation.sts import StsData, correlations, evaluate_sts, load_sts
from tests.helpers.toys import MINI_EN, MINILM

FIXTURE = Path(__file__).parent / "fixtures" / "sts_correlation.json.xz"


def pairs(scores, texts=None):
    texts = texts or [f"text {index}" for index in range(len(scores))]
    return StsData(path="pairs.jsonl", name="pairs", texts={"query": texts, "document": texts[::-1]}, scores=scores,
                   sources=[f"pairs.jsonl:{line}" for line in range(1, len(scores) + 1)])


def test_equal_to_the_reference_values_with_many_ties():
    fixture = json.loads(lzma.decompress(FIXTURE.read_bytes()))
    metrics = correlations(torch.tensor(fixture["score"], dtype=torch.float64), pairs(fixture["gold"]))
    assert len(set(fixture["score"])) < len(fixture["score"]) / 5
    assert metrics == pytest.approx({name: fixture["expected"][name] for name in ("pearson", "spearman")}, abs=1e-9)


def test_equal_to_the_evaluator_of_sentence_transformers(tmp_path):
    rows = [json.loads(line) for line in MINI_EN.read_text().splitlines()[:24]]
    scores = [float(index % 6) for index in range(24)]
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"text_a": row["query"], "score": score,
                                        "text_b": rows[(index * score) % 24]["positive"][0][:150]}) + "\n"
                            for index, (row, score) in enumerate(zip(rows, map(int, scores), strict=True))))
    data = load_sts(str(path))
    model = SentenceTransformer(str(MINILM), device="cpu")
    expected = EmbeddingSimilarityEvaluator(data.texts["query"], data.texts["document"], data.scores,
                                            similarity_fn_names=["cosine", "dot"], name="")(model)

    vectors = {tuple(texts): model.encode(texts, convert_to_tensor=True) * 3.0 for texts in data.texts.values()}

    def embed(texts, role):
        return vectors[tuple(texts)]

    metrics = evaluate_sts(embed, data, dims=[32])
    assert data.name == "few" and 0.05 < abs(metrics["spearman"]) < 1
    for name in ("pearson", "spearman"):
        assert metrics[name] == pytest.approx(float(expected[f"{name}_cosine"]), abs=1e-5)
        dot = evaluate_sts(embed, data, similarity="dot")[name]
        assert dot == pytest.approx(float(expected[f"{name}_dot"]), abs=1e-5)
    cut = evaluate_sts(lambda texts, role: embed(texts, role)[:, :32], data)
    assert {name: metrics[f"dim_32/{name}"] for name in cut} == pytest.approx(cut)
    assert metrics["dim_32/spearman"] != metrics["spearman"]


def test_texts_have_the_roles_of_training():
    embedded = {}
    data = pairs([1.0, 2.0, 3.0])

    def embed(texts, role):
        embedded[role] = texts
        return torch.randn(3, 4)

    evaluate_sts(embed, data)
    assert embedded == {"query": data.texts["query"], "document": data.texts["document"]}


@pytest.mark.parametrize("lines, words", [
    (['{"text_a": "a", "text_b": "b"}'],
     "pairs.jsonl:1: score is missing; the row has 'text_a', 'text_b'; add 'score'"),
    (['{"text_a": "a", "text_b": " ", "score": 1}'], "pairs.jsonl:1: text_b = .* is empty"),
    (['{"text_a": "a", "text_b": "b", "score": "1"}'],
     "pairs.jsonl:1: score = '1' is a JSON string; it must be a number"),
    (['{"text_a": "a", "text_b": "b", "score": 1' + "0" * 400 + "}"], "pairs.jsonl:1: score = 10+.* is not finite"),
    (['{"text_a": "a", "text_b": "b", "score": 1e39}'], "pairs.jsonl:1: score = 1e.39 is not finite in float32"),
    (['{"text_a": "a", "text_b": "b", "score": 1}', "", '{"text_a": "a", "text_b": "b", "score": true}'],
     "pairs.jsonl:3: score = True"),
    (['{"text_a": "a", "text_b": "b", "score": 1}'] * 3, "3 rows with 1 different scores have no correlation"),
    ([""], "0 rows with 0 different scores"),
])
def test_bad_rows_are_refused(lines, words, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=words):
        load_sts(str(tmp_path / "pairs.jsonl"))
    with pytest.raises(ConfigError, match=r"evaluation.sts = 'nowhere.jsonl': no such file"):
        load_sts("nowhere.jsonl")


def test_what_cannot_be_measured_is_refused():
    data = pairs([1.0, 2.0, 3.0])
    with pytest.raises(UserError, match="pairs: the similarities of the pairs are all the same or not finite"):
        evaluate_sts(lambda texts, role: torch.ones(3, 4), data)
    with pytest.raises(ConfigError, match="--dims 5: the model's vectors have 4 dimensions"):
        evaluate_sts(lambda texts, role: torch.randn(3, 4), data, dims=[5])

    def fail(texts, role):
        raise EmptyTextError(1, "somewhere", texts[1])

    with pytest.raises(EmptyTextError, match="pairs.jsonl:2: the text"):
        evaluate_sts(fail, data)
