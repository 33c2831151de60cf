"""Gradients of the families that the exactness matrix does not hold, against one process, under a few layouts."""

import pytest

from tests.helpers.embedding_reference import EmbeddingReference
from tests.helpers.exactness_cases import OTHER_KINDS, SLOW_KINDS, Case, Layout

LAYOUTS = (Layout(), Layout(tp=2), Layout(pp=2))
SPECIAL = (
    [Case(kind="mistral", layout=Layout(cp=2), micro_batches=2)],  # a window over two ranks' tokens
    [Case(kind="t5", layout=Layout(pp=2), micro_batches=2)],  # two copies of the bias
    [Case(kind="llama", layout=Layout(pp=2, vpp=2), micro_batches=4, repeats=3)],  # 5 layers in 4 stages
    [Case(kind="mixtral", layout=Layout(dp=2, ep=2), micro_batches=2)],
    [Case(kind="modernbert", layout=Layout(cp=2), micro_batches=2)],  # two windows and rotary bases
    [Case(kind="gemma3_text", layout=Layout(cp=2), micro_batches=2)],  # the same, both ways, norms around sublayers
)
CASES = ([Case(kind=kind, layout=layout, micro_batches=2) for kind in OTHER_KINDS] for layout in LAYOUTS)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    return EmbeddingReference(tmp_path_factory.mktemp("oracle"))


@pytest.mark.parametrize("cases", [*CASES, *SPECIAL], ids=lambda cases: str(cases[0].layout))
def test_gradients_equal_one_process(oracle, cases):
    for case, outcome in zip(cases, oracle.run(cases), strict=True):
        assert outcome.exact, f"{case}: {outcome}"


SLOW_LAYOUTS = (Layout(), Layout(dp=2), Layout(tp=2), Layout(tp=2, sequence_parallel=False), Layout(pp=2),
                Layout(pp=2, vpp=2), Layout(tp=2, pp=2), Layout(tp=2, cp=2))


@pytest.mark.slow
@pytest.mark.parametrize("layout", SLOW_LAYOUTS, ids=str)
def test_gradients_of_the_other_families_equal_one_process(oracle, layout):
    cases = [Case(kind=kind, layout=layout, micro_batches=count, distributed=count == 2, recompute=recompute)
             for kind in SLOW_KINDS for count, recompute in ((2, "none"), (4, "full"))]
    for case, outcome in zip(cases, oracle.run(cases), strict=True):
        assert outcome.exact, f"{case}: {outcome}"
