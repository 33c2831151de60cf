"""Gradients of the families that the exactness matrix does not hold, against one process, under a few layouts."""

import pytest

from tests.helpers.embedding_reference import EmbeddingReference
from tests.helpers.exactness_cases import OTHER_KINDS, Case, Layout

LAYOUTS = (Layout(), Layout(tp=2), Layout(pp=2))
SPECIAL = (
    [Case(kind="mistral", layout=Layout(cp=2), micro_batches=2)],  # a window over two ranks' tokens
    [Case(kind="llama", layout=Layout(pp=2, vpp=2), micro_batches=4, repeats=3)],  # 5 layers in 4 stages
    [Case(kind="mixtral", layout=Layout(dp=2, ep=2), micro_batches=2)],
)
CASES = ([Case(kind=kind, layout=layout, micro_batches=2) for kind in OTHER_KINDS] for layout in LAYOUTS)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    return EmbeddingReference(tmp_path_factory.mktemp("oracle"))


@pytest.mark.parametrize("cases", [*CASES, *SPECIAL], ids=lambda cases: str(cases[0].layout))
def test_gradients_equal_one_process(oracle, cases):
    for case, outcome in zip(cases, oracle.run(cases), strict=True):
        assert outcome.exact, f"{case}: {outcome}"
