"""Causes of other masks, vectors, losses and gradients: the step is computed in other ways and compared again."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from megatron_embed.audit.case import Case, Cause
from megatron_embed.audit.compare import Tolerance, part_of, scale_of
from megatron_embed.audit.plain_objective import PlainObjective
from megatron_embed.audit.variation import Variation
from megatron_embed.batch import StepBatch
from megatron_embed.names import POOLINGS
from megatron_embed.training.step import seed_step

_SHIFTS = (1, -1, 2, -2, 3, -3, 4, -4)
_DROPOUTS = (0.1, 0.05, 0.2, 0.3, 0.15, 0.25, 0.5, 0.02, 0.01)
_TEMPERATURES = (0.002, 10.0)
_HALVINGS = 60
_EQUAL_RATIOS = 2e-4
"""Relative difference within which loss and gradient are multiplied alike."""
_WITHIN, _ASIDE = 4.0, 0.7
"""Standard deviations of dropout within which the logged numbers must lie, and by which the plain ones must differ."""
_AHEAD = 200
"""Steps after the different one in whose records a drifted rank is looked for."""


def explain(case: Case) -> list[Cause]:
    """The first cause under which the step has the logged numbers."""
    batch = case.replay.batch(case.step)
    for candidates in (_copies, _metric_alone, _losses, _gradients, _models):
        for cause in candidates(case, batch):
            return [cause]
    return []


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


def _copies(case: Case, batch: StepBatch) -> Iterator[Cause]:
    """A rank whose parameters differ from its replicas' at this step or soon after."""
    for step in range(max(1, case.step - 1), case.step + _AHEAD):
        record: Mapping[str, Any] = {**case.log.steps.get(step, {}), **case.log.saves.get(step, {})}
        if "drifted" in record:
            yield Cause(name="drifted parameters", text=f"rank(s) {', '.join(record['drifted'])}: the copies of the "
                        f"parameters are not equal to each other, seen after step {step}")
            return


def _metric_alone(case: Case, batch: StepBatch) -> Iterator[Cause]:
    """A metric that is wrong although loss and gradient are right; a learned temperature; loss and gradient multiplied
    by the same."""
    if "temperature" in case.difference.values:
        logged, replayed = case.difference.values["temperature"]
        yield Cause(name="learned temperature", text=f"it is {logged:.6g} in the run and {replayed:.6g} in the replay: "
                    "its update differs, or what a resume restored of it")
        return
    numbers, tolerance = case.replay.numbers(case.step, batch).metrics, tolerance_of(case)
    logged = case.record["metrics"]
    ratios = [logged[name] / numbers[name] for name in ("loss", "grad_norm") if logged[name] and numbers[name]]
    if case.difference.part == "loss" and len(ratios) == 2 and math.isclose(*ratios, rel_tol=_EQUAL_RATIOS):
        named = next((f", which is {name}" for factor, name in _factors(case)
                      if math.isclose(factor, ratios[0], rel_tol=_EQUAL_RATIOS)), "")
        yield Cause(name="loss scale", text=f"loss and gradient are {ratios[0]:.6g} times what they must be{named}")
        return
    if all(tolerance.allows(name, logged[name], numbers[name], 1e-2) for name in ("loss", "grad_norm")):
        yield Cause(name="wrong metric", text=f"loss and gradient are right; {', '.join(case.difference.values)} as "
                    "logged is not")


def _losses(case: Case, batch: StepBatch) -> Iterator[Cause]:
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
        return replay.from_last_stage(objective.metrics_of_kept(variation) if objective.kept else {})

    try:
        for name, text, variation in (*_loss_variations(case), *_fitted_temperature(case, metrics_under)):
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
    mask = not config.mask_duplicates
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
    yield ("hardness missing", "objective.hardness has no effect", Variation(hardness=False))


def _fitted_temperature(case: Case, metrics_under: Callable[[Variation], dict[str, float]]) -> Iterator[
        tuple[str, str, Variation]]:
    """A temperature under which the loss is the logged one: between two that bracket it, by halving."""
    logged, (low, high) = case.record["metrics"]["loss"], _TEMPERATURES
    if logged is None:
        return
    points = [low * (high / low) ** (index / 24) for index in range(25)]
    values = [metrics_under(Variation(temperature=point))["loss"] - logged for point in points]
    for (left, right), (value, other) in zip(itertools.pairwise(points),
                                             itertools.pairwise(values), strict=True):
        if not (math.isfinite(value) and math.isfinite(other)) or value * other > 0:
            continue
        for _ in range(_HALVINGS):
            middle = math.sqrt(left * right)
            if (metrics_under(Variation(temperature=middle))["loss"] - logged) * value > 0:
                left = middle
            else:
                right = middle
        configured = case.replay.inputs.config.objective.temperature
        yield ("wrong temperature", f"loss and gradient are those of temperature {math.sqrt(left * right):.4g}, not "
               f"of {configured:g}", Variation(temperature=math.sqrt(left * right)))


