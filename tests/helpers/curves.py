"""Loss curves of the same rows under several layouts, by the command line's own run."""

import dataclasses
import json
from pathlib import Path

from megatron_embed.config.schema import LoggingConfig, TrainFile
from tests.helpers.exactness_cases import CURVE_STEPS, Case, Layout, run_config
from tests.helpers.ranks import run_on_ranks
from tests.helpers.toys import MINI_EN


def loss_curve(folder: Path, layout: Layout) -> list[float]:
    """Loss of each of CURVE_STEPS steps of AdamW on the English sample, by the command line's own run."""
    logs = folder / f"curve-{layout}".replace(" ", "_")
    run_on_ranks(_run_curve, layout.ranks, str(folder), layout, str(logs), timeout_seconds=600.0)
    lines = (logs / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [float(json.loads(line)["loss"]) for line in lines]
    assert len(losses) == CURVE_STEPS
    return losses


def _run_curve(folder: str, layout: Layout, logs: str) -> None:
    from megatron_embed.run.assemble import run_training

    base = run_config(Case(kind="qwen3", layout=layout, micro_batches=2, distributed=True), Path(folder))
    training = dataclasses.replace(base.training, train_steps=CURVE_STEPS, learning_rate=1e-3,
                                   lr_decay_style="constant")
    run_training(dataclasses.replace(
        base, data=dataclasses.replace(base.data, train=(TrainFile(path=str(MINI_EN)),), num_negatives=1),
        training=training, logging=LoggingConfig(directory=logs, every_steps=1, tensorboard=False)))
