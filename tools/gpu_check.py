"""Check the trainer on the GPUs of this machine; see tools/gpu_check.sh. Exit code 1 if a check failed."""

import argparse
import datetime
import functools
import importlib.util
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_models import TOY_QWEN3, make_decoder, save_qwen3, shape_of_size, small_model, write_rows
from gpu_runs import CURVE, DEMO, REPOSITORY, SAMPLE, STEPS, Machine, Table, reason_of
from measurement import exit_on_signals

sys.path.insert(0, str(REPOSITORY))
FLOAT32, BFLOAT16 = 1e-3, 0.05
"""Largest difference of the loss at any step to the CPU's float32 run, relative to its first loss. In bfloat16 weights
begin on the grid of that dtype, and those above 0.03 lose Adam's first update of 1e-4 to rounding, on CPUs as on GPUs:
the loss is 0.42 in place of 0.39 in the third step, after 0.69 in the first, and the same again in the fourth."""
ACTIVATIONS = 0.2
"""Largest relative difference of measured activations to planned ones."""
TEXT_TOKENS = 256
LAYERS = 4
"""Layers of the models whose speed is measured; a whole model's is extrapolated by its number of layers."""


def largest_difference(lines: list[dict[str, Any]], expected: list[float], tolerance: float) -> tuple[str, bool]:
    """Description of the largest difference, relative to the first loss, and whether it is within the tolerance."""
    losses = [line["loss"] for line in lines if "loss" in line]
    if len(losses) != len(expected):
        return f"{len(losses)} steps in place of {len(expected)}", False
    worst = max(abs(loss - other) for loss, other in zip(losses, expected, strict=True)) / expected[0]
    return f"loss of {len(losses)} steps within {worst:.1e} of the CPU's (allowed {tolerance:.0e})", worst <= tolerance


def compare_curves(model: str, machine: Machine, table: Table) -> None:
    """Compare the CPU's float32 curve with one rank by kernel, a resumed run, and two ranks by layout."""
    expected: list[float] = []
    chosen = [f"model.path={model}"]

    def reference() -> tuple[str, bool]:
        expected.extend(line["loss"] for line in machine.train([*chosen, "model.dtype=float32"], "reference",
                                                               cuda=False))
        falls = len(expected) == STEPS and expected[-1] < expected[0]
        return f"loss {expected[0]:.3f} to {expected[-1]:.3f} in {len(expected)} steps", falls

    if not table.add("CPU, float32: what the others are compared with", reference, limit=100, always=True):
        return

    def curve(name: str, tolerance: float, *overrides: str, ranks: int = 1) -> None:
        if ranks > machine.ranks:
            table.add(name, f"needs {ranks} GPUs, here {machine.ranks}")
            return
        log = re.sub(r"\W+", "_", name)
        table.add(name, lambda: largest_difference(
            machine.train([*chosen, *overrides], log, ranks=ranks), expected, tolerance), limit=60)

    float32, half = "model.dtype=float32", "model.dtype=bfloat16"
    curve("float32", FLOAT32, float32)
    curve("bfloat16, sdpa", BFLOAT16, half, "model.attention=sdpa")
    if machine.cuda:
        curve("bfloat16, flash", BFLOAT16, half, "model.attention=flash")
        curve("bfloat16, optimizer in host memory", BFLOAT16, half, "optimizer.cpu_offload=true")
        for name, setting in {"te": "model.attention=te", "layers of te": "model.backend=te",
                              "precision-aware optimizer": "optimizer.precision_aware=true"}.items():
            if importlib.util.find_spec("transformer_engine") is None:
                table.add(f"bfloat16, {name}", "Transformer Engine is not installed")
            else:
                curve(f"bfloat16, {name}", BFLOAT16, half, setting)
    curve("float32, full recomputation", FLOAT32, float32, "training.recompute=full")
    curve("float32, micro-batches by tokens", FLOAT32, float32, "training.micro_batch_tokens=1024")
    table.add("float32, stopped by its time budget and resumed", lambda: resumed([*chosen, float32], machine, expected),
              limit=60)
    for name, sizes in {"DP 2": ("optimizer.overlap_grad_reduce=false",),
                        "DP 2, whole optimizer": ("optimizer.distributed=false",),
                        "DP 2, overlapped": ("optimizer.overlap_grad_reduce=true",
                                             "optimizer.overlap_param_gather=true"),
                        "TP 2": ("parallel.tensor_model_parallel_size=2",),
                        "PP 2": ("parallel.pipeline_model_parallel_size=2",),
                        "PP 2, interleaved": ("parallel.pipeline_model_parallel_size=2",
                                              "parallel.virtual_pipeline_model_parallel_size=2"),
                        "CP 2": ("parallel.context_parallel_size=2",)}.items():
        curve(f"float32, {name}", FLOAT32, float32, *sizes, ranks=2)


