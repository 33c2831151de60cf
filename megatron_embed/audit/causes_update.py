"""Causes of other parameters after an update: the steps since the checkpoint are made again with other updates."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_embed.audit.case import Case, Cause
from megatron_embed.audit.causes_loss import matches, tolerance_of
from megatron_embed.audit.replay import Replay
from megatron_embed.training.optimizer import AdamW

Change = Callable[[Replay], Callable[[], None]]
"""Changes the optimizer before an update, whose gradient is in the buffers; returns what changes it back."""
_FACTORS = (0.0, 2.0, 0.5, 10.0, 0.1, 3.0, 1 / 3, 4.0, 0.25, -1.0)
_BETAS = ((0.9, 0.999), (0.9, 0.95), (0.9, 0.98), (0.9, 0.99), (0.95, 0.999), (0.0, 0.999), (0.9, 0.9))
_AROUND = 50
_MOST_STEPS = 20
"""Steps that are made again under a change of all of their updates."""
_SECANTS, _LARGEST_FACTOR = 6, 1e4


def explain(case: Case) -> list[Cause]:
    """The first cause that gives the logged learning rate, or the logged norms of the parameters."""
    if case.difference.part == "learning rate":
        return _learning_rate(case)
    if "skipped" in case.difference.values:
        skipped = bool(case.record["metrics"]["skipped"])
        text = ("the run skipped the update, for a loss or gradient that is not finite; the replay's is" if skipped
                else "the run made an update with a loss or gradient that is not finite")
        return [Cause(name="skipped step", text=text)]
    steps = range(case.done + 1, case.step + 1)
    changes = list(_changes(case))
    if "norm_weights" not in case.difference.values:  # the norms have no weight decay
        changes.sort(key=lambda item: "weight decay" not in item[0])
    for name, text, change in changes:
        for changed in ([range(case.step, case.step + 1)] if len(steps) == 1 else [
                range(case.step, case.step + 1), *([steps] if len(steps) <= _MOST_STEPS else [])]):
            if _gives_logged(case, change, changed):
                since = f", at step {case.step}" if len(changed) == 1 else f", in all steps since {steps.start}"
                return [Cause(name=name, text=text + since)]
    return _frozen(case) or _fitted(case) or _by_tensor(case)


def explain_before(case: Case) -> list[Cause]:
    """The update before a step whose numbers differ, although weights, texts and all steps before are as logged."""
    frozen = _frozen(case)
    if frozen or not 0 < case.step - 1 - case.done <= _MOST_STEPS:
        return frozen
    replay, last = case.replay, range(case.step - 1, case.step)
    for name, text, change in _changes(case):
        for changed in (last, *([range(case.done + 1, case.step)] if len(last) < case.step - 1 - case.done else [])):
            _replay_with(case, change, changed, case.step)
            if matches(case, replay.evaluated(case.step, replay.batch(case.step))):
                return [Cause(name=name, text=f"{text}, at step {case.step - 1}")]
    _replay_with(case, None, range(0), case.step)
    return [Cause(name="update before this step", text=f"step {case.done + 1} is as logged from the same checkpoint, "
                  f"so the forward pass is right: the update of step {case.step - 1} differs from the configured one")]


def _frozen(case: Case) -> list[Cause]:
    """Tensors that the run's next checkpoint holds as the one before did, and that the replay's update changes."""
    later = min((done for done in case.log.saves if done >= case.step), default=None)
    if later is None or case.replay.inputs.config.model.dtype != case.start["dtype"]:
        return []
    replay, saved = case.replay, case.log.saves[later]["save"]
    replay.restart()
    before = replay.checksums_by_name()
    replay.update(replay.numbers(case.done + 1, replay.batch(case.done + 1)))
    after = replay.checksums_by_name()
    frozen = [name for name in before if name in saved and saved[name][0] == before[name][0] != after[name][0]]
    _replay_with(case, None, range(0), case.step)
    return [Cause(name="parameters not updated", text=f"{len(frozen)} of {len(before)} tensors are the same after step "
                  f"{later} as after step {case.done}: {', '.join(frozen[:3])}{', ...' * (len(frozen) > 3)}")
            ] if frozen else []


def _replay_with(case: Case, change: Change | None, changed: range, end: int) -> None:
    """Make the steps from the checkpoint to before `end` again, with the change in some of them."""
    replay = case.replay
    replay.restart()
    for step in range(case.done + 1, end):
        numbers = replay.numbers(step, replay.batch(step))
        undo = change(replay) if change is not None and step in changed else None
        replay.update(numbers)
        if undo is not None:
            undo()


def _by_tensor(case: Case) -> list[Cause]:
    """Causes by tensor: those whose update differs, where a checkpoint was saved after the step."""
    if "save" not in case.record:
        return []
    replay = case.replay
    replay.restart()
    for step in range(case.done + 1, case.step + 1):
        before = replay.checksums_by_name()
        replay.update(replay.numbers(step, replay.batch(step)))
    saved, now, bound = case.record["save"], replay.checksums_by_name(), 20 * tolerance_of(case).norm
    different = [name for name, (_, norm) in now.items() if name in saved and not name.endswith(".bias")
                 and not math.isclose(saved[name][1], norm, rel_tol=bound)]
    if not different or len(different) == len(now):
        return []
    still = [name for name in different if math.isclose(saved[name][1], before[name][1], rel_tol=1e-12)]
    names = ", ".join(different[:3]) + (", ..." if len(different) > 3 else "")
    what = "are not updated" if len(still) == len(different) else "have another update"
    return [Cause(name="parameters not updated" if len(still) == len(different) else "update of some parameters",
                  text=f"{len(different)} of {len(now)} tensors {what}: {names}")]


def _learning_rate(case: Case) -> list[Cause]:
    """The step whose learning rate the logged one is, or its ratio to the right one."""
    scheduler = case.replay.trainer.scheduler
    group, before = case.replay.trainer.optimizer.param_groups[0], scheduler.num_steps
    logged, replayed = case.difference.values["learning_rate"]
    found = []
    for distance in (sign * number for number in range(1, _AROUND) for sign in (1, -1)):
        scheduler.num_steps = case.step - 1 + distance
        if scheduler.num_steps >= 0 and math.isclose(scheduler.get_lr(group), logged, rel_tol=1e-9):
            found = [Cause(name="wrong learning rate", text=f"it is that of step {case.step + distance}, "
                           f"{distance:+d} steps from here")]
            break
    scheduler.num_steps = before
    ratio = f", {logged / replayed:.6g} times the configured one" if replayed else ""
    return found or [Cause(name="wrong learning rate", text=f"it was {logged:g}{ratio}")]


def _gives_logged(case: Case, change: Change, changed: range) -> bool:
    """Whether the steps since the checkpoint, with the change in some of them, give the logged norms."""
    return _are_logged(case, _norms_under(case, change, changed))


def _norms_under(case: Case, change: Change | None, changed: range) -> dict[str, float]:
    """The norms of the parameters after the step, with the change in some of the steps since the checkpoint."""
    _replay_with(case, change, changed, case.step + 1)
    return {"norm_weights": case.replay.norm_weights(), "parameter_norm": case.replay.checksum().norm}


def _are_logged(case: Case, norms: dict[str, float]) -> bool:
    return all(math.isclose(case.record[name], value, rel_tol=tolerance_of(case).norm)
               for name, value in norms.items() if name in case.record)


def _fitted(case: Case) -> list[Cause]:
    """A factor of learning rate or weight decay that gives all norms, found by secants of one of them; none where the
    log has no other norm to confirm it."""
    if not {"norm_weights", "parameter_norm"} <= case.record.keys() or case.step - case.done > _MOST_STEPS:
        return []
    wanted, base = case.record["parameter_norm"], _norms_under(case, None, range(0))["parameter_norm"]
    for name, text, key in (("wrong weight decay", "weight decay is {:.4g} times as strong", "weight_decay"),
                            ("wrong learning rate", "the update is {:.4g} times as large as the logged learning rate "
                             "says", "lr")):
        for changed in dict.fromkeys((range(case.step, case.step + 1), range(case.done + 1, case.step + 1))):
            before, at_before, factor = 1.0, base, 2.0
            for _ in range(_SECANTS):
                norms = _norms_under(case, _times(key, factor), changed)
                if _are_logged(case, norms):
                    return [Cause(name=name, text=f"{text.format(factor)}, in the steps {changed.start} to "
                                  f"{changed.stop - 1}")]
                now = norms["parameter_norm"]
                if now == at_before or abs(factor) > _LARGEST_FACTOR:
                    break
                before, at_before, factor = factor, now, factor + (wanted - now) * (factor - before) / (now - at_before)
    return []


def _changes(case: Case) -> Iterator[tuple[str, str, Change]]:
    config = case.replay.inputs.config.training
    yield "clipping off", "the gradient is not clipped", _setting("clip_grad", math.inf)
    for norm in (1.0, 0.1, 0.5, 2.0, 5.0, 10.0, 0.2, 0.25, 0.3, 3.0):
        if norm != config.clip_grad:
            yield "wrong clipping", f"the gradient is clipped to {norm:g}", _setting("clip_grad", norm)
    if case.log.starts.get(case.done) and case.done:
        yield ("optimizer state lost", "the moments begin at zero, and the count of updates at one",
               _moments(reset_step=True))
    yield "optimizer state lost", "the moments of AdamW are zero before the update", _moments(reset_step=False)
    for name, what in (("exp_avg", "mean of the gradients"), ("exp_avg_sq", "mean of their squares")):
        yield ("optimizer state lost", f"AdamW's {what} is zero before the update",
               _moments(reset_step=False, names=(name,)))
    for factor in _FACTORS:
        text = f"the update is {factor:.4g} times as large as the logged learning rate says"
        yield ("wrong learning rate" if factor else "update missing", text if factor else "no parameter is updated",
               _groups(lambda group, factor=factor: {"lr": group["lr"] * factor}))
    yield "weight decay off", "training.weight_decay has no effect", _groups(lambda group: {"weight_decay": 0.0})
    yield ("weight decay of norms", "norms and biases have weight decay as well",
           _groups(lambda group: {"weight_decay": config.weight_decay}))
    yield "update made twice", "the optimizer makes two updates in one step", _kernel(_twice)
    yield ("weight decay in the gradient", "weight decay is added to the gradient (Adam with L2 regularization), not "
           "taken from the parameters (AdamW)", _kernel(_with_l2))
    for factor in (10.0, 0.1, 2.0, 0.5):
        yield ("wrong weight decay", f"weight decay is {factor:g} times as strong",
               _groups(lambda group, factor=factor: {"weight_decay": group["weight_decay"] * factor}))
    for betas in dict.fromkeys((*_BETAS, (config.adam_beta2, config.adam_beta1))):
        if betas != (config.adam_beta1, config.adam_beta2):
            yield ("wrong betas", f"AdamW's betas are {betas[0]:g} and {betas[1]:g}, not {config.adam_beta1:g} and "
                   f"{config.adam_beta2:g}", _groups(lambda group, betas=betas: {"betas": betas}))
    for eps in (1e-6, 1e-8, 1e-5, 1e-7, 1e-10, 1e-12, 1e-4, 1e-3):
        if eps != config.adam_eps:
            yield "wrong eps", f"AdamW's eps is {eps:g}", _groups(lambda group, eps=eps: {"eps": eps})
    yield "gradient reversed", "the gradient has the opposite sign", _scaled(-1.0)
    for factor in (0.5, 2.0, 1 / case.dp_size, float(case.dp_size)):
        yield ("gradient scaled", f"the gradient of the update is {factor:.4g} times the one whose norm is logged",
               _scaled(factor))
    for offset in (-1, 1):
        yield ("count of updates", f"AdamW's bias correction is that of {offset:+d} updates",
               _groups(lambda group, offset=offset: {"step": max(0, group.get("step", 0) + offset)}, keep=("step",)))


def _setting(name: str, value: object) -> Change:
    """A change of the optimizer's settings."""

    def change(replay: Replay) -> Callable[[], None]:
        settings: dict[str, Any] = vars(replay.trainer.optimizer.config)
        before, settings[name] = settings[name], value
        return lambda: settings.__setitem__(name, before)

    return change


