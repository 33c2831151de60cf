"""`mine --reranker`: rows as the stock libraries choose them, by our checkpoints, cross-encoders and causal models."""

import json

import pytest
import torch
import transformers
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.util import mine_hard_negatives

from megatron_embed.__main__ import main
from megatron_embed.data.dataset import RecordFile
from megatron_embed.data.pair_tokenizer import QWEN3_RERANKER_TEMPLATE, Pair, PairTemplate
from tests.helpers.cross_encoders import cross_encoder  # noqa: F401  fixtures
from tests.helpers.mining_runs import data, mined, model  # noqa: F401  fixtures
from tests.helpers.toys import MINILM, save_reranker


def test_equals_sentence_transformers(model, cross_encoder, data, tmp_path):
    output, few = tmp_path / "mined.jsonl", tmp_path / "few.jsonl"
    few.write_text("".join(data.read_text().splitlines(keepends=True)[:24]))
    data = few
    mined(["--model", model, "--reranker", cross_encoder, "--data", data, "--output", output, "--num-negatives", 2,
           "--relative-margin", 0.05], 2)
    stock, judge = SentenceTransformer(str(model), device="cpu"), CrossEncoder(str(cross_encoder), device="cpu")
    records = list(RecordFile(str(data)))
    documents = list(dict.fromkeys(text for record in records for text in (*record.positive, *record.negatives)))
    pairs = Dataset.from_dict({"anchor": [record.query for record in records],
                               "positive": [record.positive[0] for record in records]})
    assert all(len(record.positive) == 1 for record in records)
    expected = {}
    for row in mine_hard_negatives(pairs, stock, cross_encoder=judge, corpus=documents, num_negatives=2,
                                   relative_margin=0.05, verbose=False):
        expected.setdefault(row["anchor"], []).append(row["negative"])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(expected) > 8
    assert {row["query"]: row["negatives"] for row in rows if row["negatives"]} == expected
    asked = [(row["query"], text) for row in rows for text in (*row["positive"], *row["negatives"])]
    scores = [score for row in rows for score in row["teacher_scores"]]
    assert scores == pytest.approx(judge.predict(asked), abs=1e-4) and max(scores) - min(scores) > 0.1


def test_a_causal_reranker_judges_words(data, tmp_path):
    """A directory as Qwen3-Reranker's, after BM25, on two ranks: log odds of yes at the last token, as probability."""
    directory = save_reranker(tmp_path / "causal", "Qwen3ForCausalLM")
    output = tmp_path / "mined.jsonl"
    mined(["--model", "bm25", "--reranker", directory, "--data", data, "--output", output, "--num-negatives", 1,
           "--range-max", 2, "parallel.tensor_model_parallel_size=2"], 2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    stock = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    yes, no = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("yes", "no"))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert sum(bool(row["negatives"]) for row in rows) > 50
    template, checked = PairTemplate(text=QWEN3_RERANKER_TEMPLATE), 0
    for row in rows[:8]:
        for text, score in zip((*row["positive"], *row["negatives"]), row["teacher_scores"], strict=True):
            pair = Pair(query=row["query"], document=text, instruction=row.get("instruction"))
            ids = tokenizer(template.fill(pair)[0], add_special_tokens=False, return_tensors="pt").input_ids
            if ids.shape[1] > 512:
                continue
            with torch.no_grad():
                logits = stock(ids).logits[0, -1]
            assert score == pytest.approx(float((logits[yes] - logits[no]).sigmoid()), abs=1e-4)
            checked += 1
    assert checked > 4


@pytest.mark.parametrize("arguments, words", [
    (["--reranker", str(MINILM)], "--reranker"),
    (["--reranker", "nowhere"], "--reranker = 'nowhere'"),
    (["--pooling", "mean", "--reranker", str(MINILM)], "--pooling: has no effect with BM25"),
])
def test_refusals(arguments, words, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["mine", "--model", "bm25", "--data", str(data), "--output", "mined.jsonl", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
