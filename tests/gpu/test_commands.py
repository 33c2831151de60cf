"""What a run offers, on a GPU: kernels, recomputation, placement of the optimizer, checkpoints, exports, commands.

Not run on a GPU so far, but on the pretend device (docs/pretend_device.md).
"""

import json

import numpy as np
import pytest
import torch

from tests.helpers.commands import small_beir  # noqa: F401  fixtures
from tests.helpers.device_runs import call, train
from tests.helpers.reranker_runs import lists, run_settings
from tests.helpers.runs import go_back
from tests.helpers.toys import MINI_EN, save_reranker

pytestmark = pytest.mark.gpu
EXACT, HALF = 1e-4, 0.1
"""Relative difference to the CPU's float32 curve, of float32 and of bfloat16."""
BFLOAT16 = {"model": {"dtype": "bfloat16"}}


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory):
    """(run directory, export, curve) of a run in bfloat16 by the flash kernel; saves while it trains."""
    folder = tmp_path_factory.mktemp("trained")
    # The export is loaded with Sentence Transformers and compared with the model before the command succeeds.
    curve = train(models["qwen3"], folder / "run", **BFLOAT16, checkpoint={
        "save_every_steps": 2, "keep": 0, "async_save": True, "export_at_end": str(folder / "export")})
    return folder / "run", folder / "export", curve


def test_bfloat16_by_flash_is_near_float32(models, cpu_curve, tmp_path):
    curve = train(models["qwen3"], tmp_path / "run", **BFLOAT16)
    assert curve == pytest.approx(cpu_curve("qwen3"), rel=HALF)
    assert curve != cpu_curve("qwen3")


@pytest.mark.slow
def test_the_export_gives_the_runs_vectors(trained, tmp_path):
    from sentence_transformers import SentenceTransformer

    run, export, _ = trained
    texts = [json.loads(line)["query"] for line in MINI_EN.read_text(encoding="utf-8").splitlines()[:12]]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    call(["encode", "--model", run, "--input", tmp_path / "texts.jsonl", "--output", tmp_path / "vectors.npy"])
    ours, stock = np.load(tmp_path / "vectors.npy"), SentenceTransformer(str(export), device="cpu").encode(texts)
    cosines = (ours * stock).sum(1) / np.linalg.norm(stock, axis=1)  # of length 1 to the precision of bfloat16
    assert cosines.min() > 0.999 and np.abs(ours - ours[0]).max() > 0.01


@pytest.mark.slow
def test_resumed_run_continues_the_curve(models, trained, tmp_path):
    run, _, curve = trained
    resumed = go_back(run, tmp_path / "resumed", 2)
    assert len((resumed / "metrics.jsonl").read_text().splitlines()) >= 2
    again = train(models["qwen3"], resumed, **BFLOAT16, checkpoint={"save_every_steps": 2, "keep": 0})
    assert again == pytest.approx(curve, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["training.recompute=full", "optimizer.cpu_offload=true"])
def test_where_things_lie_changes_nothing(models, trained, setting, tmp_path):
    *_, curve = trained
    assert train(models["qwen3"], tmp_path / "run", setting, **BFLOAT16) == pytest.approx(curve, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("kind, setting", [
    ("qwen3", "training.micro_batch_tokens=512"), ("qwen3", "model.attention=sdpa"),
    ("bert", "training.recompute=full"), ("qwen3", "objective.learnable_temperature=true")])
def test_float32_settings_are_the_cpus(models, cpu_curve, kind, setting, tmp_path):
    tolerance = HALF if "temperature" in setting else EXACT  # the CPU's curve has a fixed one
    assert train(models[kind], tmp_path / "run", setting) == pytest.approx(cpu_curve(kind), rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "qwen3_moe"])
def test_other_families_in_bfloat16_are_near_float32(models, cpu_curve, kind, tmp_path):
    assert train(models[kind], tmp_path / "run", **BFLOAT16) == pytest.approx(cpu_curve(kind), rel=HALF)


@pytest.mark.slow
def test_offloaded_optimizer_is_saved_and_resumed(models, tmp_path):
    settings = BFLOAT16 | {"optimizer": {"cpu_offload": True}, "checkpoint": {"save_every_steps": 2, "keep": 0}}
    curve = train(models["qwen3"], tmp_path / "run", **settings)
    resumed = go_back(tmp_path / "run", tmp_path / "resumed", 2)
    assert train(models["qwen3"], resumed, **settings) == pytest.approx(curve, rel=1e-3)


@pytest.mark.slow
def test_adapters_are_trained_and_exported(models, trained, tmp_path):
    losses = train(models["qwen3"], tmp_path / "run", **BFLOAT16, lora={"rank": 4, "alpha": 16, "dropout": 0.1},
                   training={"recompute": "full", "learning_rate": 2e-2},
                   checkpoint={"export_at_end": str(tmp_path / "export")})
    assert losses[0] == pytest.approx(trained[2][0], rel=1e-2)  # a new adapter changes nothing
    assert "the same vectors" in call(["convert", "megatron-to-hf", tmp_path / "run", tmp_path / "peft", "--format",
                                       "peft"])
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_conversion_both_ways(models, trained, tmp_path):
    call(["convert", "hf-to-megatron", models["qwen3"], tmp_path / "there"])
    report = call(["convert", "megatron-to-hf", tmp_path / "there", tmp_path / "back"])
    assert "cosine >= 1.000000" in report


@pytest.mark.slow
def test_evaluate_and_mine(trained, small_beir, tmp_path):
    run, export, _ = trained
    scores = [json.loads(call(["evaluate", "--model", model, "--data", small_beir]).splitlines()[-1])
              for model in (run, export)]
    assert scores[0]["ndcg@10"] == pytest.approx(scores[1]["ndcg@10"], abs=0.02) and scores[0]["ndcg@10"] > 0.1
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(MINI_EN.read_text(encoding="utf-8").splitlines()[:40]) + "\n")
    call(["mine", "--model", run, "--data", rows, "--output", tmp_path / "mined.jsonl", "--num-negatives", 2])
    mined = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text().splitlines()]
    assert len(mined) == 40 and all(len(row["negatives"]) == 2 for row in mined)


@pytest.mark.slow
def test_a_reranker_is_trained_exported_and_evaluated(tmp_path):
    model = save_reranker(tmp_path / "model", "Qwen3ForCausalLM")
    config = run_settings(model, tmp_path, checkpoint={"export_at_end": str(tmp_path / "export")},
                          evaluation={"reranking": [lists(tmp_path / "docs.jsonl")], "at_start": False})
    call(["train", config])
    scores = json.loads(call(["evaluate", "--model", tmp_path / "run", "--data", tmp_path / "docs.jsonl"]))
    assert 0 < scores["ndcg@10"] <= 1 and (tmp_path / "export" / "model.safetensors").is_file()


def test_doctor_names_the_gpu():
    assert torch.cuda.get_device_name(0) in call(["doctor"])