def resumed(overrides: list[str], machine: Machine, expected: list[float]) -> tuple[str, bool]:
    """Compare the curve of a run that stops after its first step and is resumed."""
    saved = [*overrides, f"checkpoint.directory={machine.folder / 'saved'}"]
    first = machine.train([*saved, "training.exit_duration_minutes=0.0001"], "resumed")
    result, holds = largest_difference(machine.train(saved, "resumed"), expected, FLOAT32)
    return f"stopped after {len(first)}, {result}", holds and 0 < len(first) < STEPS


def measure_memory(model: str, machine: Machine, table: Table) -> None:
    """Compare speed and memory of a random decoder on all ranks, with texts of full length, with `plan`."""
    path, rows = make_decoder(model, machine), machine.folder / "long.jsonl"
    words = " ".join(json.loads(line)["positive"][0] for line in SAMPLE.read_text("utf-8").splitlines())
    size, dtype = 16 * TEXT_TOKENS, "bfloat16" if machine.cuda else "float32"
    # Enough of them that activations, not the optimizer's temporaries, dominate the memory of a step.
    micro_batches = {"none": 4, "full": 4} if machine.toy else {"none": 16, "full": 64}
    starts = [997 * index % (len(words) - size) for index in range(4 * max(micro_batches.values()) * machine.ranks)]
    rows.write_text("".join(json.dumps({"query": words[first:first + size], "positive": [words[second:second + size]]})
                            + "\n" for first, second in zip(starts[::2], starts[1::2], strict=True)), encoding="utf-8")
    for recompute, micro in micro_batches.items():
        overrides = [f"model.path={path}", f"model.dtype={dtype}", f"data.train=[{rows}]", "data.num_negatives=0",
                     f"training.recompute={recompute}", f"training.global_batch_size={2 * micro * machine.ranks}",
                     f"training.micro_batch_size={micro}",
                     f"data.query_max_length={TEXT_TOKENS}", f"data.document_max_length={TEXT_TOKENS}"]
        name = (f"Qwen3 of {'toy size' if machine.toy else '0.6 billion'}, {dtype}, ranks: {machine.ranks}, recompute "
                f"{recompute}")
        table.add(name, lambda overrides=overrides, recompute=recompute: beside_plan(  # type: ignore[misc]
            overrides, f"memory_{recompute}", machine), limit=90)


