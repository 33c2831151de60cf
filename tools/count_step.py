"""Count what one training step of full-size models asks of a GPU, on fake tensors: memory, launches, bytes, waits.

    python tools/count_step.py configs/qwen3_8b_embed_tp2_8xh100.yaml --gpus 8 [--lines] [--json]
    python tools/count_step.py configs/*_8xh100.yaml --gpus 8
    python tools/count_step.py configs/qwen3_8b_embed_tp2_8xh100.yaml --texts examples/data/mini_en/train.jsonl
    python tools/count_step.py configs/qwen3_8b_embed_tp2_8xh100.yaml --save

For rank 0 and one micro-batch of the longest texts that the settings allow, or, with --texts, the one of median size
that training would pack from these rows. Needs g++ and a CPU build of torch (docs/pretend_device.md). Overrides as in
`train`: --set training.micro_batch_size=4. The second table is what these counts would take on an H100, with the rates
of docs/performance.md.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
GIB = 2**30
PEAK, PRODUCTS, FP8_PRODUCTS, MEMORY, LINK = 989e12, 650e12, 650e12 * 57 / 36, 2.5e12, 300e9
"""FLOP/s of an H100 in bfloat16 as its maker states it, of large products, of those in FP8; bytes per second of memory
and of one direction of NVLink, as kernels reach them."""
COLLECTIVE, LAUNCH = 10e-6, 15e-6
"""Seconds of a collective besides its bytes; seconds of the host for one launch, from eager Python."""
EXPOSED = {"none": (1.0, 2 / 3), "te": (0.5, 4 / 15)}
"""Share of the collectives' time that no product hides, of passes 1 and 2: a third is hidden by Megatron's linears in
the backward pass; with Transformer Engine's overlap, half of pass 1 and three fifths of what is left in pass 2."""


def count(arguments: argparse.Namespace) -> dict[str, Any]:
    """Counts of one configuration, as JSON would hold them."""
    from megatron_embed.config.load import load_config
    from tests.pretend_cuda.full_step import count_step, longest_micro_batch

    config = load_config(arguments.configs[0], arguments.set)
    micro_batch = (longest_micro_batch(config) if arguments.texts is None
                   else median_micro_batch(config, arguments.gpus, arguments.texts))
    counts = count_step(config, arguments.gpus, micro_batch, arguments.layers, saves=arguments.save)
    work = {part: {name: value for name, value in vars(done).items() if name not in ("by_operator", "waits")}
            | {"by_operator": dict(done.by_operator.most_common(12)),
               "waits": [[f"{wait.function}" + (f" < {wait.caller}" if wait.caller else ""), wait.kind, times]
                         for wait, times in done.waits.most_common()]}
            for part, done in counts.work.items()}
    return {"config": Path(arguments.configs[0]).stem, "tokens": counts.tokens, "real": micro_batch.num_tokens,
            "layers": counts.layers, "peak": counts.peak, "resident": counts.resident,
            "activations": counts.activations, "save": counts.save and vars(counts.save),
            "planned": {name: getattr(counts.planned, name) for name in (
                "parameters", "gradients", "optimizer", "activations", "total", "save")}
            | planned_work(config, counts.tokens), "work": work}


def planned_work(config: Any, tokens: int) -> dict[str, list[float]]:
    """What `plan` says of passes 1 and 2 without recomputation: bytes besides products, and launches."""
    from megatron_embed.planning.advice import adapted_linears
    from megatron_embed.planning.flops import elementwise_bytes, expert_copies, layer_launches, vocabulary_bytes
    from megatron_embed.planning.shapes import shape_of

    shape = shape_of(config.model.path)
    forward, backward = elementwise_bytes(config, shape)
    once, copied = vocabulary_bytes(config, shape, adapted_linears(config, shape)), expert_copies(config, shape)
    launches = layer_launches(config, shape)
    return {"traffic": [shape.num_layers * (tokens * forward + copied),
                        shape.num_layers * (tokens * (forward + backward) + 2 * copied) + once],
            "launches": [shape.num_layers * launches[0], shape.num_layers * sum(launches)]}


