"""A difference that is to be explained, and a cause that explains it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_embed.audit.compare import Difference
from megatron_embed.audit.replay import Replay
from megatron_embed.audit.run_log import RunLog


@dataclass(frozen=True, kw_only=True)
class Cause:
    """A likely cause."""

    name: str
    text: str


def of_ranks(ranks: Iterable[int | str]) -> str:
    """`rank 3`, `ranks 1, 3`."""
    numbers = list(map(str, ranks))
    return f"rank{'s' if numbers[1:] else ''} {', '.join(numbers)}"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A difference to be explained, with the replay as it was when it was found: before the step's update, unless that
    is what differs."""

    log: RunLog
    replay: Replay
    difference: Difference
    done: int
    """Steps of the checkpoint that the replay began with; 0: the first weights."""
    problems: Sequence[str] = field(default_factory=tuple)

    @property
    def step(self) -> int:
        return self.difference.step

    @property
    def record(self) -> dict[str, Any]:
        """The log's record of the step."""
        return {**self.log.saves.get(self.step, {}), **self.log.steps[self.step]}

    @property
    def start(self) -> dict[str, Any]:
        """The log's record of the start in which the step was made."""
        return self.log.start_of(self.step)[1]

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks of the run."""
        sizes = self.start["parallel"]
        return int(self.start["world_size"] // (
            sizes["tensor_model_parallel_size"] * sizes["pipeline_model_parallel_size"]
            * sizes["context_parallel_size"]))
