"""The gradient of a step equals one process on the whole batch, for every layout and index of micro-batches."""

import math

import pytest
import torch

from tests.helpers.gradient_errors import largest_error
from tests.helpers.ranks import run_on_ranks
from tests.helpers.step_reference import (
    ROWS,
    both_passes_of_runs,
    difference,
    gradients_of_step,
    objective_settings,
    reference,
)
from tests.helpers.toys import layout, run_config, save_model

KINDS = ("bert", "qwen3")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_model(folder / kind, kind, tokenizer=True) for kind in KINDS}


@pytest.fixture(scope="module")
def references(models, tmp_path_factory):
    return {kind: reference(models[kind], tmp_path_factory.mktemp(f"{kind}_gradients")) for kind in KINDS}


def compare(directory, expected, ranks, sizes, micro_batch_size, *, distributed=False, wrong_factor=1.0, **objective):
    """Relative error of the gradients; the loss is compared on the way."""
    config = run_config(directory, parallel=sizes, distributed=distributed, objective=objective_settings(**objective),
                        training={"global_batch_size": ROWS, "micro_batch_size": micro_batch_size})
    results = run_on_ranks(gradients_of_step, ranks, config, expected.gradients, wrong_factor)
    for loss, _ in results:
        assert loss == pytest.approx(expected.loss, rel=1e-6)
    return largest_error([errors for _, errors in results])[0]


CASES = [
    # ranks, layout, micro-batch size (queries), distributed optimizer
    *[(1, layout(), size, False) for size in (12, 6, 4, 1)],
    (1, layout(), 5, False),  # the last micro-batch is smaller
    (2, layout(), 6, False), (2, layout(), 2, False), (2, layout(), 3, True), (2, layout(), 6, True),
    (2, layout(2), 12, False), (2, layout(2), 4, True), (2, layout(2, sp=False), 4, False),
    (2, layout(pp=2), 12, False), (2, layout(pp=2), 3, False), (2, layout(pp=2), 4, True),
    (2, layout(cp=2), 12, False), (2, layout(cp=2), 4, False), (2, layout(cp=2), 4, True),
]


def name_of(case):
    ranks, sizes, size, distributed = case
    tp, pp, cp, sp = list(sizes.values())[:4]
    return f"ranks{ranks}-tp{tp}{'' if sp else 'nosp'}-pp{pp}-cp{cp}-mbs{size}{'-dist' if distributed else ''}"


REPEATED = ((1, layout(), 6, False), (2, layout(), 6, True), (2, layout(cp=2), 4, False), (2, layout(2), 12, False))
"""Cases of which another differs in one place alone: the number of micro-batches, the optimizer, or context parallel
ranks in the place of tensor parallel ones."""


def is_quick(kind, index, case):
    return case not in REPEATED if kind == "qwen3" else index % 4 == 0


@pytest.mark.parametrize("kind, case", [
    # test_exactness.py has both kinds under every layout.
    pytest.param(kind, case, id=f"{name_of(case)}-{kind}", marks=() if is_quick(kind, index, case) else
                 pytest.mark.slow) for kind in KINDS for index, case in enumerate(CASES)])
def test_gradients_equal_one_process(models, references, kind, case):
    ranks, sizes, size, distributed = case
    error = compare(models[kind], references[kind], ranks, sizes, size, distributed=distributed)
    assert error <= 1e-5


@pytest.mark.parametrize("sizes", [layout(2, pp=2), layout(2), layout(pp=2, cp=2)], ids=["tp2pp2", "tp2dp2", "pp2cp2"])
def test_gradients_of_combined_layouts_equal_one_process(models, references, sizes):
    assert compare(models["qwen3"], references["qwen3"], 4, sizes, 3, distributed=True) <= 1e-5


@pytest.mark.parametrize("size", [12, 4], ids=["one_pass", "two_pass"])
def test_wrong_factor_fails_the_comparison(models, references, size):
    assert compare(models["bert"], references["bert"], 1, layout(), size, wrong_factor=1.001) > 5e-4


@pytest.mark.parametrize("ranks, size", [(1, 12), (1, 4), (2, 6), (2, 3)])
def test_micro_batch_negatives_equal_the_mean_of_the_micro_batches_losses(models, tmp_path, ranks, size):
    share = ROWS // ranks
    groups = [[rank * share + start + row for rank in range(ranks) for row in range(size)]
              for start in range(0, share, size)]
    expected = reference(models["bert"], tmp_path / "gradients", groups)
    assert compare(models["bert"], expected, ranks, layout(), size, negatives="micro_batch") <= 1e-5


PLACES = {"one": layout(), "pp2": layout(pp=2), "tp2": layout(2), "tp2nosp": layout(2, sp=False), "cp2": layout(cp=2)}
ALWAYS = ("qwen3 pp2",)


@pytest.mark.parametrize("kind, layout_name", [
    pytest.param(kind, layout_name, marks=() if f"{kind} {layout_name}" in ALWAYS else pytest.mark.slow)
    for kind in KINDS for layout_name in PLACES])
def test_second_pass_and_recomputation_drop_what_the_first_dropped(models, kind, layout_name):
    sizes = PLACES[layout_name]

    def config(recompute, hidden=0.2, attention=0.2):
        return run_config(models[kind], parallel=sizes, objective=objective_settings(),
                          training={"global_batch_size": ROWS, "micro_batch_size": 3, "recompute": recompute,
                                    "hidden_dropout": hidden, "attention_dropout": attention})

    modes = ("none", "selective", "full")
    runs = [(config(mode), None, True) for mode in modes] + [(config("none"), None, False)]
    others = {"attention dropout was off": (config("none", attention=0.0), None, True),
              "hidden dropout was off": (config("none", hidden=0.0), None, True),
              "the seed does not reach the dropout": (config("none"), 8, True)}
    ranks = math.prod(list(sizes.values())[:3])
    answers = run_on_ranks(both_passes_of_runs, ranks, runs + list(others.values()))
    seen = [outputs for outputs, _ in answers[-1]]
    for outputs, (_, _, replay) in zip(seen, runs, strict=False):
        assert len(outputs) == 8
        for first, second in zip(outputs[:4], outputs[4:], strict=True):
            assert torch.equal(first, second) == replay
    assert all(torch.equal(seen[0][0], outputs[0]) for outputs in seen[1:4]), "recomputation changes the first pass"
    for reason, outputs in zip(others, seen[4:], strict=True):
        assert (seen[0][0] - outputs[0]).abs().max() > 0.01, reason
    for answer in answers:
        (_, expected), *recomputed, (_, without_replay) = answer[:4]
        for _, gradients in recomputed:
            assert difference(gradients, expected) <= 1e-5
        assert difference(without_replay, expected) > 0.1


