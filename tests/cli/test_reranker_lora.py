"""Rerankers with LoRA adapters by the commands: train, PEFT's files both ways, the merged cross-encoder, refusals."""

import json

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from megatron_embed.export.reranker import PROBE_PAIRS
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import assert_refused, command
from tests.helpers.reranker_runs import prompt, run, run_settings
from tests.helpers.toys import save_reranker

LORA = {"rank": 4, "alpha": 16, "target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]}


def train(folder, head, **sections):
    """A causal model with tied embeddings, so a score head is new; its run and the run's cross-encoder."""
    model = save_reranker(folder / "model", "Qwen3ForCausalLM", tied=True)
    config = run_settings(model, folder, head, lora=LORA, training={"learning_rate": 2e-2},
                          checkpoint={"directory": str(folder / "run"), "export_at_end": str(folder / "export")},
                          **sections)
    run(["train", config])
    run(["convert", "megatron-to-hf", str(folder / "run"), str(folder / "adapter"), "--format", "peft"])
    return folder


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    return train(tmp_path_factory.mktemp("score"), "score")


def scores_of(model, tokenizer, answers=None):
    """Scores of PROBE_PAIRS by a stock class."""
    result = []
    with torch.no_grad():
        for pair in PROBE_PAIRS:
            logits = model.eval()(**tokenizer(prompt(pair), add_special_tokens=False, return_tensors="pt")).logits[0]
            result.append(logits[0] if answers is None else logits[-1, answers[0]] - logits[-1, answers[1]])
    return torch.stack(result)


def test_peft_loads_adapter_and_classifier(scored):
    """Base model and our adapter in PEFT score as the merged export does, which training compared with the model."""
    written = json.loads((scored / "adapter" / "adapter_config.json").read_text())
    assert (written["task_type"], written["modules_to_save"]) == ("SEQ_CLS", ["score"])
    tokenizer = AutoTokenizer.from_pretrained(scored / "adapter")
    merged = AutoModelForSequenceClassification.from_pretrained(scored / "export")
    base = AutoModelForSequenceClassification.from_pretrained(scored / "model", num_labels=1)
    expected = scores_of(merged, tokenizer)
    assert float(expected.std()) > 1e-3
    adapted = PeftModel.from_pretrained(base, str(scored / "adapter"))
    torch.testing.assert_close(scores_of(adapted, tokenizer), expected, rtol=1e-5, atol=1e-5)
    start, end = load_file(scored / "model" / "model.safetensors"), load_file(scored / "export" / "model.safetensors")
    changed = {name.split(".")[-2] for name, tensor in end.items() if name in start
               and not torch.equal(tensor, start[name])}
    assert changed == set(LORA["target_modules"])


def test_evaluation_and_training_go_on_from_the_adapter(scored, tmp_path):
    still = {"learning_rate": 1e-30, "weight_decay": 0.0, "train_steps": 1}
    config = run_settings(str(scored / "adapter"), tmp_path, "score", training=still)
    data = yaml.safe_load((tmp_path / "run.yaml").read_text())["data"]["train"][0]
    results = [json.loads(run(["evaluate", "--model", str(scored / name), "--data", data]))
               for name in ("run", "adapter", "export")]
    assert results[1] == pytest.approx(results[0], abs=1e-6)
    assert results[2] == pytest.approx(results[0], abs=1e-6)
    run(["train", config])
    run(["convert", "megatron-to-hf", str(tmp_path / "run"), str(tmp_path / "again"), "--format", "peft"])
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (scored / "adapter",
                                                                                    tmp_path / "again"))
    assert before.keys() == after.keys()
    assert "base_model.model.score.weight" in before
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    report = run(["convert", "megatron-to-hf", str(tmp_path / "run"), str(tmp_path / "merged"), "--format",
                  "cross-encoder", "--merge-lora"])
    assert "the same scores" in report
    merged, export = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", scored / "export"))
    assert all(torch.equal(tensor, merged[name]) for name, tensor in export.items())


def test_what_does_not_fit_is_refused(scored, tmp_path):
    config = run_settings(str(scored / "adapter"), tmp_path, "yes_no")
    assert_refused(run_on_ranks(command, 1, ["train", config]), "score.weight", "does not belong to a reranker",
                   "yes_no")
    arguments = ["convert", "megatron-to-hf", str(scored / "run"), str(tmp_path / "out"), "--format", "cross-encoder"]
    assert_refused(run_on_ranks(command, 1, arguments), "LoRA adapters (rank 4)", "--merge-lora")
    tensors = load_file(scored / "adapter" / "adapter_model.safetensors")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("adapter_config.json", "reranker.json"):
        (foreign / name).write_text((scored / "adapter" / name).read_text())
    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)},
              foreign / "adapter_model.safetensors")
    arguments = ["evaluate", "--model", str(foreign), "--data", str(tmp_path / "lists.jsonl")]
    assert_refused(run_on_ranks(command, 1, arguments), "lm_head.A", "merge_and_unload")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_yes_no_rows_stay_and_peft_asks_the_causal_model(tmp_path):
    folder = train(tmp_path, "yes_no")
    written = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (written["task_type"], written["modules_to_save"]) == ("CAUSAL_LM", None)
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    yes, no = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("yes", "no"))
    expected = scores_of(AutoModelForSequenceClassification.from_pretrained(folder / "export"), tokenizer)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), str(folder / "adapter"))
    torch.testing.assert_close(scores_of(adapted, tokenizer, (yes, no)), expected, rtol=1e-5, atol=1e-5)
    start, end = load_file(folder / "model" / "model.safetensors"), load_file(folder / "export" / "model.safetensors")
    embeddings = start["model.embed_tokens.weight"]
    assert torch.equal(end["model.embed_tokens.weight"], embeddings)
    assert torch.equal(end["score.weight"], (embeddings[yes] - embeddings[no])[None])


@pytest.mark.slow
def test_encoders_train_pooler_and_classifier_whole(tmp_path):
    from tests.helpers.rerank_reference import save_model

    model = save_model(tmp_path, "encoder")
    config = run_settings(str(model), tmp_path, "score", lora={"rank": 4, "target_modules": ["query", "value"]},
                          training={"learning_rate": 2e-2},
                          checkpoint={"directory": str(tmp_path / "run"), "export_at_end": str(tmp_path / "export")},
                          data={"query_max_length": 60, "document_max_length": 60})
    run(["train", config])
    run(["convert", "megatron-to-hf", str(tmp_path / "run"), str(tmp_path / "adapter"), "--format", "peft"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    models = (AutoModelForSequenceClassification.from_pretrained(tmp_path / "export"),
              PeftModel.from_pretrained(base, str(tmp_path / "adapter")))
    with torch.no_grad():
        merged, adapted = (torch.stack([each.eval()(**tokenizer(*pair, return_tensors="pt")).logits[0, 0]
                                        for pair in PROBE_PAIRS]) for each in models)
    assert float(merged.std()) > 1e-3
    torch.testing.assert_close(adapted, merged, rtol=1e-5, atol=1e-5)
    start, end = load_file(model / "model.safetensors"), load_file(tmp_path / "export" / "model.safetensors")
    changed = {".".join(name.split(".")[-3:-1]) for name, tensor in end.items() if not torch.equal(tensor, start[name])}
    assert changed == {"self.query", "self.value", "pooler.dense", "classifier"}
