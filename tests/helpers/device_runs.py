"""Commands and training curves on GPUs, pretended or real."""

import json
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.ranks import RankPool, run_on_ranks
from tests.helpers.refusals import command, settings

STEPS = 3
SECONDS = 300.0


def train_arguments(path: str, directory: Path, /, *overrides: str, **sections: dict[str, Any]) -> list[str]:
    """Arguments of a run of `STEPS` steps of two micro-batches in float32, each computed in both passes; writes its
    YAML beside `directory`."""
    values = settings(path, directory)
    values["training"] |= {"learning_rate": 1e-3, "lr_decay_style": "constant", "train_steps": STEPS,
                           "keep_activations": 0}
    for section, keys in sections.items():
        values[section] = values.get(section, {}) | keys
    file = directory.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return ["train", str(file), *overrides]


def call(arguments: list[Any], ranks: int = 1) -> str:
    """Standard output of a command that must succeed, on pooled ranks."""
    results = run_on_ranks(command, ranks, [str(argument) for argument in arguments], timeout_seconds=SECONDS)
    assert all(code == 0 for code, *_ in results), results[0][2]
    return results[0][1]


def train(path: str, directory: Path, /, *overrides: str, ranks: int = 1, pool: RankPool | None = None,
          **sections: dict[str, Any]) -> list[float]:
    """The curve of a run on `ranks` GPUs, or on the ranks of `pool`."""
    arguments = train_arguments(path, directory, *overrides, **sections)
    if pool is not None:
        return curve_of(pool.run(command, ranks, (arguments,), {}, SECONDS), directory)
    return curve_of(run_on_ranks(command, ranks, arguments, timeout_seconds=SECONDS), directory)


def curve_of(results: list[tuple[int, str, str, float]], directory: Path) -> list[float]:
    """Loss and gradient norm of every step."""
    assert all(code == 0 for code, *_ in results), results[0][2]
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert len({row["loss"] for row in rows}) == len(rows) and all(row["grad_norm"] > 0.01 for row in rows)
    return [row[name] for row in rows for name in ("loss", "grad_norm")]