def _has_gradient(case: Case, batch: StepBatch, variation: Variation) -> bool:
    """Whether a variation has the logged gradient, up to a factor that scaling gives."""
    norm, logged = case.replay.numbers(case.step, batch, variation).metrics["grad_norm"], case.record["metrics"]
    return any(tolerance_of(case).allows("grad_norm", logged["grad_norm"], norm * factor, 0.0)
               for factor, _ in ((1.0, ""), *_factors(case)))


def _factors(case: Case) -> list[tuple[float, str]]:
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


def _gradients(case: Case, batch: StepBatch) -> Iterator[Cause]:
    """Another gradient of the same loss."""
    if case.difference.part != "gradient":
        return
    tolerance, logged = tolerance_of(case), case.record["metrics"]["grad_norm"]
    base = case.replay.numbers(case.step, batch).metrics["grad_norm"]
    for factor, name in _factors(case):
        if tolerance.allows("grad_norm", logged, base * factor, 0.0):
            yield Cause(name="loss scale", text=f"the gradient is {factor:.6g} times what it must be, which is {name}; "
                        "the loss is right")
            return
    objective = case.replay.trainer.grad_cache.objective
    assert isinstance(objective, PlainObjective)
    for name, text, variation in _gradient_variations(case) if objective.is_plain else ():
        norm = case.replay.numbers(case.step, batch, variation).metrics["grad_norm"]
        for factor, by in ((1.0, ""), *_factors(case)):
            if tolerance.allows("grad_norm", logged, norm * factor, 0.0):
                yield Cause(name=name, text=text + (f", and the rest is multiplied by {by}" if by else ""))
                return


def _gradient_variations(case: Case) -> Iterator[tuple[str, str, Variation]]:
    size, ranks = case.replay.inputs.config.training.global_batch_size, case.dp_size
    if ranks > 1:
        yield ("detached remote negatives", "documents of other data-parallel ranks get no gradient",
               Variation(documents="others_detached", ranks=ranks))
        share = size // ranks
        for rank in range(ranks):
            yield ("gradient of a rank missing", f"the rows of data-parallel rank {rank} give no gradient",
                   Variation(factors=((rank * share, (rank + 1) * share, 0.0),)))
        for rank in range(ranks):
            yield ("gradient not summed over the ranks", f"the gradient is that of data-parallel rank {rank} alone",
                   Variation(factors=((0, rank * share, 0.0), ((rank + 1) * share, size, 0.0))))
    yield "detached queries", "queries get no gradient", Variation(detached=("queries",))
    yield "detached documents", "documents get no gradient", Variation(detached=("positives", "hard_negatives"))
    yield "detached positives", "positives get no gradient", Variation(detached=("positives",))
    yield "detached hard negatives", "hard negatives get no gradient", Variation(detached=("hard_negatives",))
    micro, share = case.replay.inputs.config.training.micro_batch_size, size // ranks
    if case.replay.inputs.config.training.micro_batch_tokens is not None:
        return
    for factor, what in ((0.0, "gives no gradient"), (2.0, "counts twice")):
        for rank in range(ranks):
            for index in range(int(case.record["micro_batches"])):
                first = rank * share + index * micro
                yield ("micro-batch missing" if not factor else "micro-batch counted twice",
                       f"micro-batch {index + 1} of data-parallel rank {rank} {what}",
                       Variation(factors=((first, min(first + micro, (rank + 1) * share), factor),)))
        for index in range(int(case.record["micro_batches"])):
            parts = [(rank * share + index * micro, rank * share + (index + 1) * micro) for rank in range(ranks)]
            yield ("micro-batch missing" if not factor else "micro-batch counted twice",
                   f"micro-batch {index + 1} of every data-parallel rank {what}",
                   Variation(factors=tuple((first, last, factor) for first, last in parts)))


def _models(case: Case, batch: StepBatch) -> Iterator[Cause]:
    """Another forward pass."""
    if case.difference.part == "gradient":
        return
    model = case.replay.trainer.grad_cache.models[0]
    trials: list[tuple[str, object, str, str]] = [("causal", not model.causal, "wrong attention mask", "attention is "
                                                   f"{'bidirectional' if model.causal else 'causal'}")]
    if model.head_spec is None:
        trials += [("pooling", pooling, "wrong pooling", f"the vectors are those of pooling {pooling}, not of "
                    f"{model.pooling}") for pooling in POOLINGS if pooling not in (model.pooling, "cls+mean")]
        trials.append(("normalize", not model.normalize, "normalization missing" if model.normalize else
                       "normalization", f"the vectors are {'not ' * model.normalize}scaled to unit length"))
    for attribute, value, name, text in trials:
        with _attribute(case, attribute, value):
            if matches(case, case.replay.evaluated(case.step, batch)):
                yield Cause(name=name, text=text)
    if matches(case, case.replay.evaluated_across_texts(case.step, batch)):
        yield Cause(name="attention across texts", text="the tokens of a micro-batch attend to those of other texts")
    for share in _DROPOUTS:
        with dropout(case, share):
            if matches(case, case.replay.evaluated(case.step, batch)) or matches(case, _as_ranks_drew(case)):
                yield Cause(name="dropout left on", text=f"the numbers are those of dropout {share:g} with the random "
                            "numbers of this step")
    if case.replay.inputs.config.has_dropout:
        with dropout(case, 0.0):
            if matches(case, case.replay.evaluated(case.step, batch)):
                yield Cause(name="dropout off", text="the numbers are those without dropout")


