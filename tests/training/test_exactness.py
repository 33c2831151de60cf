"""Every layout's gradients equal one process's; the whole matrix is slow, a part of it always runs."""

import dataclasses
import itertools

import pytest

from tests.helpers.curves import loss_curve
from tests.helpers.embedding_reference import EmbeddingReference
from tests.helpers.exactness_cases import (
    BOUND,
    CURVE_BOUND,
    CURVE_LAYOUTS,
    KINDS,
    ROWS,
    Case,
    Layout,
    all_cases,
    dense_cases,
    flash_cases,
    head_cases,
    head_flash_cases,
    joint_cases,
    multi_vector_cases,
    other_model_cases,
    sparse_cases,
    stored_cases,
)
from tests.helpers.pretend_ranks import shutdown_pretend_ranks
from tests.pretend_cuda.build import reason_against

FAST = (
    Case(kind="qwen3", layout=Layout(dp=2), micro_batches=2, rows="masked", distributed=True),
    Case(kind="bert", layout=Layout(dp=2), micro_batches=1),
    Case(kind="bert", layout=Layout(dp=2), tokens=48, rows="lopsided", first_pass=3),
    Case(kind="qwen3", layout=Layout(dp=2), tokens=288, rows="masked", negatives="micro_batch"),
    Case(kind="qwen3_moe", layout=Layout(dp=2, ep=2), micro_batches=2, aux=0.1, distributed=True, first_pass=2),
    Case(kind="qwen3_moe", layout=Layout(dp=2, ep=2), tokens=176, first_pass=2),
    Case(kind="qwen3", layout=Layout(tp=2), micro_batches=2, rows="masked"),
    Case(kind="qwen3_moe", layout=Layout(tp=2), micro_batches=1, distributed=True),
    Case(kind="bert", layout=Layout(tp=2), micro_batches=2, dense="embeddinggemma"),
    Case(kind="bert", layout=Layout(tp=2), micro_batches=2, joint="distilled"),
    Case(kind="qwen3", layout=Layout(pp=2, vpp=2), micro_batches=4, repeats=3, rows="masked", first_pass=2),
    Case(kind="bert", layout=Layout(cp=2), micro_batches=2),
    Case(kind="qwen3", layout=Layout(cp=2, a2a=True), micro_batches=2, rows="masked"),
    Case(kind="qwen3", layout=Layout(tp=2, pp=2), micro_batches=4, first_pass=3, recompute="full", rows="masked"),
    Case(kind="bert", layout=Layout(tp=2, dp=2), tokens=176, distributed=True, first_pass=3, keep=1),
    Case(kind="qwen3", layout=Layout(cp=2, dp=2), tokens=128, rows="masked", first_pass=4),
    Case(kind="qwen3_moe", layout=Layout(pp=2, dp=2, ep=2), micro_batches=2),
    Case(kind="bert", layout=Layout(dp=2), micro_batches=2, multi="colbert", rows="masked"),
    Case(kind="bert", layout=Layout(dp=2), micro_batches=4, stored="all-widths", rows="masked", distributed=True),
)
"""The long rows, whose model takes half a minute to teach, are left to the slow part."""

LARGER_FIRST_PASS = (
    Case(kind="qwen3", layout=Layout(pp=2, vpp=2, dp=2), tokens=48, rows="lopsided", first_pass=2),
    Case(kind="bert", layout=Layout(pp=2, vpp=2, dp=2), tokens=128, rows="masked", first_pass=3),
    Case(kind="qwen3_moe", layout=Layout(pp=2, vpp=2, dp=2, ep=2), tokens=128, rows="masked", first_pass=4),
    Case(kind="qwen3_moe", layout=Layout(pp=2, vpp=2, dp=2, ep=2), tokens=176, aux=0.1, first_pass=2),
    Case(kind="qwen3", layout=Layout(pp=2, cp=2), micro_batches=4, rows="masked", first_pass=2),
    Case(kind="qwen3", layout=Layout(dp=2), tokens=128, rows="masked", first_pass=2, overlap=True, distributed=True),
    Case(kind="qwen3", layout=Layout(dp=2), tokens=144, rows="masked", first_pass=4, adapters=True),
    Case(kind="qwen3", layout=Layout(dp=2), tokens=128, rows="masked", first_pass=2, keep=1, overlap=True,
         distributed=True),
    Case(kind="bert", layout=Layout(dp=2), tokens=48, rows="lopsided", first_pass=3, keep=2),
    Case(kind="qwen3_moe", layout=Layout(dp=2, ep=2), micro_batches=4, aux=0.1, first_pass=2, keep=2),
)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    return EmbeddingReference(tmp_path_factory.mktemp("oracle"))