def beside_plan(overrides: list[str], log: str, machine: Machine) -> tuple[str, bool]:
    """Median step of a run; on a GPU, whether its memory beyond the counted parts agrees with `plan`."""
    from megatron_embed.config.load import load_config
    from megatron_embed.planning.memory import GIB, grid_of, worst_stage
    from megatron_embed.planning.shapes import shape_of

    lines = machine.train(overrides, log, ranks=machine.ranks)[2:]
    middle = {key: sorted(line.get(key, 0.0) for line in lines)[len(lines) // 2]
              for key in ("tokens_per_second", "tflops_per_rank", "mfu", "memory_gib", "padding_fraction")}
    config = load_config(str(REPOSITORY / DEMO), [*CURVE, *overrides])
    _, planned = worst_stage(config, shape_of(config.model.path), grid_of(config, machine.ranks))
    text = f"{middle['tokens_per_second']:,.0f} tokens/s, {middle['tflops_per_rank']:.3g} TFLOP/s per rank"
    if machine.toy:
        return f"{text}, {middle['memory_gib']:.2f} GiB (of toy size: not compared)", True
    counted = planned.parameters + planned.gradients + planned.optimizer + planned.loss
    activations = middle["memory_gib"] * GIB - counted
    ratio = activations / planned.activations
    return (f"{text}, {middle['mfu']:.1%} of the peak, {middle['memory_gib']:.2f} GiB at most; minus "
            f"{counted / GIB:.2f} of counted parts {activations / GIB:.2f} of activations, {ratio:.2f} of the plan's",
            abs(ratio - 1.0) <= ACTIVATIONS)


def doctor(machine: Machine) -> tuple[str, bool]:
    """Print what this machine has. Never fails: what these checks do not use may be missing."""
    _, out, err = machine.run([sys.executable, "-m", "megatron_embed", "doctor"], {})
    print(out + err, file=sys.stderr, flush=True)
    return (out.strip().splitlines() or ["no output"])[-1], True


def check_breaks(model: str, machine: Machine, table: Table) -> None:
    """What has failed in the first step on a GPU: the default attention kernel, and experts without Transformer
    Engine."""
    if machine.cuda:
        add_probe(table, machine, "flash kernel against float64", "flash", 60)
    else:
        table.add("flash kernel against float64", "no GPU is used")

    def experts() -> list[str]:
        path = save_qwen3(model, machine, "experts", TOY_QWEN3 | {"head_dim": 32}, num_experts=4,
                          num_experts_per_tok=2, moe_intermediate_size=64)
        return [f"model.path={path}", "training.train_steps=3", "embedding.pooling=lasttoken"]

    add_probe(table, machine, f"mixture of experts, {half(machine)}", "experts", 60, experts)


def half(machine: Machine) -> str:
    return "bfloat16" if machine.cuda else "float32"


def add_probe(table: Table, machine: Machine, name: str, probe: str, limit: float,
              overrides: Callable[[], list[str]] | None = None, **options: Any) -> None:
    """Add the result of a probe of tools/gpu_probes.py as a row, and its numbers to the JSON file.

    `overrides`: settings of the run that the probe trains; called when it is its turn.
    """

    def check() -> tuple[str, bool]:
        settings = [] if overrides is None else [*CURVE, f"model.dtype={half(machine)}", *overrides()]
        result = machine.probe(probe, config=str(REPOSITORY / DEMO), overrides=settings, **options)
        table.values[name] = {key: value for key, value in result.items() if key not in ("holds", "text")}
        return result["text"], result["holds"]

    table.add(name, check, limit=limit)


def measure(model: str, machine: Machine, table: Table) -> None:
    """Dropout replay, the loss, memory of a checkpoint, and speed beside Sentence Transformers."""
    rows = machine.folder / "batch.jsonl"
    rows.write_text("".join(SAMPLE.read_text("utf-8").splitlines(keepends=True)[:32]), encoding="utf-8")
    for kernel in ("flash", "sdpa") if machine.cuda else ("sdpa",):
        settings = [f"model.attention={kernel}", f"data.train=[{rows}]", f"model.path={model}"]
        add_probe(table, machine, f"dropout replay, {kernel}", "dropout", 60, settings.copy, attention_dropout=0.1)
    size = 512 if machine.toy else 65536
    add_probe(table, machine, f"loss and gradients, {size:,} x 384", "loss", 60, rows=size, dim=384, rounds=3)
    add_probe(table, machine, "memory of a checkpoint", "save", 90, lambda: [
        f"model.path={make_decoder(model, machine)}", "training.train_steps=2", "training.warmup_steps=0",
        "training.global_batch_size=16",
        "embedding.pooling=lasttoken", "checkpoint.save_every_steps=1"])
    for name in ("0.6B", "4B", "8B"):
        measure_speed(name, model, machine, table)


def measure_speed(size: str, model: str, machine: Machine, table: Table) -> None:
    """Speed of layers of one size, of our trainer and of Sentence Transformers, on the same rows."""
    shape = shape_of_size(size)
    whole, steps, batch = shape["num_hidden_layers"], 8, 16 if machine.toy else 256
    path, rows = machine.folder / f"layers_{size}", machine.folder / f"speed_{size}.jsonl"
    name = f"{LAYERS} {'toy ' if machine.toy else ''}layers of Qwen3-{size}"

    def ours() -> tuple[str, bool]:
        write_rows(rows, steps * batch, 30 if machine.toy else 200)
        save_qwen3(model, machine, path.name, TOY_QWEN3 if machine.toy else shape | {"num_hidden_layers": LAYERS})
        lines = machine.train([
            f"model.path={path}", f"model.dtype={half(machine)}", f"data.train=[{rows}]", "data.num_negatives=0",
            "embedding.pooling=lasttoken", f"training.train_steps={steps}", f"training.global_batch_size={batch}",
            f"training.micro_batch_tokens={1024 if machine.toy else 16384}", "data.query_max_length=256",
            "data.document_max_length=256"], f"speed_{size}")[3:]
        middle = {key: statistics.median(line.get(key, 0.0) for line in lines)
                  for key in ("tokens_per_second", "mfu", "padding_fraction", "step_seconds")}
        text, table.values[name] = speed_text(middle["tokens_per_second"], whole), middle
        return f"{text}, {middle['mfu']:.1%} of the peak, padding {middle['padding_fraction']:.1%}", True

    def peer() -> tuple[str, bool]:
        output = machine.folder / f"peer_{size}"
        code, _, err = machine.run([
            sys.executable, "tools/peer_training.py", "--model", str(path), "--data", str(rows), "--output",
            str(output), "--steps", str(steps), "--batch-size", str(batch), "--max-length", "256", "--temperature",
            "0.05", "--learning-rate", "1e-5", "--mini-batch-size", str(min(batch, 64)), "--device",
            "cuda" if machine.cuda else "cpu", *(["--precision", "bf16"] if machine.cuda else [])],
            {"HF_HUB_OFFLINE": "1"})
        if code:
            machine.failures.append(f"Sentence Transformers: exit code {code}\n" + "\n".join(err.splitlines()[-40:]))
            raise RuntimeError(reason_of(err) or f"exit code {code}")
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()][3:]
        speed = statistics.median(line["tokens"] / line["step_seconds"] for line in lines)
        table.values[f"{name}, peer"] = {"tokens_per_second": speed}
        ratio = table.values.get(name, {}).get("tokens_per_second", 0.0) / speed
        return f"{speed_text(speed, whole)}; ours is {ratio:.2f} times as fast", True

    table.add(name, ours, limit=60)
    table.add(f"{name}, Sentence Transformers", peer, limit=60)


