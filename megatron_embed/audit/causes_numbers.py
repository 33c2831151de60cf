"""Causes of other vectors and gradients: the step is computed in other ways and compared again."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch

from megatron_embed.audit.case import Case, Cause, of_ranks
from megatron_embed.audit.causes_loss import factors, losses, matches, tolerance_of
from megatron_embed.audit.compare import part_of
from megatron_embed.audit.plain_objective import PlainObjective
from megatron_embed.audit.variation import Variation
from megatron_embed.batch import StepBatch
from megatron_embed.models.lora import Lora
from megatron_embed.names import POOLINGS
from megatron_embed.training.step import seed_step

_DROPOUTS = (0.1, 0.05, 0.2, 0.3, 0.15, 0.25, 0.5, 0.02, 0.01)
_EQUAL_RATIOS = 2e-4
"""Relative difference within which loss and gradient are multiplied alike."""
_WITHIN, _ASIDE = 4.0, 0.7
"""Standard deviations of dropout within which the logged numbers must lie, and by which the plain ones must differ."""
_ROLES: Mapping[str, tuple[Literal["queries", "positives", "hard_negatives"], ...]] = {
    "queries": ("queries",), "documents": ("positives", "hard_negatives"), "hard negatives": ("hard_negatives",)}
_AHEAD = 200
"""Steps after the different one in whose records a drifted rank is looked for."""


def explain(case: Case) -> list[Cause]:
    """The first cause under which the step has the logged numbers."""
    batch = case.replay.batch(case.step)
    for candidates in (_copies, _metric_alone, losses, _gradients, _models, _loss_alone):
        for cause in candidates(case, batch):
            return [cause]
    return []


def _copies(case: Case, batch: StepBatch) -> Iterator[Cause]:
    """A rank whose parameters differ from its replicas' at this step or soon after."""
    for step in range(max(1, case.step - 1), case.step + _AHEAD):
        record: Mapping[str, Any] = {**case.log.steps.get(step, {}), **case.log.saves.get(step, {})}
        if "drifted" in record:
            yield Cause(name="drifted parameters", text=f"{of_ranks(record['drifted'])}: the copies of the "
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
        named = next((f", which is {name}" for factor, name in factors(case)
                      if math.isclose(factor, ratios[0], rel_tol=_EQUAL_RATIOS)), "")
        yield Cause(name="loss scale", text=f"loss and gradient are {ratios[0]:.6g} times what they must be{named}")
        return
    if all(tolerance.allows(name, logged[name], numbers[name], 1e-2) for name in ("loss", "grad_norm")):
        yield Cause(name="wrong metric", text=f"loss and gradient are right; {', '.join(case.difference.values)} as "
                    "logged is not")


def _loss_alone(case: Case, batch: StepBatch) -> Iterator[Cause]:
    """A loss that is wrong although its gradient is right."""
    logged, numbers = case.record["metrics"]["grad_norm"], case.replay.numbers(case.step, batch).metrics
    if case.difference.part == "loss" and tolerance_of(case).allows("grad_norm", logged, numbers["grad_norm"], 0.0):
        yield Cause(name="wrong metric", text=f"the gradient is right, so the parameters learned what they must; "
                    f"{', '.join(case.difference.values)} as logged is not: a constant, a term without gradient, or "
                    "a log that was changed")


def _gradients(case: Case, batch: StepBatch) -> Iterator[Cause]:
    """Another gradient of the same loss."""
    if case.difference.part != "gradient":
        return
    tolerance, logged = tolerance_of(case), case.record["metrics"]["grad_norm"]
    base = case.replay.numbers(case.step, batch).metrics["grad_norm"]
    for factor, name in factors(case):
        if tolerance.allows("grad_norm", logged, base * factor, 0.0):
            yield Cause(name="loss scale", text=f"the gradient is {factor:.6g} times what it must be, which is {name}; "
                        "the loss is right")
            return
    objective = case.replay.trainer.grad_cache.objective
    assert isinstance(objective, PlainObjective)
    for name, text, variation in _gradient_variations(case) if objective.is_plain else ():
        norm = case.replay.numbers(case.step, batch, variation).metrics["grad_norm"]
        for factor, by in ((1.0, ""), *factors(case)):
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
    for factor in dict.fromkeys((2.0, 0.5, float(ranks), 1.0 / ranks, -1.0)):
        for role, rows in _ROLES.items() if factor != 1 else ():
            yield (f"gradient of {role} scaled", f"the gradient of the {role} is multiplied by {factor:g}",
                   Variation(detached=rows, detached_factor=factor))
    yield "rounded gradient", "the gradient of the vectors is rounded to bfloat16", Variation(rounded="gradient")
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
    for factor, by in _adapter_factors(case):
        with _scaled_adapters(case, factor):
            if matches(case, case.replay.evaluated(case.step, batch)):
                yield Cause(name="wrong scale of the adapters", text=f"the adapters' outputs are multiplied by "
                            f"{factor:.6g}{by} besides the configured scale")
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


def _adapters(case: Case) -> list[Lora]:
    return [module for model in case.replay.trainer.grad_cache.models for module in model.modules()
            if isinstance(module, Lora)]


def _adapter_factors(case: Case) -> Iterator[tuple[float, str]]:
    """Factors that the scale of adapters may have, with their names; none without adapters."""
    lora = case.replay.inputs.config.lora
    known = [(2.0, ""), (4.0, ""), (lora.alpha, ", lora.alpha,"), (float(lora.rank), ", lora.rank,"),
             (math.sqrt(lora.rank), ", the root of lora.rank,")] if lora.rank and _adapters(case) else []
    for factor, name in known:
        if factor != 1:
            yield factor, name
            yield 1 / factor, f", 1 / {name.strip(' ,')}," if name else ""


@contextmanager
def _scaled_adapters(case: Case, factor: float) -> Iterator[None]:
    """Context in which the outputs of all adapters are multiplied."""
    for module in (adapters := _adapters(case)):
        module.scale *= factor
    try:
        yield
    finally:
        for module in adapters:
            module.scale /= factor


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
