"""QLoRA runs, exported: PEFT's adapter over the weights that bitsandbytes quantizes, and the merged model, give the
vectors and scores that were trained."""

import json

import numpy as np
import pytest
import torch
import transformers
import yaml
from peft import PeftModel

from megatron_embed.export.reranker import PROBE_PAIRS
from tests.helpers.reranker_runs import prompt, run, run_settings
from tests.helpers.runs import configuration
from tests.helpers.toys import MINI_EN, save_model, save_reranker

pytestmark = pytest.mark.slow
WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2}
TEXTS = [json.loads(line)["query"] for line in MINI_EN.read_text(encoding="utf-8").splitlines()[:12]]


def adapted(loader, folder, kind, base="model", **options):
    """PEFT's model over a base that Transformers and bitsandbytes quantize."""
    quantization = (transformers.BitsAndBytesConfig(load_in_8bit=True) if kind == "int8" else
                    transformers.BitsAndBytesConfig(
                        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                        bnb_4bit_compute_dtype=torch.float32))
    loaded = loader.from_pretrained(folder / base, quantization_config=quantization, dtype=torch.float32,
                                    device_map="cpu", **options)
    return PeftModel.from_pretrained(loaded, str(folder / "adapter")).train()  # bitsandbytes' int8: inputs as they are


def vectors_of(model, tokenizer):
    """[texts, hidden] unit vectors of a stock model."""
    with torch.no_grad():
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in TEXTS]
    return torch.nn.functional.normalize(torch.stack(states), dim=1).numpy()


def encode(model, folder):
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    run(["encode", "--model", str(model), "--input", str(folder / "texts.jsonl"), "--output",
         str(folder / "vectors.npy"), "--pooling", "mean"])
    return np.load(folder / "vectors.npy")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_peft_and_the_merged_model_give_our_vectors(tmp_path, kind, record_property):
    base = save_model(tmp_path / "model", "qwen3", tokenizer=True, **WIDTHS)
    values = configuration(base, tmp_path / "run", train_steps=4, learning_rate=2e-2)
    values["model"]["quantization"] = kind
    values["lora"] = {"rank": 4}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    run(["train", str(tmp_path / "run.yaml")])
    report = run(["convert", "megatron-to-hf", str(tmp_path / "run"), str(tmp_path / "adapter"), "--format", "peft"])
    assert "PEFT, on the base model," in report
    run(["convert", "megatron-to-hf", str(tmp_path / "run"), str(tmp_path / "merged"), "--merge-lora"])
    ours = encode(tmp_path / "run", tmp_path)
    assert np.abs(ours - encode(base, tmp_path)).max() > 0.01, "nothing was learned, so nothing is shown"
    theirs = vectors_of(adapted(transformers.AutoModel, tmp_path, kind),
                        transformers.AutoTokenizer.from_pretrained(base))
    merged = encode(tmp_path / "merged", tmp_path)
    record_property("largest_difference_peft", np.abs(theirs - ours).max())
    record_property("largest_difference_merged", np.abs(merged - ours).max())
    assert np.abs(theirs - ours).max() <= 1e-5
    assert np.abs(merged - ours).max() <= 1e-5


def test_bfloat16_adapters_over_float32_files_are_compared(tmp_path):
    """Training quantizes the values of the file, not those rounded to model.dtype."""
    base = save_model(tmp_path / "model", "qwen3", tokenizer=True, **WIDTHS)
    values = configuration(base, tmp_path / "run", train_steps=2, learning_rate=2e-2)
    values["model"] |= {"quantization": "nf4", "dtype": "bfloat16"}
    values["lora"] = {"rank": 4}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    run(["train", str(tmp_path / "run.yaml")])
    report = run(["convert", "megatron-to-hf", str(tmp_path / "run"), str(tmp_path / "adapter"), "--format", "peft"])
    assert "PEFT, on the base model," in report


@pytest.mark.parametrize("kind, head", [("nf4", "score"), ("nf4", "yes_no"), ("int8", "score")])
def test_rerankers(tmp_path, kind, head, record_property):
    """PEFT's and the merged cross-encoder's scores are equal; training compared the latter with its own."""
    model = save_reranker(tmp_path / "model", "Qwen3ForCausalLM", hidden_size=64, intermediate_size=128)
    config = run_settings(model, tmp_path, head, model={"quantization": kind}, lora={"rank": 4, "alpha": 16},
                          training={"learning_rate": 2e-2}, checkpoint={"export_at_end": str(tmp_path / "export")})
    run(["train", config])
    run(["convert", "megatron-to-hf", str(tmp_path / "run"), str(tmp_path / "adapter"), "--format", "peft"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter")
    merged = scores_of(transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "export"), tokenizer)
    assert float(merged.std()) > 1e-3
    if head == "score":
        theirs = scores_of(adapted(transformers.AutoModelForSequenceClassification, tmp_path, kind, num_labels=1),
                           tokenizer)
    else:
        answers = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("yes", "no")]
        theirs = scores_of(adapted(transformers.AutoModelForCausalLM, tmp_path, kind), tokenizer, answers)
    record_property("largest_difference", float((theirs - merged).abs().max()))
    torch.testing.assert_close(theirs, merged, rtol=1e-5, atol=1e-5)


def scores_of(model, tokenizer, answers=None):
    """Scores of PROBE_PAIRS by a stock class."""
    result = []
    with torch.no_grad():
        for pair in PROBE_PAIRS:
            logits = model(**tokenizer(prompt(pair), add_special_tokens=False, return_tensors="pt")).logits[0]
            result.append(logits[0] if answers is None else logits[-1, answers[0]] - logits[-1, answers[1]])
    return torch.stack(result)
