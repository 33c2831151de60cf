"""Causes of another loss of the same vectors: it is computed in other ways and compared again."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from megatron_embed.audit.case import Case, Cause
from megatron_embed.audit.compare import Tolerance, part_of, scale_of
from megatron_embed.audit.plain_objective import PlainObjective
from megatron_embed.audit.variation import Variation
from megatron_embed.batch import StepBatch
from megatron_embed.errors import ConfigError
from megatron_embed.objectives.base import configured_dims

_SHIFTS = (1, -1, 2, -2, 3, -3, 4, -4)
_TEMPERATURES = (0.002, 10.0)
_HALVINGS = 60


def matches(case: Case, metrics: Mapping[str, float], *parts: str) -> bool:
    """Whether all logged numbers of these parts (default: all but the gradient) are those of a variation."""
    tolerance = tolerance_of(case)
    wanted = parts or ("masks", "vectors", "loss")
    logged = case.record["metrics"]
    return all(tolerance.allows(name, value, metrics.get(name), scale_of(name, logged))
               for name, value in logged.items()
               if part_of(name) in wanted and name not in ("learning_rate", "skipped")
               and not name.startswith("margin_to"))


def tolerance_of(case: Case) -> Tolerance:
    """The tolerance of a match: twice that of the comparison."""
    config = case.replay.inputs.config
    return Tolerance(dtype="bfloat16" if "bfloat16" in (case.start["dtype"], config.model.dtype) else "float32",
                     replayed=2 * (case.step - case.done), rounded=config.embedding.precision != ("float32",))


def losses(case: Case, batch: StepBatch) -> Iterator[Cause]:
    """Another loss of the same vectors."""
    objective, replay = case.replay.trainer.grad_cache.objective, case.replay
    if case.difference.part == "gradient":
        return
    assert isinstance(objective, PlainObjective)
    if not objective.is_plain:
        return
    objective.kept = []
    replay.evaluated(case.step, batch)

    def metrics_under(variation: Variation) -> dict[str, float]:
        try:
            metrics = objective.metrics_of_kept(variation) if objective.kept else {}
        except ConfigError:
            metrics = {}  # settings that do not go together
        return replay.from_last_stage(metrics)

    try:
        for name, text, variation in (*_loss_variations(case), *_fitted(case, metrics_under)):
            if matches(case, metrics_under(variation)):
                objective_kept, objective.kept = objective.kept, None
                confirmed = _has_gradient(case, batch, variation)
                objective.kept = objective_kept
                if confirmed:
                    yield Cause(name=name, text=text)
    finally:
        objective.kept = None


def _loss_variations(case: Case) -> Iterator[tuple[str, str, Variation]]:
    config, ranks = case.replay.inputs.config.objective, case.dp_size
    for shift in _SHIFTS:
        yield ("shifted labels", f"each query's positive is that of the query {shift:+d} places away in the global "
               "batch", Variation(label_shift=shift))
        if ranks > 1:
            yield ("shifted labels", f"each query's positive is that of the query {shift:+d} places away on its rank",
                   Variation(label_shift=shift, ranks=ranks, shift_within_rank=True))
    mask, private = not config.mask_duplicates, config.hard_negatives == "private"
    yield ("masks on" if mask else "masks off", "equal texts are masked, which objective.mask_duplicates does not ask "
           "for" if mask else "false negatives are not masked: objective.mask_duplicates has no effect",
           Variation(duplicates_masked=mask))
    yield ("masks off", "objective.mask_margin has no effect", Variation(margin_masked=False))
    yield ("masks off", "objective.mask_margin and mask_duplicates have no effect",
           Variation(margin_masked=False, duplicates_masked=False))
    yield ("hard negatives missing in the loss", "only the positives of other queries are negatives",
           Variation(documents="positives"))
    if ranks > 1:
        yield ("remote negatives missing", "a query is compared with the documents of its own data-parallel rank alone",
               Variation(documents="own_rank", ranks=ranks))
    yield ("matryoshka dimensions missing", "only the largest dimension counts in the loss",
           Variation(first_dimension_only=True))
    yield ("weights of several positives", "each positive counts 1, not 1 / (positives of its query)",
           Variation(per_query=False))
    yield ("directions of the loss", "only queries to documents are compared",
           Variation(directions=("query_to_document",)))
    yield ("directions of the loss", "both directions between queries and documents are compared",
           Variation(directions=("query_to_document", "document_to_query")))
    yield ("hard negatives of other rows", f"objective.hard_negatives is {'shared' if private else 'private'}, not "
           f"{config.hard_negatives}", Variation(settings=(("hard_negatives", "shared" if private else "private"),)))
    yield ("rounded vectors", "the loss is that of the vectors rounded to bfloat16", Variation(rounded="vectors"))
    yield ("hardness missing", "objective.hardness has no effect", Variation(hardness=False))


def _fitted(case: Case, metrics_under: Callable[[Variation], dict[str, float]]) -> Iterator[
        tuple[str, str, Variation]]:
    """Numbers of the loss's settings that give the logged one: between two that bracket it, by halving."""
    logged, config = case.record["metrics"], case.replay.inputs.config
    objective = config.objective
    if logged["loss"] is None:
        return

    def solved(points: Sequence[float], vary: Callable[[float], Variation], metric: str = "loss") -> Iterator[float]:
        return _solved(points, lambda value: metrics_under(vary(value)).get(metric, math.nan), logged[metric])

    def setting(key: str) -> Callable[[float], Variation]:
        return lambda value: Variation(settings=((key, value),))

    low, high = _TEMPERATURES
    for power in solved([math.log(low) + math.log(high / low) * index / 24 for index in range(25)],
                        lambda power: Variation(temperature=math.exp(power))):
        yield ("wrong temperature", f"loss and gradient are those of temperature {math.exp(power):.4g}, not of "
               f"{objective.temperature:g}", Variation(temperature=math.exp(power)))
    for key, configured, points, metric in (
            ("mask_margin", objective.mask_margin, [index / 8 - 2 for index in range(33)], "negatives_per_query"),
            ("hardness_strength", objective.hardness and objective.hardness_strength,
             [0.1, *range(2, 41, 2)], "loss"),
            ("margin", objective.margin, [0.01, *(index / 4 for index in range(1, 33))], "loss")):
        for value in solved(points, setting(key), metric) if configured is not None and metric in logged else ():
            yield (f"wrong {key.replace('_', ' ')}", f"loss and gradient are those of objective.{key} = about "
                   f"{value:.4g}, not {configured:g}", setting(key)(value))
    dims = configured_dims(config)
    for index, each in enumerate(dims) if len(dims) > 1 and config.embedding.precision == ("float32",) else ():
        own = [logged.get(f"loss@{dim.name}") for dim in dims]
        if own[index] and None not in own:
            rest = sum(dim.weight * value for dim, value in zip(dims, own, strict=True) if dim is not each)
            weight = max((logged["loss"] - rest) / own[index], 1e-9)
            weights = tuple(weight if dim is each else dim.weight for dim in dims)
            yield ("wrong weight of a term", f"the loss at dimension {each.name} weighs {weight:.6g}, not "
                   f"{each.weight:g}", Variation(settings=(("matryoshka_weights", weights),)))