def median_micro_batch(config: Any, gpus: int, texts: str) -> Any:
    """The micro-batch of median size of rank 0's first step over rows like those of a train.jsonl, as training packs
    them to the token budget; lengths are those of the packaged model's tokenizer."""
    from bench_bins import batches_of_step, rows_like
    from small_models import packaged_model

    from megatron_embed.data.bins import bin_sizes, pad_to_sizes
    from megatron_embed.data.packing import PackingSpec
    from megatron_embed.data.tokenizer import RoleTokenizer
    from megatron_embed.parallel.topology import token_alignment
    from megatron_embed.planning.memory import grid_of

    budget, alignment = config.training.micro_batch_tokens, token_alignment(config.parallel)
    tokenizer = RoleTokenizer(packaged_model(), add_eos=False, query_prompt=config.data.prompt("query"),
                              query_max_length=config.data.max_length("query"),
                              document_max_length=config.data.max_length("document"))
    share = config.training.global_batch_size // grid_of(config, gpus).dp
    (batch,) = batches_of_step(config, tokenizer, rows_like(texts, share, config.data.num_negatives), 1,
                               PackingSpec(micro_batch_tokens=budget, alignment=alignment))
    packed = pad_to_sizes(batch.micro_batches, bin_sizes(budget, alignment), uniform=False)
    return sorted(packed, key=lambda micro: micro.token_ids.numel())[len(packed) // 2]


def seconds(row: dict[str, Any], *, fp8_first_pass: bool = False, overlap: str = "none") -> tuple[float, float]:
    """What passes 1 and 2 of a micro-batch would take: products, other traffic and exposed collectives one after the
    other, or the host's launches, whichever is longer."""
    times = []
    for index, part in enumerate(("pass 1", "pass 2")):
        work = row["work"][part]
        rate = FP8_PRODUCTS if fp8_first_pass and not index else PRODUCTS
        sent = work["collective_bytes"] / LINK + work["collectives"] * COLLECTIVE
        device = work["flops"] / rate + work["other_bytes"] / MEMORY + EXPOSED[overlap][index] * sent
        times.append(max(device, (work["products"] + work["others"] + work["collectives"]) * LAUNCH))
    return times[0], times[1]


def time_table(rows: list[dict[str, Any]]) -> str:
    """Expected time and MFU of a micro-batch of each configuration: a forward and a backward pass over its real tokens,
    divided by what the peak would make in that time."""
    lines = ["| configuration | tokens, padding included | GB besides products: pass 1 / 2 | launches: pass 1 / 2 | "
             "ms: pass 1 / 2 | MFU | with pass 1 in FP8 | and overlap |", "|" + "---|" * 8]
    for row in rows:
        first, second = row["work"]["pass 1"], row["work"]["pass 2"]

        def utilization(row: dict[str, Any] = row, flops: float = second["flops"], **options: Any) -> str:
            return f"{flops * row['real'] / row['tokens'] / PEAK / sum(seconds(row, **options)):.1%}"

        times = " / ".join(f"{1000 * time:.1f}" for time in seconds(row))
        launches = " / ".join(str(sum(work[kind] for kind in ("products", "others", "collectives")))
                              for work in (first, second))
        lines.append(
            f"| {row['config']} | {row['tokens']:,} | {first['other_bytes'] / 1e9:.1f} / "
            f"{second['other_bytes'] / 1e9:.1f} | {launches} | {times} | {utilization()} | "
            f"{utilization(fp8_first_pass=True)} | {utilization(fp8_first_pass=True, overlap='te')} |")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """One line per configuration: memory beside the plan's, then what a layer and a micro-batch cost."""
    lines = ["| configuration | tokens | resident GiB: counted / plan | activations GiB: counted / plan | peak GiB | "
             "launches a layer besides products: pass 1 / 2 | GB a layer besides products: pass 1 / 2 | products: "
             "pass 1 / 2 | TFLOP: pass 1 / 2 | collectives: pass 1 / 2 | waits a micro-batch: to_device / pass 1 / "
             "pass 2 | waits of the optimizer |", "|" + "---|" * 12]
    for row in rows:
        first, second, planned = row["work"]["pass 1"], row["work"]["pass 2"], row["planned"]
        resident = planned["parameters"] + planned["gradients"] + planned["optimizer"]

        def both(key: str, scale: float = 1.0, digits: int = 0, passes: Any = (first, second)) -> str:
            return " / ".join(f"{work[key] / scale:.{digits}f}" for work in passes)

        waits = {part: sum(times for _, kind, times in work["waits"] if not kind.startswith("async"))
                 for part, work in row["work"].items()}
        layers = row["layers"]
        lines.append("| " + " | ".join((
            row["config"], str(row["tokens"]), f"{row['resident'] / GIB:.1f} / {resident / GIB:.1f}",
            f"{row['activations'] / GIB:.1f} / {planned['activations'] / GIB:.1f}", f"{row['peak'] / GIB:.1f}",
            both("others", layers, 1), both("other_bytes", 1e9 * layers, 2), both("products"), both("flops", 1e12, 1),
            both("collectives"), " / ".join(str(waits.get(part, 0)) for part in ("to_device", "pass 1", "pass 2")),
            str(waits.get("optimizer", 0)))) + " |")
    return "\n".join(lines)


def by_line(row: dict[str, Any]) -> str:
    """Copies and waits by source line, and the operators that move most bytes."""
    lines = [f"\n{row['config']}"]
    for part, work in row["work"].items():
        lines += [f"  {part}: {times} x {kind} at {line}" for line, kind, times in work["waits"]]
        lines += [f"  {part}: {size / 1e9:8.2f} GB by {name}" for name, size in work["by_operator"].items()
                  if part.startswith("pass")]
    return "\n".join(lines)


def of_save(row: dict[str, Any]) -> str:
    """Host memory of a save, in a line; nothing if none was counted."""
    counts, planned = row["save"], row["planned"]["save"]
    if counts is None:
        return ""
    kept, peak = counts["kept"] / planned, counts["peak"] / planned
    return (f"\n\n{row['config']}, a save: a rank writes {counts['share'] / GIB:.2f} GiB; plan says "
            f"{planned / GIB:.2f}, of which its host memory keeps {kept:.2f}, and {peak:.2f} at most")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG.yaml")
    parser.add_argument("--gpus", type=int, help="ranks of the layout; left out: the number in the name, `_8xh100`")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--texts", metavar="TRAIN.jsonl", help="a micro-batch packed from these rows")
    parser.add_argument("--layers", type=int, metavar="N", help="of the model; left out: all")
    parser.add_argument("--save", action="store_true", help="also the host memory of a save of the state")
    parser.add_argument("--lines", action="store_true", help="also copies and waits by source line")
    parser.add_argument("--json", action="store_true", help="one JSON object per configuration and nothing else")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(count(arguments)))
        return 0
    import children

    from tests.pretend_cuda.build import CannotBuildError
    from tests.pretend_cuda.environment import environment

    rows = []
    for path in arguments.configs:
        named = re.search(r"_(\d+)xh100", Path(path).stem)
        gpus = arguments.gpus or (int(named[1]) if named else 1)
        try:
            device = environment(OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"))
        except CannotBuildError as error:
            sys.exit(f"no pretend device: {error}")
        # A process of its own for each: fake ranks are never undone.
        done = children.run([sys.executable, __file__, path, "--here", "--gpus", str(gpus),
                               *(f"--set={override}" for override in arguments.set),
                                *(["--save"] if arguments.save else []),
                               *([f"--texts={arguments.texts}"] if arguments.texts else []),
                                *([] if arguments.layers is None else [f"--layers={arguments.layers}"])],
                              env=device, stdout=subprocess.PIPE, check=False)
        if done.returncode:
            return done.returncode
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        if arguments.json:
            print(done.stdout.splitlines()[-1], flush=True)
    if not arguments.json:
        print(table(rows) + "\n\n" + time_table(rows) + "".join(map(of_save, rows))
              + ("".join(map(by_line, rows)) if arguments.lines else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