def _groups(new: Callable[[dict[str, Any]], dict[str, Any]], keep: tuple[str, ...] = ()) -> Change:
    """A change of the groups of parameters; the values of `keep` are not changed back."""

    def change(replay: Replay) -> Callable[[], None]:
        before = []
        for group in replay.trainer.optimizer.param_groups:
            values = new(group)
            before.append((group, {name: group[name] for name in values if name not in keep}))
            group.update(values)

        def undo() -> None:
            for group, values in before:
                group.update({name: value for name, value in values.items() if name != "lr"})

        return undo

    return change


def _times(key: str, factor: float) -> Change:
    """A value of all groups multiplied."""
    return _groups(lambda group: {key: group[key] * factor})


def _moments(*, reset_step: bool, names: tuple[str, ...] = ("exp_avg", "exp_avg_sq")) -> Change:
    """Moments of zero."""

    def change(replay: Replay) -> Callable[[], None]:
        for part in replay.trainer.optimizer.chained_optimizers:
            for values in part.optimizer.state.values():
                for name in names:
                    if isinstance(values.get(name), torch.Tensor):
                        values[name].zero_()
            for group in part.optimizer.param_groups if reset_step else ():
                group["step"] = 0
        return lambda: None

    return change


def _kernel(instead: Callable[..., None]) -> Change:
    """Another computation of AdamW in place of its own, which it gets with the parameters and their group."""

    def change(replay: Replay) -> Callable[[], None]:
        optimizers = [part.optimizer for part in replay.trainer.optimizer.chained_optimizers
                      if isinstance(part.optimizer, AdamW)]
        for optimizer in optimizers:
            vars(optimizer)["_update"] = functools.partial(instead, optimizer._update)

        def undo() -> None:
            for optimizer in optimizers:
                del vars(optimizer)["_update"]

        return undo

    return change


def _twice(update: Callable[..., None], parameters: list[torch.nn.Parameter], group: dict[str, Any]) -> None:
    update(parameters, group)
    group["step"] += 1
    update(parameters, group)


def _with_l2(update: Callable[..., None], parameters: list[torch.nn.Parameter], group: dict[str, Any]) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.add_(parameter, alpha=group["weight_decay"])
    update(parameters, {**group, "weight_decay": 0.0})


def _scaled(factor: float) -> Change:
    """The gradient multiplied, after its norm was taken."""

    def change(replay: Replay) -> Callable[[], None]:
        for part in replay.trainer.optimizer.chained_optimizers:
            for parameter in part.get_parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        return lambda: None

    return change