def _solved(points: Sequence[float], value_of: Callable[[float], float], wanted: float) -> Iterator[float]:
    """Points, each between two of the given ones, at which a function, which may have steps, has the wanted value."""
    differences = [value_of(point) - wanted for point in points]
    for (left, right), (first, second) in zip(itertools.pairwise(points), itertools.pairwise(differences), strict=True):
        if not (math.isfinite(first) and math.isfinite(second)) or first * second > 0 or not first:
            continue
        for _ in range(_HALVINGS):
            middle = (left + right) / 2
            left, right = (middle, right) if (value_of(middle) - wanted) * first > 0 else (left, middle)
        yield right


def _has_gradient(case: Case, batch: StepBatch, variation: Variation) -> bool:
    """Whether a variation has the logged gradient, up to a factor that scaling gives."""
    norm, logged = case.replay.numbers(case.step, batch, variation).metrics["grad_norm"], case.record["metrics"]
    return any(tolerance_of(case).allows("grad_norm", logged["grad_norm"], norm * factor, 0.0)
               for factor, _ in ((1.0, ""), *factors(case)))


def factors(case: Case) -> list[tuple[float, str]]:
    """Factors that a wrong scale may have, with their names."""
    sizes, micro = case.start["parallel"], int(case.record["micro_batches"])
    known = [(case.dp_size, "the data-parallel size"), (micro, "the number of micro-batches"),
             (case.dp_size * micro, "data-parallel size times micro-batches"),
             (sizes["tensor_model_parallel_size"], "the tensor-parallel size"),
             (sizes["context_parallel_size"], "the context-parallel size"),
             (sizes["pipeline_model_parallel_size"], "the pipeline-parallel size"),
             (math.sqrt(case.dp_size), "the root of the data-parallel size"),
             (case.replay.inputs.config.training.global_batch_size, "the global batch size"), (2, "2"), (3, "3"),
             (4, "4"), (8, "8"), (10, "10"), (16, "16"), (100, "100")]
    found = [(float(value), name) for value, name in known if value > 1]
    return [*found, *((1 / value, f"1 / {name}") for value, name in found)]
