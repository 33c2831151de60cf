"""Lower bounds of metrics that `evaluate --require` checks, so that a script can stop before it ships a worse model."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_embed.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """The smallest value that a metric may have."""

    metric: str
    least: float

    def __str__(self) -> str:
        return f"{self.metric}>={self.least:g}"


def parse_requirement(text: str) -> Requirement:
    """`METRIC>=VALUE` or `METRIC:VALUE`. Raises ValueError, with what to write instead."""
    metric, separator, value = text.rpartition(">=" if ">=" in text else ":")
    if not separator:
        raise ValueError(f"{text!r} has no bound; write '{text or 'ndcg@10'}>=0.5' in quotes, without which a shell "
                         f"writes to a file named =0.5, or {text or 'ndcg@10'}:0.5")
    try:
        least = float(value)
    except ValueError:
        least = math.nan
    if not metric.strip() or not math.isfinite(least):
        raise ValueError(f"{text!r} must be a metric and a number, such as ndcg@10:0.5")
    return Requirement(metric=metric.strip(), least=least)


def check_metric_names(requirements: Sequence[Requirement], names: Iterable[str]) -> None:
    """Raise ConfigError for a metric that is not among those that the evaluation gives."""
    known = list(names)
    for requirement in requirements:
        if requirement.metric not in known:
            near = difflib.get_close_matches(requirement.metric, known, n=1)
            advice = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(known)}"
            raise ConfigError(f"--require {requirement}: this evaluation gives no metric '{requirement.metric}'; "
                              f"{advice}", key="--require")


def missed_requirements(requirements: Sequence[Requirement], metrics: Mapping[str, float]) -> list[str]:
    """A sentence for every metric below its bound."""
    return [f"{requirement.metric} = {metrics[requirement.metric]!r} is below the required {requirement.least:g}"
            for requirement in requirements if metrics[requirement.metric] < requirement.least]
