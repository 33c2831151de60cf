"""Conversion both ways against `cp` of the same files: seconds, GB/s, peak memory, measured in one run.

    python tools/bench_convert.py --scratch /data/new                     Qwen3-8B's shape, 16.4 GB; takes 50 GB of disk
    python tools/bench_convert.py --scratch /data/new --shape llama-2-7b  Llama-2-7B's shape, 13.5 GB
    python tools/bench_convert.py --scratch /data/new --layers 4          fewer layers, for a smaller disk

A checkpoint of random bfloat16 weights in shards is written first. Then, `--rounds` times in turn and in both
directions: `cp -r --reflink=never` of the source, `convert` of the source. Each runs in its own process, its files are
on the disk (fsync) when the clock stops, and its input is not in the page cache when it starts. The time of `convert`
includes the start of Python, and reading back and comparing every tensor that it wrote, from the page cache. Peak
memory is the process's maximum resident set as the kernel reports it. At the end the `safetensors` library compares the
last result with the source, tensor by tensor. On a busy machine compare the CPU seconds: a copy needs few, so it loses
less time than a conversion.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from measurement import exit_on_signals

# This process must stay small, so it does not import torch: Linux counts its memory as the peak of each new child.
SHAPES = {
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288,
        "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "tie_word_embeddings": False, "attention_bias": False, "rope_parameters": {"rope_theta": 1e6,
        "rope_type": "default"}, "dtype": "bfloat16"},
    "llama-2-7b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
        "attention_bias": False, "dtype": "bfloat16"},
}
MAXIMUM_PEAK_GB, MINIMUM_RATIO = 4.0, 0.5


def main() -> int:
    args = parse_arguments()
    if args.role == "make":
        make_checkpoint(args.scratch / "source", SHAPES[args.shape] | layers(args), args.max_shard_size)
        return 0
    if args.role == "check":
        return compare(args.scratch / "source", args.scratch / "back")
    if args.scratch.exists() and any(args.scratch.iterdir()):
        raise SystemExit(f"--scratch {args.scratch}: is not empty; choose a new directory")
    args.scratch.mkdir(parents=True, exist_ok=True)
    exit_on_signals()
    try:
        return measure(args)
    finally:
        shutil.rmtree(args.scratch, ignore_errors=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="new directory; removed at the end")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--layers", type=int, help="default: the model's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument("--role", choices=("measure", "make", "check"), default="measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def layers(args: argparse.Namespace) -> dict[str, int]:
    return {"num_hidden_layers": args.layers} if args.layers else {}


def make_checkpoint(directory: Path, config: dict[str, object], max_shard_size: str) -> None:
    """Write a sharded Hugging Face directory of finite random bfloat16 weights."""
    import numpy as np
    import torch

    from megatron_embed.convert.storage.sharded import DeclaredTensor, ShardedWriter, parse_size
    from megatron_embed.convert.tables.lookup import rules_for
    from megatron_embed.models.families import model_shape

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    shape = model_shape(directory)
    tensors: list[DeclaredTensor] = []
    for rule, context in rules_for(shape.family).applied_rules(shape):
        for name, words in zip(rule.hf_names(context), rule.hf_shapes(), strict=True):
            tensors.append((name, torch.bfloat16, context.sizes(words)))
    tensors.append(("lm_head.weight", torch.bfloat16, (shape.vocab_size, shape.hidden_size)))
    generator = np.random.Generator(np.random.SFC64(0))
    with ShardedWriter(directory, tensors, parse_size(max_shard_size)) as writer:
        for name, dtype, sizes in tensors:
            # Without the highest bit of the exponent a value is below 2, never infinite, never NaN.
            bits = np.frombuffer(generator.bytes(2 * int(np.prod(sizes))), dtype=np.uint16) & np.uint16(0xBFFF)
            writer.write(name, torch.from_numpy(bits.view(np.int16)).view(dtype).reshape(sizes))


def compare(first: Path, second: Path) -> int:
    """Exit code: 1 if the tensors of two directories differ, as the `safetensors` library reads them."""
    import torch
    from safetensors import safe_open

    def file_of_tensors(directory: Path) -> dict[str, Path]:
        files = {}
        for file in sorted(directory.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                files.update(dict.fromkeys(opened.keys(), file))
        return files

    files, others = file_of_tensors(first), file_of_tensors(second)
    if not files or files.keys() != others.keys():
        print(f"names differ: {sorted(files.keys() ^ others.keys())[:3]} ...")
        return 1
    for name in files:
        with safe_open(files[name], "pt") as one, safe_open(others[name], "pt") as other:
            if not torch.equal(one.get_tensor(name).view(torch.int16), other.get_tensor(name).view(torch.int16)):
                print(f"{name} differs")
                return 1
    print(f"all {len(files)} tensors are bit-equal to the source's, by the safetensors library")
    return 0


@dataclass(frozen=True)
class Run:
    """One timed process."""

    seconds: float
    cpu_seconds: float
    """Sum over its threads, user and system time."""
    peak_bytes: int
    load: float
    """Average number of runnable processes over the minute before it."""


def measure(args: argparse.Namespace) -> int:
    scratch = args.scratch
    own = [sys.executable, __file__, "--scratch", str(scratch), "--shape", args.shape, "--max-shard-size",
           args.max_shard_size, *(["--layers", str(args.layers)] if args.layers else [])]
    subprocess.run([*own, "--role", "make"], check=True)
    source, megatron, back, copy = (scratch / name for name in ("source", "megatron", "back", "copy"))
    convert = [sys.executable, "-m", "megatron_embed", "convert"]
    sides = {
        "cp of hf": (source, copy, copying(source, copy)),
        "hf-to-megatron": (source, megatron, [*convert, "hf-to-megatron", str(source), str(megatron)]),
        "cp of megatron": (megatron, copy, copying(megatron, copy)),
        "megatron-to-hf": (megatron, back, [*convert, "megatron-to-hf", "--no-compare", "--max-shard-size",
                                            args.max_shard_size, str(megatron), str(back)]),
    }
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    total = bytes_of(source)
    print(f"{args.shape}, {args.layers or SHAPES[args.shape]['num_hidden_layers']} layers, {total / 1e9:.2f} GB in "
          f"{len(list(source.glob('*.safetensors')))} shards; {os.cpu_count()} cores", flush=True)
    for round_number in range(1, args.rounds + 1):
        shutil.rmtree(megatron, ignore_errors=True)
        shutil.rmtree(back, ignore_errors=True)
        for name, (read, written, command) in sides.items():
            run = timed(command, read, written)
            runs[name].append(run)
            print(f"round {round_number}: {name:<15} {run.seconds:6.1f} s  {total / 1e9 / run.seconds:5.2f} GB/s  "
                  f"peak {run.peak_bytes / 1e9:.2f} GB  (CPU {run.cpu_seconds:.0f} s, "
                  f"load before: {run.load:.1f})", flush=True)
            if written == copy:
                shutil.rmtree(copy)
    return max(report(runs, total), subprocess.run([*own, "--role", "check"], check=False).returncode)


def report(runs: dict[str, list[Run]], total: int) -> int:
    """Print the medians. Returns exit code 1 if one misses its bound."""
    code = 0
    for direction, plain in (("hf-to-megatron", "cp of hf"), ("megatron-to-hf", "cp of megatron")):
        pairs = zip(runs[plain], runs[direction], strict=True)
        ratio = statistics.median(copy.seconds / conversion.seconds for copy, conversion in pairs)
        seconds = statistics.median(run.seconds for run in runs[direction])
        peak = max(run.peak_bytes for run in runs[direction])
        good = ratio >= MINIMUM_RATIO and peak < MAXIMUM_PEAK_GB * 1e9
        code = code if good else 1
        print(f"{direction}: {seconds:.1f} s, {total / 1e9 / seconds:.2f} GB/s, {ratio:.2f} of the speed of cp (median "
              f"of {len(runs[plain])} pairs), peak {peak / 1e9:.2f} GB{'' if good else '  <- misses its bound'}")
    return code


def copying(source: Path, destination: Path) -> list[str]:
    """Command that copies a directory and waits for the disk; coreutils' `sync FILE...` is fsync of these files."""
    return ["sh", "-c", 'cp -r --reflink=never "$0" "$1" && find "$1" -exec sync {} +', str(source), str(destination)]


def timed(command: list[str], read: Path, written: Path) -> Run:
    """Run a command whose input is not in the page cache."""
    forget(read)
    load = os.getloadavg()[0]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=Path(__file__).resolve().parent.parent)
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        raise
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not written.is_dir():
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, load)


def forget(directory: Path) -> None:
    """Take the files of a directory out of the page cache."""
    for file in directory.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def bytes_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


if __name__ == "__main__":
    sys.exit(main())