def by_layout(cases):
    return [list(group) for _, group in itertools.groupby(cases, key=lambda case: case.layout)]


def check(oracle, cases):
    for case, outcome in zip(cases, oracle.run(cases), strict=True):
        assert outcome.exact, f"{case}: {outcome}"
        if case.rows == "long":
            assert outcome.tokens >= 8192
        if case.tokens is not None and case.others != "query side":  # whose bins hold little
            assert len(set(outcome.bins)) > 1, f"{case}: the ranks had nothing to agree on"
        assert bool(outcome.shared) == (case.encode_once and ROWS[case.rows].masked), f"{case}: {outcome}"


@pytest.mark.parametrize("cases", by_layout(FAST), ids=lambda cases: str(cases[0].layout))
def test_gradients_equal_one_process(oracle, cases):
    check(oracle, cases)


@pytest.mark.slow
@pytest.mark.parametrize("cases", [
    pytest.param(cases, id=f"{name}, {cases[0].layout}") for name, group in (
        ("one vector", all_cases()), ("Dense modules", dense_cases()), ("context parallelism by heads", head_cases()),
        ("a vector per token", multi_vector_cases()), ("sparse", sparse_cases()),
        ("joint heads", joint_cases()), ("rounded", stored_cases()),
        ("with other models' vectors", other_model_cases()), ("larger first pass", LARGER_FIRST_PASS))
    for cases in by_layout(group)])
def test_gradients_equal_one_process_in_every_layout(oracle, cases):
    check(oracle, cases)


@pytest.fixture(scope="module")
def pretend_ranks():
    reason = reason_against()
    if reason is not None:
        pytest.skip(f"no pretend device: {reason}")
    yield
    shutdown_pretend_ranks()


@pytest.mark.slow
@pytest.mark.parametrize("cases", by_layout([*flash_cases(), *head_flash_cases()]),
                         ids=lambda cases: str(cases[0].layout))
def test_gradients_by_flash_kernels_equal_one_process(oracle, pretend_ranks, cases):
    check(oracle, cases)


def test_the_matrix_is_large_enough():
    cases = all_cases()
    assert len(set(cases)) == len(cases) >= 60
    assert {case.layout.ranks for case in cases} == {1, 2, 4, 8}
    assert {1, 2, 4} <= {case.micro_batches for case in cases}
    assert any(case.repeats == 50 and case.layout.vpp == 2 for case in cases)
    for chosen in ([case for case in cases if ROWS[case.rows].masked], [case for case in cases if case.tokens],
                   [case for case in cases if case.negatives == "micro_batch"]):
        assert {case.kind for case in chosen} == set(KINDS)
        assert all(any(getattr(case.layout, axis) == 2 for case in chosen) for axis in ("dp", "tp", "pp", "vpp", "cp"))
    assert any(case.tokens and case.layout.ep == 2 for case in cases)


@pytest.mark.parametrize("case, sabotage, smallest", [
    (Case(kind="qwen3", layout=Layout(dp=2), micro_batches=1), "factor", 9e-4),
    (Case(kind="qwen3", layout=Layout(dp=2), micro_batches=2), "factor", 9e-4),
    (Case(kind="qwen3", layout=Layout(dp=2), micro_batches=2), "group", 1e-2),
    (Case(kind="qwen3", layout=Layout(tp=2), micro_batches=2), "group", 1e-2),
    (Case(kind="qwen3", layout=Layout(tp=2), micro_batches=4), "order", 1e-2),
    (Case(kind="qwen3", layout=Layout(pp=2), micro_batches=4), "order", 1e-2),
    (Case(kind="qwen3", layout=Layout(dp=2), micro_batches=2, rows="masked"), "mask", 1e-2),
    (Case(kind="qwen3", layout=Layout(dp=2), tokens=128, rows="masked"), "mask", 1e-2),
], ids=lambda value: str(value))
def test_a_deliberate_mistake_fails_the_comparison(oracle, case, sabotage, smallest):
    (outcome,) = oracle.run([dataclasses.replace(case, sabotage=sabotage)])
    assert not outcome.exact
    # Candidates of tensor-parallel ranks double every document: the gradient stays, the loss gains ln 2.
    assert max(outcome.error, outcome.loss_error) > max(smallest, BOUND)


@pytest.mark.slow
def test_loss_curves_agree_over_layouts(oracle):
    oracle.make_model("qwen3")
    first, *others = (loss_curve(oracle.folder, layout) for layout in CURVE_LAYOUTS)
    assert first[-1] < first[0] - 0.1, "nothing was learned, so nothing is shown"
    for layout, losses in zip(CURVE_LAYOUTS[1:], others, strict=True):
        assert max(abs(a - b) for a, b in zip(first, losses, strict=True)) <= CURVE_BOUND, str(layout)
