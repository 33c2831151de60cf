"""Compare the loss curves of two versions of Megatron-Core or of this repository; each resumes the other's checkpoints.

Trains small models of random weights on two ranks: with this version, with the other, and with one version for half of
the steps and the other for the rest. Prints the difference of the loss curves for each model and layout.

    make env PYTHON=python3.12 VENV=/tmp/other
    /tmp/other/bin/python -m pip install --no-deps megatron-core==0.19.2
    python tools/versions.py --other /tmp/other/bin/python

    git worktree add /tmp/before COMMIT
    python tools/versions.py --tree /tmp/before --steps 20 --no-resume
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import children
import yaml
from small_models import save_random_model

REPOSITORY = Path(__file__).resolve().parents[1]
RANKS = 2
SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
DECODER = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", {**SIZES, "intermediate_size": 48}),
    "qwen3": ("Qwen3Config", DECODER),
    "qwen3_moe": ("Qwen3MoeConfig", {
        **DECODER, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2})}
CASES = (
    ("bert", "DP2", {}, "float32"), ("bert", "TP2", {"tensor_model_parallel_size": 2}, "float32"),
    ("qwen3", "DP2", {}, "bfloat16"), ("qwen3", "PP2", {"pipeline_model_parallel_size": 2}, "float32"),
    ("qwen3", "CP2", {"context_parallel_size": 2}, "float32"),
    ("qwen3_moe", "EP2", {"expert_model_parallel_size": 2}, "bfloat16"),
    ("qwen3_moe", "TP2", {"tensor_model_parallel_size": 2}, "float32"))
VERSION = ("import importlib.metadata as metadata, platform\n"
           "print(metadata.version('megatron-core'), 'on Python', platform.python_version())")


class Version(NamedTuple):
    """An interpreter with its environment, and a checkout of this repository."""

    python: str
    tree: Path


def losses(versions: Sequence[Version], steps: int, model: str, layout: dict[str, int], dtype: str,
           folder: Path) -> list[float]:
    """Loss of each step; each version runs an equal share of the steps."""
    values: dict[str, Any] = {
        "model": {"path": model, "dtype": dtype}, "parallel": layout, "objective": {"temperature": 0.1},
        "embedding": {"pooling": "mean"},
        "data": {"train": [str(REPOSITORY / "examples" / "data" / "mini_en" / "train.jsonl")], "num_negatives": 1,
                 "query_max_length": 32, "document_max_length": 64},
        "training": {"global_batch_size": 16, "micro_batch_size": 4, "learning_rate": 1.0e-3,
                     "lr_decay_style": "constant", "hidden_dropout": 0.1, "attention_dropout": 0.1},
        "checkpoint": {"directory": str(folder)},
        "logging": {"directory": str(folder / "logs"), "every_steps": 1, "tensorboard": False}}
    folder.mkdir(parents=True)
    for share, version in enumerate(versions, start=1):
        values["training"]["train_steps"] = share * steps // len(versions)
        (folder / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        done = children.run(
            [version.python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "-m",
             "megatron_embed", "train", str(folder / "run.yaml")], cwd=version.tree, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(version.tree)},
            check=False)
        if done.returncode:
            sys.exit(f"{version}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    lines = (folder / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    curve = [json.loads(line)["loss"] for line in lines]
    assert len(curve) == steps, curve
    return curve


def distance(curve: Sequence[float], other: Sequence[float]) -> str:
    """The largest relative difference of two loss curves, in words."""
    largest = max(abs(one - two) / abs(two) for one, two in zip(curve, other, strict=True))
    return "bit-equal" if largest == 0 else f"{largest:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", metavar="PYTHON", default=sys.executable,
                        help="the interpreter of the other environment (default: this one)")
    parser.add_argument("--tree", metavar="DIR", type=Path, default=REPOSITORY,
                        help="the other checkout of this repository (default: this one)")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps (default: 4)")
    parser.add_argument("--no-resume", action="store_true", help="compare whole runs only, do not resume")
    args = parser.parse_args()
    here, other = Version(sys.executable, REPOSITORY), Version(args.other, args.tree.resolve())
    for name, version in (("this version", here), ("the other", other)):
        installed = subprocess.run([version.python, "-c", VERSION], capture_output=True, text=True, check=True)
        print(f"{name}: Megatron-Core {installed.stdout.strip()}")
    columns = ["the other alone", *([] if args.no_resume else ["this one, then the other", "the other, then this"])]
    print(f"\n| model | {RANKS} ranks | dtype | " + " | ".join(columns) + " |")
    print("|---|---|---|" + "---|" * len(columns))
    orders = [[other]] if args.no_resume else [[other], [here, other], [other, here]]
    for kind, name, layout, dtype in CASES:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            config_class, sizes = MODELS[kind]
            model = save_random_model(folder / "model", config_class, **sizes)
            expected = losses([here], args.steps, model, layout, dtype, folder / "here")
            distances = [distance(losses(order, args.steps, model, layout, dtype, folder / str(index)), expected)
                         for index, order in enumerate(orders)]
            print(f"| {kind} | {name} | {dtype} | " + " | ".join(distances) + " |", flush=True)


if __name__ == "__main__":
    main()
