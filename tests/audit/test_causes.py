"""Causes that are computed from the numbers of a log, without a replay."""

import dataclasses
import types

import pytest
import torch

from megatron_embed.audit.causes_loss import _fitted, losses
from megatron_embed.audit.causes_rows import repeated_micro_batch
from megatron_embed.audit.causes_update import _kernel, _moments, _twice, _with_l2
from megatron_embed.audit.plain_objective import PlainObjective
from megatron_embed.audit.variation import Variation
from megatron_embed.config.load import config_of_values
from megatron_embed.training.optimizer import AdamW


def case_of(metrics, **objective):
    config = config_of_values({"model": {"path": "."}, "objective": objective,
                               "embedding": {"matryoshka_dims": [32, 16]} if "loss@16" in metrics else {}})
    return types.SimpleNamespace(record={"metrics": metrics}, dp_size=2, replay=types.SimpleNamespace(
        inputs=types.SimpleNamespace(config=config)))


def metrics_under(variation: Variation) -> dict[str, float]:
    """A loss that falls with the temperature and rises with hardness; seven negatives, fewer by a lower margin."""
    settings = dict(variation.settings)
    return {"loss": 1 / (variation.temperature or 0.3) + settings.get("hardness_strength", 5.0),
            "negatives_per_query": 7.0 - sum(settings.get("mask_margin", 0.5) < bound for bound in (0.3, 0.1, 0.0))}


@pytest.mark.parametrize("metrics, objective, name, text", [
    ({"loss": 1 / 0.17 + 5}, {"temperature": 0.3}, "wrong temperature", "temperature 0.17, not of 0.3"),
    ({"loss": 1 / 0.3 + 9}, {"hardness": "all_negatives", "hardness_strength": 5.0}, "wrong hardness strength",
     "objective.hardness_strength = about 9, not 5"),
    ({"loss": 0.1, "negatives_per_query": 5.0}, {"mask_margin": 0.5}, "wrong mask margin", "= about 0, not 0.5"),
    ({"loss": 5.0, "loss@32": 1.0, "loss@16": 2.0}, {}, "wrong weight of a term", "dimension 16 weighs 2, not 1")])
def test_settings_of_the_loss_are_fitted(metrics, objective, name, text):
    found = {cause: (said, variation) for cause, said, variation in _fitted(case_of(metrics, **objective),
                                                                           metrics_under)}
    assert text in found[name][0].replace("-0,", "0,")
    if name != "wrong weight of a term":
        assert metrics_under(found[name][1])["negatives_per_query" if "mask" in name else "loss"] == pytest.approx(
            metrics["negatives_per_query" if "mask" in name else "loss"])


def test_settings_that_do_not_go_together_are_no_cause():
    """A triplet loss takes no private negatives; the other variations of the loss are tried all the same."""
    tried, config = [], config_of_values({"model": {"path": "."}, "objective": {"loss": "triplet"},
                                         "data": {"num_negatives": 1}})

    class Kept(PlainObjective):
        def __init__(self):
            self._config, self.kept, self.is_plain = config, None, True

        def metrics_of_kept(self, variation, *, as_one=False):
            tried.append(variation)
            dataclasses.replace(config.objective, **dict(variation.settings))
            return {"loss": 1.0}

    objective = Kept()
    replay = types.SimpleNamespace(
        inputs=types.SimpleNamespace(config=config), from_last_stage=lambda metrics: metrics,
        evaluated=lambda *_: objective.kept.append([]),
        trainer=types.SimpleNamespace(grad_cache=types.SimpleNamespace(objective=objective)))
    case = types.SimpleNamespace(replay=replay, dp_size=1, done=0, step=1, record={"metrics": {"loss": 2.0}}, start={
        "dtype": "float32"}, difference=types.SimpleNamespace(part="loss"))
    assert not list(losses(case, None))
    assert any(variation.settings for variation in tried) and not tried[-1].hardness  # the last one


def test_a_repeated_micro_batch_is_named():
    case, parts = types.SimpleNamespace(dp_size=2), [1 << 63, 11, (1 << 64) - 5, 7]
    for changed, text in (([0, 1, 2, 2], "micro-batch 1 of data-parallel rank 1 was there twice, in place of "
                                         "micro-batch 2 of data-parallel rank 1"),
                          ([1, 1, 3, 3], "micro-batch 2 of every data-parallel rank was there twice, in place of "
                                         "micro-batch 1")):
        causes = list(repeated_micro_batch(case, parts, sum(parts[index] for index in changed) % 2**64))
        assert [(cause.name, cause.text) for cause in causes] == [("duplicated micro-batch", text)]
    assert not list(repeated_micro_batch(case, parts, sum(parts) % 2**64))


def updated(change, steps=2):
    """A parameter after some updates, the last with a change, and the optimizer's count of updates."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = AdamW([parameter], lr=0.1, weight_decay=0.5, betas=(0.9, 0.99), eps=1e-8)
    replay = types.SimpleNamespace(trainer=types.SimpleNamespace(optimizer=types.SimpleNamespace(
        chained_optimizers=[types.SimpleNamespace(optimizer=optimizer)])))
    for step in range(steps):
        parameter.grad = torch.tensor([0.3, 0.1 * step, -0.2])
        undo = change(replay) if change is not None and step == steps - 1 else None
        optimizer.step()
        if undo is not None:
            undo()
    assert "_update" not in vars(optimizer)
    return parameter.detach(), optimizer.param_groups[0]["step"]


def test_changes_of_an_update_are_what_they_are_called():
    plain, count = updated(None)
    twice, count_of_twice = updated(_kernel(_twice))
    assert (count, count_of_twice) == (2, 3) and not torch.equal(plain, twice)
    expected = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    l2 = torch.optim.Adam([expected], lr=0.1, weight_decay=0.5, betas=(0.9, 0.99), eps=1e-8)
    expected.grad = torch.tensor([0.3, 0.0, -0.2])
    l2.step()
    torch.testing.assert_close(updated(_kernel(_with_l2), steps=1)[0], expected.detach())
    changed = [updated(_moments(reset_step=False, names=names))[0] for names in (
        ("exp_avg",), ("exp_avg_sq",), ("exp_avg", "exp_avg_sq"))]
    assert len({tuple(value.tolist()) for value in (plain, *changed)}) == 4