def speed_text(tokens_per_second: float, whole: int) -> str:
    """Real tokens per second of LAYERS layers, and of a model of `whole` layers by extrapolation."""
    return f"{tokens_per_second:,.0f} tokens/s ({tokens_per_second * LAYERS / whole:,.0f} with all {whole} layers)"


def run_tests(machine: Machine, speed: str) -> tuple[str, bool]:
    """Run the tests marked gpu and multi_gpu, from files with these marks only: others may need missing packages.

    Args:
        speed: slow or not slow.
    """
    mark = re.compile(r"pytest\.mark\.(multi_)?gpu\b")
    files = [str(path) for path in sorted((REPOSITORY / "tests").rglob("test_*.py"))
             if mark.search(path.read_text("utf-8"))]
    if not files:
        return "there are none", True
    code, out, err = machine.run([sys.executable, "-m", "pytest", "-q", "-m", f"(gpu or multi_gpu) and {speed}",
                                  "-p", "no:cacheprovider", *files], {})
    if code:
        machine.failures.append(f"tests: exit code {code}\n" + "\n".join((out + err).splitlines()[-100:]))
    return (out.strip().splitlines() or ["no output"])[-1].strip("= "), code == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    out = os.environ.get("OUT")
    parser.add_argument("--output", type=Path, default=Path(out, "gpu_check.md") if out else None,
                        help="also write the table to this Markdown file, the numbers as .json and the last log lines "
                        "of failed runs beside it (default: $OUT/gpu_check.md if OUT is set)")
    parser.add_argument("--tiny", action="store_true", help="models of toy size, to test this script on a GPU")
    parser.add_argument("--cpu", action="store_true", help="use CPU ranks, to test this script itself")
    parser.add_argument("--minutes", type=float, default=7.5, help="time budget; later checks are not run")
    parser.add_argument("--patience", type=float, default=1.0, help="factor of each check's own time limit, for a busy "
                        "machine")
    parser.add_argument("--only", default="", metavar="REGEX", help="run only checks with matching names")
    parser.add_argument("--model", type=Path, metavar="DIR", help="encoder to use instead of all-MiniLM-L6-v2 or "
                        "random weights")
    arguments = parser.parse_args()
    exit_on_signals()
    deadline = time.monotonic() + 60 * arguments.minutes
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    cuda = not arguments.cpu
    if cuda and not torch.cuda.is_available():
        sys.exit("no CUDA device is visible; --cpu tests the script itself")
    with tempfile.TemporaryDirectory() as name:
        machine = Machine(cuda=cuda, ranks=torch.cuda.device_count() if cuda else 2, deadline=deadline,
                          folder=Path(name), tiny=arguments.tiny, patience=arguments.patience)
        device = f"{machine.ranks} x {torch.cuda.get_device_name(0)}" if cuda else "CPU ranks, no GPU"
        table = Table(f"{datetime.date.today()}, {device}, torch {torch.__version__}", arguments.output,
                      arguments.only, machine)
        table.add("doctor", lambda: doctor(machine), limit=60, always=True)
        model = small_model(arguments.model, machine)
        check_breaks(model, machine, table)
        measure(model, machine, table)
        compare_curves(model, machine, table)
        measure_memory(model, machine, table)
        for speed in ("not slow", "slow"):
            table.add(f"tests marked gpu or multi_gpu, {speed}",
                      functools.partial(run_tests, machine, speed) if cuda else "no GPU is used")
        if machine.failures:
            text = "\n\n".join(machine.failures)
            print(text, file=sys.stderr)
            if arguments.output is not None:
                arguments.output.with_suffix(".failures.log").write_text(text + "\n", encoding="utf-8")
    verdicts = [verdict for *_, verdict in table.rows]
    print(f"\n{verdicts.count('yes')} hold, {verdicts.count('NO')} do not, {verdicts.count('not run')} were not run")
    return 1 if "NO" in verdicts or "yes" not in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
