"""A reranker's gradients are those of one process, whatever layout, head, loss and sizes of the lists."""

import dataclasses

import pytest

from tests.helpers.ranks import run_on_ranks
from tests.helpers.rerank_reference import MAX_LENGTH, MODELS, Case, compute_reference, error_of, run_case

BOUND = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rerankers")


@pytest.fixture(scope="module")
def reference_of(folder):
    known = {}

    def reference(case):
        key = case.directory, case.loss
        if key not in known:
            known[key] = compute_reference(case, folder)
        return known[key]

    return reference


def run(case, folder, reference):
    per_rank = run_on_ranks(run_case, case.ranks, case, str(folder), reference.gradients)
    error, name = error_of(per_rank, reference)
    loss_error = max(abs(rank["metrics"]["loss"] - reference.loss) for rank in per_rank) / reference.loss
    norm_error = max(abs(rank["norm"] - reference.norm) for rank in per_rank) / reference.norm
    return error, name, loss_error, norm_error


def layout(tp=1, pp=1, cp=1, vpp=None, ep=1):
    return {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "context_parallel_size": cp,
            "virtual_pipeline_model_parallel_size": vpp, "expert_model_parallel_size": ep}


FAST = [
    Case(model="tied", loss="lambda_loss"),
    Case(model="tied", loss="lambda_loss", micro_batch_size=2),
    Case(model="tied", loss="lambda_loss", parallel=layout(tp=2), ranks=2, micro_batch_size=4),
    Case(model="tied", loss="lambda_loss", parallel=layout(pp=2), ranks=2, micro_batch_size=2),
    Case(model="tied", loss="lambda_loss", parallel=layout(cp=2), ranks=2),
    Case(model="tied", loss="lambda_loss", ranks=2, micro_batch_size=2),
    Case(model="tied", loss="lambda_loss", parallel=layout(tp=2, pp=2), ranks=4, micro_batch_size=4),
    Case(model="untied", loss="listwise", parallel=layout(pp=2), ranks=2, micro_batch_size=4),
    Case(model="untied", loss="listwise", parallel=layout(cp=2), ranks=2, micro_batch_size=4),
    Case(model="score", loss="ranknet", parallel=layout(tp=2), ranks=2, micro_batch_size=4),
    Case(model="encoder", loss="pointwise", parallel=layout(cp=2), ranks=2),
    Case(model="tied", loss="lambda_loss", adapters=True, micro_batch_size=4),
    Case(model="score", loss="ranknet", parallel=layout(tp=2), ranks=2, micro_batch_size=4, adapters=True),
    Case(model="encoder", loss="pointwise", parallel=layout(pp=2), ranks=2, micro_batch_size=4, adapters=True),
    Case(model="modernbert", loss="pointwise", parallel=layout(cp=2), ranks=2, micro_batch_size=4),
]

MORE = [
    Case(model="tied", loss="kl_distillation", ranks=2, micro_batch_size=2, distributed=False),
    Case(model="tied", loss="margin_ranking", parallel=layout(pp=2, vpp=2), ranks=2, micro_batch_size=2),
    Case(model="tied", loss="lambda_loss", ranks=2, tokens=16 * MAX_LENGTH),
    Case(model="tied", loss="lambda_loss", parallel=layout(pp=2, vpp=2), ranks=4, tokens=16 * MAX_LENGTH),
    Case(model="tied", loss="listwise", parallel=layout(tp=2, cp=2), ranks=4, micro_batch_size=4),
    Case(model="untied", loss="ranknet", parallel=layout(tp=2), ranks=2, micro_batch_size=4, distributed=False),
    Case(model="untied", loss="pointwise", parallel=layout(cp=2), ranks=4, micro_batch_size=2),
    Case(model="score", loss="lambda_loss", parallel=layout(pp=2), ranks=4, micro_batch_size=2),
    Case(model="score", loss="listwise", parallel=layout(cp=2), ranks=2, micro_batch_size=4),
    Case(model="encoder", loss="lambda_loss", parallel=layout(tp=2), ranks=2, micro_batch_size=4),
    Case(model="encoder", loss="listwise", parallel=layout(pp=2), ranks=4, micro_batch_size=2),
    Case(model="modernbert", loss="pointwise", parallel=layout(tp=2), ranks=2, micro_batch_size=4),
    Case(model="modernbert", loss="ranknet", parallel=layout(pp=2), ranks=2, micro_batch_size=4, adapters=True),
    Case(model="experts", loss="lambda_loss", parallel=layout(ep=2), ranks=2, micro_batch_size=2),
    Case(model="experts", loss="listwise", parallel=layout(tp=2), ranks=2, micro_batch_size=4),
    Case(model="experts", loss="ranknet", parallel=layout(pp=2, ep=2), ranks=4, micro_batch_size=2),
    Case(model="tied", loss="lambda_loss", parallel=layout(tp=2, pp=2), ranks=4, micro_batch_size=4, adapters=True),
    Case(model="untied", loss="listwise", parallel=layout(pp=2), ranks=2, micro_batch_size=4, adapters=True),
    Case(model="score", loss="listwise", parallel=layout(cp=2), ranks=2, micro_batch_size=4, adapters=True),
    Case(model="score", loss="listwise", ranks=2, micro_batch_size=2, adapters=True, distributed=False),
    # Not listwise: it knows no bias of all scores, whose gradient would be rounding errors alone.
    Case(model="encoder", loss="pointwise", parallel=layout(tp=2), ranks=2, micro_batch_size=4, adapters=True)]


NEWER = [Case(model=name, loss="pointwise", parallel=sizes, ranks=2, micro_batch_size=4)
         for name in MODELS if name not in ("tied", "untied", "score", "encoder", "modernbert", "experts")
         for sizes in (layout(tp=2), layout(pp=2, vpp=2), layout(cp=2))]
"""Rerankers of the other families."""


@pytest.mark.parametrize("case", [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in (*MORE, *NEWER))],
                         ids=str)
def test_gradients_are_exact(case, folder, reference_of):
    error, name, loss_error, norm_error = run(case, folder, reference_of(case))
    assert error <= BOUND, (error, name)
    assert loss_error <= 2e-6
    assert norm_error <= BOUND


@pytest.mark.parametrize("case, smallest", [
    (Case(model="untied", loss="listwise", parallel=layout(cp=2), ranks=2, micro_batch_size=4, sabotage="context"),
     0.9),
    (Case(model="tied", loss="lambda_loss", sabotage="labels"), 1e-2)], ids=str)
def test_a_deliberate_mistake_fails_the_comparison(case, smallest, folder, reference_of):
    error, name, _, _ = run(case, folder, reference_of(dataclasses.replace(case, sabotage=None)))
    assert error > smallest
    # Twice the gradient, and of the head alone: every context-parallel rank finds the whole of it.
    assert case.sabotage != "context" or name == "head.weight"
