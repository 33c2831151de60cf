"""Set the token budget of shipped configurations to the one that `plan` advises, after the plan has changed.

    python tools/config_budgets.py [configs/*_8xh100.yaml ...]        # default: every configuration for H100

Prints memory, seconds a step and MFU by `plan` as a table. `tests/planning/test_configs.py` compares.
"""

import re
import sys
from pathlib import Path

from megatron_embed.config.load import load_config
from megatron_embed.planning.advice import adapted_linears, budget_holds
from megatron_embed.planning.flops import model_flops
from megatron_embed.planning.hardware import GPUS
from megatron_embed.planning.shapes import shape_of
from megatron_embed.planning.token_budget import advised_budget

REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> None:
    paths = list(map(Path, sys.argv[1:])) or sorted((REPOSITORY / "configs").glob("*h100.yaml"))
    print("| configuration | tokens of a micro-batch | GiB | s/step | MFU | products | other kernels | communication |")
    print("|" + "---|" * 8)
    for path in paths:
        config, gpu, gpus = load_config(str(path), []), GPUS["h100"], int(path.stem.rsplit("_", 1)[1][:-len("xh100")])
        shape = shape_of(config.model.path)
        adapted = adapted_linears(config, shape)
        plan = advised_budget(config, shape, gpus, gpu, adapted, budget_holds)
        assert plan is not None, f"{path}: no budget fits"
        tokens, time = plan.config.training.micro_batch_tokens, plan.time
        line = re.compile(r"(  micro_batch_tokens: )(\d+)( *)(#.*?)[\d.]+ of [\d.]+ GiB by `plan`")
        text, changed = line.subn(
            lambda match, tokens=tokens, plan=plan, gpu=gpu: (
                f"{match[1]}{tokens}".ljust(len(match[1] + match[2] + match[3])) + match[4]
                + f"{plan.memory.total / 2**30:.1f} of {gpu.memory_gib:.0f} GiB by `plan`"),
            path.read_text(encoding="utf-8"))
        assert changed == 1, f"{path}: no line micro_batch_tokens with a comment about memory"
        path.write_text(text, encoding="utf-8")
        utilization = model_flops(plan.config, shape, adapted) / gpus / time.total / (gpu.peak_tflops * 1e12)
        shares = (time.compute, time.elementwise + time.launches, time.tensor + time.context + time.expert + time.data)
        print(f"| {path.stem} | {tokens:,} | {plan.memory.total / 2**30:.1f} | {time.total:.2f} | {utilization:.0%} | "
              + " | ".join(f"{share / time.total:.0%}" for share in shares) + " |", flush=True)


if __name__ == "__main__":
    main()
