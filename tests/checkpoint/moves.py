"""Runs that stop under one layout and go on under another, held against one that was never interrupted."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.embedding_reference import save_model as save_experts
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import configuration, curve, go_back, train
from tests.helpers.toys import layout, save_model

STEPS, STOP = 6, 3
"""Optimizer steps of a run, and after how many of them it moves."""
BOUND = 1e-4
"""Largest difference between a loss and the uninterrupted run's."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Ranks, and how they divide a model."""

    ranks: int
    parallel: dict[str, Any]


def _layout(ranks: int, *, ep: int = 1, etp: int = 1, **sizes: Any) -> Layout:
    experts = {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": etp}
    return Layout(ranks=ranks, parallel=layout(**sizes) | experts)


LAYOUTS = {
    "1": _layout(1), "DP2": _layout(2), "TP2": _layout(2, tp=2), "TP2 ETP2": _layout(2, tp=2, etp=2),
    "PP2": _layout(2, pp=2), "CP2": _layout(2, cp=2), "EP2": _layout(2, ep=2), "PP2 VPP2": _layout(2, pp=2, vpp=2),
    "TP2 EP2": _layout(4, tp=2, ep=2), "EP4": _layout(4, ep=4), "DP2 PP2 EP2": _layout(4, pp=2, ep=2),
}
"""Layouts by name. TP2: expert tensor parallelism 1, so experts are divided otherwise than the rest; ETP2: alike."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A model, its trained parts, and its optimizer's state."""

    distributed: bool = True
    adapters: tuple[str, ...] = ()
    dtype: str = "float32"
    dense: bool = False

    def __str__(self) -> str:
        words = ["dense"] if self.dense else []
        words += [] if self.dtype == "float32" else [self.dtype]
        words += [] if self.distributed else ["not distributed"]
        words += [f"adapters on {', '.join(self.adapters)}"] if self.adapters else []
        return ", ".join(words) or "-"


ALL_MODULES, EXPERTS_ALONE = ("all-linear",), ("gate_proj", "up_proj", "down_proj")
"""Layers that have adapters."""


class Moves:
    """Runs of one kind in a folder; those that are moved from are made when first asked for."""

    def __init__(self, folder: Path, kind: Kind, model: str | None = None) -> None:
        self._folder, self._kind = folder, kind
        folder.mkdir(parents=True, exist_ok=True)
        self._model = model or save_toy(folder / "model", dense=kind.dense)

    def values(self, directory: Path, name: str) -> dict[str, Any]:
        """The configuration of a run under a layout."""
        values_of_run = configuration(
            self._model, directory, parallel=LAYOUTS[name].parallel, distributed=self._kind.distributed,
            checkpoint={"save_every_steps": STOP, "keep": 0}, train_steps=STEPS, learning_rate=3e-3)
        values_of_run["model"]["dtype"] = self._kind.dtype
        if self._kind.adapters:
            values_of_run["lora"] = {"rank": 4, "target_modules": list(self._kind.adapters)}
        return values_of_run

    def uninterrupted(self, name: str) -> Path:
        """The directory of a whole run under a layout."""
        directory = self._folder / name.replace(" ", "_")
        if not directory.exists():
            run_on_ranks(train, LAYOUTS[name].ranks, self.values(directory, name), timeout_seconds=600.0)
        return directory

    def losses(self, name: str) -> list[float]:
        """Losses of the uninterrupted run under a layout, step by step."""
        return [loss for loss, *_ in curve(self.uninterrupted(name))]

    def difference(self, source: str, target: str) -> float:
        """The largest difference between the losses after the move and those of the uninterrupted run on one rank."""
        directory = go_back(self.uninterrupted(source), self._folder / f"{source} to {target}".replace(" ", "_"), STOP)
        return self.going_on(directory, target)

    def going_on(self, directory: Path, target: str) -> float:
        """The same, of a run that has stopped in `directory`, which is removed then."""
        run_on_ranks(train, LAYOUTS[target].ranks, self.values(directory, target), timeout_seconds=600.0)
        losses, expected = [loss for loss, *_ in curve(directory)][STOP:], self.losses("1")[STOP:]
        assert len(losses) == len(expected) == STEPS - STOP
        shutil.rmtree(directory)
        return max(abs(loss - other) for loss, other in zip(losses, expected, strict=True))


def save_toy(path: Path, *, dense: bool = False) -> str:
    """A Qwen3 model of four layers, with four experts in each or without."""
    return save_model(path, "qwen3", tokenizer=True) if dense else str(save_experts(path, "qwen3_moe"))
