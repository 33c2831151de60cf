"""Rerankers by the commands: train, resume, evaluate, both exports, and what they refuse."""

import contextlib
import dataclasses
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from megatron_embed.config.load import load_config
from megatron_embed.errors import CheckpointError, ConfigError, DataError
from megatron_embed.export.reranker import PROBE_PAIRS, export_reranker_checkpoint
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command
from tests.helpers.reranker_runs import lists, prompt, run, run_settings
from tests.helpers.toys import MINI_EN, MINILM, save_reranker


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run, its cross-encoder) of a tied yes/no model; docs rows; evaluation inside."""
    folder = tmp_path_factory.mktemp("reranker")
    model = save_reranker(folder / "model", "Qwen3ForCausalLM", tied=True)
    config = run_settings(model, folder, checkpoint={"directory": str(folder / "run"),
                                                     "export_at_end": str(folder / "export")},
                          evaluation={"reranking": [lists(folder / "docs.jsonl")], "at_start": False})
    run(["train", config])
    return folder


def test_training_logs_and_evaluates(trained):
    lines = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(0 < line["loss"] < 100 and line["grad_norm"] > 0 and 0 <= line["accuracy"] <= 1 for line in steps)
    (evaluation,) = [line for line in lines if "eval/rerank/ndcg@10" in line]
    out = run(["evaluate", "--model", str(trained / "run"), "--data", str(trained / "docs.jsonl")])
    assert json.loads(out)["ndcg@10"] == pytest.approx(evaluation["eval/rerank/ndcg@10"], abs=1e-6)
    assert 0 < json.loads(out)["map"] <= 1


def test_cross_encoder_is_the_model_by_its_words(trained):
    """The classifier's weight is the difference of two rows; CrossEncoder and Transformers say what the causal model
    with its last-token logits says, from the prompt written out."""
    export, causal = trained / "export", trained / "causal"
    report = export_reranker_checkpoint_in_worker(trained / "run", causal, classification=False)
    assert "the same scores" in report
    config = json.loads((export / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification"]
    assert config["id2label"] == {"0": "LABEL_0"} and config["use_sep_token"] is False
    assert config["pad_token_id"] == 0
    tokenizer = AutoTokenizer.from_pretrained(causal)
    yes, no = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("yes", "no"))
    weights, rows = load_file(export / "model.safetensors"), load_file(causal / "model.safetensors")
    embeddings = rows["model.embed_tokens.weight"]
    assert torch.equal(weights["score.weight"], (embeddings[yes] - embeddings[no])[None])
    assert "score.bias" not in weights and "lm_head.weight" not in weights
    model = AutoModelForCausalLM.from_pretrained(causal).eval()
    with torch.no_grad():
        logits = [model(**tokenizer(prompt(pair), add_special_tokens=False, return_tensors="pt")).logits[0, -1]
                  for pair in PROBE_PAIRS]
    expected = torch.stack([row[yes] - row[no] for row in logits])
    assert float(expected.std()) > 0.01
    for directory in (export, causal):
        loaded = CrossEncoder(str(directory), device="cpu")
        scores = loaded.predict(list(PROBE_PAIRS), convert_to_tensor=True, batch_size=4)
        torch.testing.assert_close(scores.float(), expected.sigmoid(), rtol=0, atol=1e-4)
    classifier = AutoModelForSequenceClassification.from_pretrained(export).eval()
    tokenizer = AutoTokenizer.from_pretrained(export)
    messages = [[{"role": "query", "content": query}, {"role": "document", "content": document}]
                for query, document in PROBE_PAIRS]
    batch = tokenizer.apply_chat_template(messages, padding=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        scores = classifier(**batch).logits[:, 0]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_export_scores_lists_as_the_run_did(trained):
    own = run(["evaluate", "--model", str(trained / "run"), "--data", str(trained / "docs.jsonl")])
    exported = run(["evaluate", "--model", str(trained / "export"), "--data", str(trained / "docs.jsonl")])
    assert json.loads(own) == pytest.approx(json.loads(exported), abs=1e-6)


def test_a_run_and_its_export_judge_candidates_alike(trained):
    rows = [json.loads(line) for line in MINI_EN.read_text(encoding="utf-8").splitlines()[:12]]
    data, result = trained / "train.jsonl", []
    data.write_text("".join(json.dumps({"query": row["query"], "positive": [row["positive"][0][:200]]}) + "\n"
                            for row in rows))
    for name in ("run", "export"):
        run(["mine", "--model", "bm25", "--reranker", str(trained / name), "--data", str(data), "--num-negatives", "2",
             "--output", str(trained / f"{name}.jsonl"), "--max-score", "0.99"])
        result.append([json.loads(line) for line in (trained / f"{name}.jsonl").read_text().splitlines()])
    assert sum(len(row["negatives"]) for row in result[0]) > 6
    for one, other in zip(*result, strict=True):
        assert one["negatives"] == other["negatives"]
        assert one["teacher_scores"] == pytest.approx(other["teacher_scores"], abs=1e-5)


def export_in_worker(source, destination, classification):
    try:
        return "\n".join(export_reranker_checkpoint(source, destination, classification=classification))
    except CheckpointError as error:
        return error


def export_reranker_checkpoint_in_worker(source, destination, *, classification):
    (result,) = run_on_ranks(export_in_worker, 1, str(source), str(destination), classification)
    if isinstance(result, CheckpointError):
        raise result
    return result


def test_an_export_that_differs_leaves_nothing_behind(trained, tmp_path, monkeypatch):
    (result,) = run_on_ranks(export_wrongly, 1, str(trained / "run"), str(tmp_path / "export"))
    assert "the export must not be used" in result
    assert not list(tmp_path.iterdir())


def export_wrongly(source, destination):
    """With yes and no exchanged in what is written."""
    import megatron_embed.convert.to_hf as module

    original = module.HeadExport

    class Exchanged(original):
        def __init__(self, *arguments, head, **options):
            super().__init__(*arguments, head={"weight": head["weight"].flip(0)}, **options)

    module.HeadExport = Exchanged
    try:
        with contextlib.suppress(CheckpointError):
            return f"written: {export_reranker_checkpoint(source, destination, classification=True)}"
        return str(export_in_worker(source, destination, True))
    finally:
        module.HeadExport = original


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_untied_rows_are_trained_and_put_back(tmp_path, dtype):
    model = save_reranker(tmp_path / "model", "Qwen3ForCausalLM", tied=False)
    run(["train", run_settings(model, tmp_path, model={"path": model, "dtype": dtype})])
    export_reranker_checkpoint_in_worker(tmp_path / "run", tmp_path / "causal", classification=False)
    before = load_file(tmp_path / "model" / "model.safetensors")["lm_head.weight"]
    after = load_file(tmp_path / "causal" / "model.safetensors")["lm_head.weight"].to(before.dtype)
    tokenizer = AutoTokenizer.from_pretrained(model)
    answers = sorted(tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("yes", "no"))
    changed = (before != after).any(dim=1).nonzero().flatten().tolist()
    assert changed == answers


def test_encoder_becomes_a_stock_cross_encoder(tmp_path):
    """all-MiniLM, which has a pooler and no classifier: the pooler is trained, the classifier is new."""
    config = run_settings(str(MINILM), tmp_path, head="score", objective={"loss": "listwise"},
                          training={"global_batch_size": 8, "micro_batch_size": 4, "train_steps": 1,
                                    "learning_rate": 1e-3, "micro_batch_tokens": None},
                          checkpoint={"directory": str(tmp_path / "run"), "export_at_end": str(tmp_path / "export")})
    run(["train", config])
    weights = load_file(tmp_path / "export" / "model.safetensors")
    assert weights["classifier.weight"].shape == (1, 384) and weights["classifier.bias"].shape == (1,)
    source = load_file(MINILM / "model.safetensors")
    assert not torch.equal(weights["bert.pooler.dense.weight"], source["pooler.dense.weight"])
    torch.testing.assert_close(weights["bert.pooler.dense.weight"], source["pooler.dense.weight"], rtol=0, atol=2e-3)
    assert float(weights["classifier.weight"].std()) > 1e-3


@pytest.mark.slow
def test_resumes_bit_for_bit(tmp_path):
    model = save_reranker(tmp_path / "model", "Qwen3Model")
    folders = []
    for name, steps in (("whole", [4]), ("parts", [2, 4])):
        folder = tmp_path / name
        folder.mkdir()
        for count in steps:
            run(["train", run_settings(model, folder, head="score", training={
                "global_batch_size": 8, "micro_batch_size": 4, "train_steps": count, "learning_rate": 1e-3,
                "lr_decay_style": "constant"})])
        export_reranker_checkpoint_in_worker(folder / "run", folder / "export", classification=True)
        folders.append(load_file(folder / "export" / "model.safetensors"))
    assert folders[0].keys() == folders[1].keys()
    assert all(torch.equal(tensor, folders[1][name]) for name, tensor in folders[0].items())


@pytest.mark.slow
def test_two_stages_train_what_one_rank_does(tmp_path):
    model = save_reranker(tmp_path / "model", "Qwen3ForCausalLM", tied=True)
    result = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        run(["train", run_settings(model, folder, parallel={"pipeline_model_parallel_size": ranks})], ranks)
        export_reranker_checkpoint_in_worker(folder / "run", folder / "export", classification=True)
        result.append(load_file(folder / "export" / "model.safetensors"))
    before = load_file(tmp_path / "model" / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(result[0]["model.embed_tokens.weight"], before)
    for name, tensor in result[0].items():
        torch.testing.assert_close(result[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("loss, label", [("ranknet", 1), ("margin_ranking", 1), ("lambda_loss", 1), ("listwise", 0)])
def test_a_batch_without_a_term_has_the_loss_0(tied_model, tmp_path, loss, label):
    """No pair of labels that differ, no document that is relevant: the step goes by, and nothing moves."""
    rows = [{"query": f"q{row}", "documents": ["one", "two"], "labels": [label, label]} for row in range(8)]
    (tmp_path / "equal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = run_settings(tied_model, tmp_path, objective={"loss": loss}, checkpoint={"directory": None},
                          logging={"directory": str(tmp_path / "log")},
                          data={"train": [str(tmp_path / "equal.jsonl")], "num_negatives": 0})
    run(["train", config])
    metrics = [json.loads(line) for line in (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"], line["grad_norm"]) for line in metrics] == [(1, 0.0, 0.0), (2, 0.0, 0.0)]


REFUSALS = [
    ({"objective": {"loss": "info_nce"}}, ConfigError, "objective.loss = 'info_nce': is not a loss of task: reranker"),
    ({"objective": {"loss": "pointwise"}}, DataError, "label 2: objective.loss = pointwise takes labels from 0 to 1"),
    ({"objective": {"loss": "kl_distillation"}}, DataError, "teacher_scores is missing"),
    ({"reranker": {"template": "{query}"}}, ConfigError, "reranker.template"),
    ({"reranker": {"true_token": "certainly"}}, ConfigError, "must be a single known one"),
    ({"reranker": {"false_token": "yes"}}, ConfigError, "is the token of reranker.true_token"),
    ({"reranker": {"max_length": 100000}}, ConfigError, "reranker.max_length = 100000 is longer"),
    ({"reranker": {"max_length": 40}}, DataError, "leaves none for the document"),
    ({"data": {"query_prompt": "query: "}}, ConfigError, "data.query_prompt = 'query: '"),
    ({"evaluation": {"retrieval": ["somewhere"]}}, ConfigError, "a reranker searches no corpus"),
    ({"evaluation": {"reranking": ["lists.jsonl", "./lists.jsonl"]}}, ConfigError,
     "_lists'; name each file once, or rename one of them"),
    ({"training": {"micro_batch_tokens": 64}}, ConfigError, "training.micro_batch_tokens = 64 may not hold")]


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory):
    return save_reranker(tmp_path_factory.mktemp("models") / "tied", "Qwen3ForCausalLM")


@pytest.mark.parametrize("sections, error, words", REFUSALS, ids=lambda value: str(value)[:40])
def test_refusals(tied_model, tmp_path, monkeypatch, sections, error, words):
    from megatron_embed.run.preflight import read_inputs

    monkeypatch.chdir(tmp_path)
    path = run_settings(tied_model, tmp_path)
    values = yaml.safe_load((tmp_path / "run.yaml").read_text())
    for section, keys in sections.items():
        values[section] = values.get(section, {}) | keys
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(error) as raised:
        read_inputs(load_config(path, []))
    assert words in str(raised.value)


def test_labels_beyond_what_the_loss_can_take_are_refused_by_line(tied_model, tmp_path):
    rows = tmp_path / "labels.jsonl"
    rows.write_text("".join(json.dumps({"query": f"q {row}", "documents": ["a", "b", "c"], "labels": [best, 1, 0]})
                            + "\n" for row, best in enumerate([4, 1000, 1000, 1000])))
    path = run_settings(tied_model, tmp_path, data={"train": [str(rows)]})
    ((code, _, err, _),) = run_on_ranks(command, 1, ["train", path])
    assert code == 2
    assert f"{rows}:2: label 1000: objective.loss = lambda_loss takes labels up to 24" in err
    assert not list((tmp_path / "run").glob("step_*"))


def test_encoders_refuse_what_they_cannot_be(tmp_path):
    from megatron_embed.run.preflight import read_inputs

    for reranker, words in (({"head": "yes_no"}, "has no language-model head"),
                            ({"head": "score", "template": "{query} {document}"}, "query and document as a pair")):
        config = load_config(run_settings(str(MINILM), tmp_path, reranker=reranker), [])
        with pytest.raises(ConfigError, match="^reranker") as raised:
            read_inputs(dataclasses.replace(config))
        assert words in str(raised.value)


def test_a_classifier_of_three_classes_is_refused(tmp_path):
    model = tmp_path / "model"
    save_reranker(model, "Qwen3Model")
    weights = load_file(model / "model.safetensors")
    weights = {f"model.{name}": tensor for name, tensor in weights.items()} | {"score.weight": torch.zeros(3, 32)}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    ((code, _, err, _),) = run_on_ranks(command, 1, ["train", run_settings(str(model), tmp_path, head="score")])
    assert code == 2 and "score.weight has 3 outputs" in err