def _as_ranks_drew(case: Case) -> dict[str, float]:
    """Metrics of the step in this one process, each data-parallel rank's share with the random numbers that it drew;
    empty where that cannot be: the run divided its model, or several processes make the audit."""
    replay, sizes = case.replay, case.start["parallel"]
    objective, config = replay.trainer.grad_cache.objective, replay.inputs.config
    divided = any(sizes[f"{name}_parallel_size"] > 1 for name in ("tensor_model", "pipeline_model", "context"))
    if divided or replay.topology.world_size > 1 or case.dp_size == 1 or not objective.couples_batch:
        return {}
    assert isinstance(objective, PlainObjective)
    if not objective.is_plain:
        return {}
    objective.kept = []
    loader, share = copy.copy(replay.loader), config.training.global_batch_size // case.dp_size
    for rank in range(case.dp_size):
        vars(loader)["_share"] = slice(rank * share, (rank + 1) * share)
        batch = loader.build(replay.inputs.records, loader.rows(case.step - 1), case.step - 1)
        seed_step(config.training.seed, case.step - 1, replay.topology, dp_rank=rank)
        replay.trainer.grad_cache.evaluate(batch)
    metrics = objective.metrics_of_kept(Variation(), as_one=True)
    objective.kept = None
    return metrics


def explain_noise(case: Case) -> list[Cause]:
    """Dropout whose random numbers are those of another layout: the numbers lie among those of several draws, and the
    plain ones lie aside."""
    if case.difference.part != "vectors":
        return []
    batch = case.replay.batch(case.step)
    plain = case.replay.evaluated(case.step, batch)
    names = [name for name, value in case.record["metrics"].items() if part_of(name) in ("vectors", "loss")
             and name not in ("in_batch_accuracy", "accuracy", "learning_rate", "skipped")
             and value is not None and name in plain]
    logged = torch.tensor([case.record["metrics"][name] for name in names], dtype=torch.float64)
    expected = torch.tensor([plain[name] for name in names], dtype=torch.float64)
    found: list[tuple[float, float]] = []
    for share in _DROPOUTS[:3]:
        with dropout(case, share):
            draws = [case.replay.evaluated(case.step + 1000 * draw, batch) for draw in range(6)]
        values = torch.tensor([[draw[name] for name in names] for draw in draws], dtype=torch.float64)
        spread = values.std(dim=0).clamp(min=1e-9)
        if float(((logged - expected) / spread).abs().max()) > _ASIDE:
            found.append((float(((logged - values.mean(dim=0)) / spread).abs().max()), share))
    off, share = min(found, default=(math.inf, 0.0))
    if off > _WITHIN:
        return []
    return [Cause(name="dropout left on", text=f"the numbers lie within {off:.1f} standard deviations of those with "
                  f"dropout of about {share:g}; its random numbers are of the run's layout, start the audit in that "
                  "one to be certain")]


def explain_ratio(case: Case) -> list[Cause]:
    """By how much the gradient differs, where nothing gives it."""
    logged, replayed = case.difference.values.get("grad_norm", (None, None))
    if case.difference.part != "gradient" or not logged or not replayed:
        return []
    return [Cause(name="gradient", text=f"its norm is {logged / replayed:.4g} times the replayed one, which no known "
                  "factor and no known missing part gives; the loss is right")]


@contextmanager
def _attribute(case: Case, name: str, value: object) -> Iterator[None]:
    """Context in which an attribute of the model has another value."""
    models = case.replay.trainer.grad_cache.models
    before = [vars(model)[name] for model in models]
    for model in models:
        vars(model)[name] = value
    try:
        yield
    finally:
        for model, old in zip(models, before, strict=True):
            vars(model)[name] = old


@contextmanager
def dropout(case: Case, share: float) -> Iterator[None]:
    """Context in which all dropout of the layers has this probability."""
    changed: list[tuple[dict[str, Any], str, object]] = []
    for module in (module for model in case.replay.trainer.grad_cache.models for module in model.modules()):
        own = vars(module)
        names = [name for name in ("hidden_dropout", "dropout") if isinstance(own.get(name), float)]
        names += ["p"] if isinstance(module, torch.nn.Dropout) else []
        for name in names:
            changed.append((own, name, own[name]))
            own[name] = share
    try:
        yield
    finally:
        for own, name, value in changed:
            own[name] = value
