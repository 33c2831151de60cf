"""Count what one training step of full-size models asks of a GPU, on fake tensors: memory, launches, bytes, waits.

    python tools/count_step.py configs/qwen3_8b_embed_tp2_8xh100.yaml --gpus 8 [--lines] [--json]
    python tools/count_step.py configs/*_8xh100.yaml --gpus 8

For rank 0 and one micro-batch of the longest texts that the settings allow. Needs g++ and a CPU build of torch
(docs/pretend_device.md). Overrides as in `train`: --set training.micro_batch_size=4
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


def count(path: str, gpus: int, overrides: list[str], layers: int | None) -> dict[str, Any]:
    """Counts of one configuration, as JSON would hold them."""
    from megatron_embed.config.load import load_config
    from tests.pretend_cuda.full_step import count_step

    counts = count_step(load_config(path, overrides), gpus, layers)
    work = {part: {name: value for name, value in vars(done).items() if name not in ("by_operator", "waits")}
            | {"by_operator": dict(done.by_operator.most_common(12)),
               "waits": [[f"{wait.function}" + (f" < {wait.caller}" if wait.caller else ""), wait.kind, times]
                         for wait, times in done.waits.most_common()]}
            for part, done in counts.work.items()}
    return {"config": Path(path).stem, "tokens": counts.tokens, "layers": counts.layers, "peak": counts.peak,
            "resident": counts.resident, "activations": counts.activations,
            "planned": {name: getattr(counts.planned, name) for name in (
                "parameters", "gradients", "optimizer", "activations", "total")}, "work": work}


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG.yaml")
    parser.add_argument("--gpus", type=int, help="ranks of the layout; left out: the number in the name, `_8xh100`")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--layers", type=int, metavar="N", help="of the model; left out: all")
    parser.add_argument("--lines", action="store_true", help="also copies and waits by source line")
    parser.add_argument("--json", action="store_true", help="one JSON object per configuration and nothing else")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(count(arguments.configs[0], arguments.gpus, arguments.set, arguments.layers)))
        return 0
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
        done = subprocess.run([sys.executable, __file__, path, "--here", "--gpus", str(gpus),
                               *(f"--set={override}" for override in arguments.set),
                               *([] if arguments.layers is None else [f"--layers={arguments.layers}"])],
                              env=device, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            return done.returncode
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        if arguments.json:
            print(done.stdout.splitlines()[-1], flush=True)
    if not arguments.json:
        print(table(rows) + ("".join(map(by_line, rows)) if arguments.lines else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
