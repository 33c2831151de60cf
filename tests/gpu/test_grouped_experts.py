"""One product for the experts of a rank: equal to one product each, with gradients added to DistributedDataParallel's.

Not run on a GPU so far, but on the pretend device (docs/pretend_device.md).
"""

from unittest import mock

import pytest
import torch

from megatron_embed.platform import grouped_linear
from megatron_embed.platform.grouped_linear import (
    GroupedLinear,
    Groups,
    groups_of,
    has_grouped_product,
    weight_gradients,
)
from megatron_embed.platform.weight_gradient import products_can_accumulate
from tests.helpers.device_runs import SECONDS, curve_of, train_arguments
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command

SIZES = (5, 0, 19, 8)


def step(groups, widths, *, main_gradients):
    """(outputs, gradient of the inputs, gradients of the weights), of two backward passes where they are added up."""
    torch.manual_seed(3)
    inputs = torch.randn(sum(SIZES), widths[0]).to("cuda", torch.bfloat16).requires_grad_()
    weights = [torch.nn.Parameter(torch.randn(widths[1], widths[0]).to("cuda", torch.bfloat16)) for _ in SIZES]
    upstream = torch.randn(sum(SIZES), widths[1]).to("cuda", torch.bfloat16)
    if main_gradients:
        for weight in weights:
            weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    for _ in range(2):
        outputs = GroupedLinear.apply(inputs, groups(inputs), *weights)
        outputs.backward(upstream)
        for weight in weights:
            if main_gradients:
                assert weight.grad_added_to_main_grad and weight.grad.shape == weight.shape
                weight.grad = None
    gradients = [weight.main_grad if main_gradients else weight.grad for weight in weights]
    return [value.detach().float().cpu() for value in (outputs, inputs.grad, *gradients)]


@pytest.mark.gpu
@pytest.mark.parametrize("widths", [(16, 24), (16, 20)], ids=["aligned", "not aligned"])
def test_grouped_products_equal_one_each(widths):
    if not has_grouped_product(torch.empty(1, device="cuda", dtype=torch.bfloat16)):
        pytest.skip("this torch or this GPU has no grouped product")
    alone = step(lambda rows: Groups(sizes=SIZES, ends=None), widths, main_gradients=False)
    grouped = step(lambda rows: groups_of(SIZES, rows), widths, main_gradients=False)
    with mock.patch.object(grouped_linear, "products_can_accumulate", return_value=False):
        added = step(lambda rows: groups_of(SIZES, rows), widths, main_gradients=widths == (16, 24))
    with mock.patch.object(grouped_linear, "weight_gradients", None if products_can_accumulate() else weight_gradients):
        accumulated = step(lambda rows: groups_of(SIZES, rows), widths, main_gradients=True)
    assert all(value.any() for value in alone[:3])
    for expected, *values in zip(alone, grouped, added, accumulated, strict=True):
        for value in values:
            torch.testing.assert_close(value, expected, rtol=0.02, atol=0.02)


@pytest.mark.gpu
def test_the_only_expert_is_not_copied():
    inputs = torch.randn(5, 16).to("cuda", torch.bfloat16).requires_grad_()
    weight = torch.randn(8, 16).to("cuda", torch.bfloat16).requires_grad_()
    groups = groups_of((5,), inputs)
    with mock.patch.object(torch, "stack", None):
        outputs = GroupedLinear.apply(inputs, groups, weight)
        outputs.sum().backward()
    assert groups.ends is None and torch.equal(outputs, inputs @ weight.t())
    assert torch.equal(weight.grad, torch.ones_like(outputs).t() @ inputs)


@pytest.mark.gpu
def test_other_dtypes_and_no_rows_have_a_product_each():
    assert groups_of(SIZES, torch.empty(32, 16, device="cuda")).ends is None
    assert groups_of((0, 0), torch.empty(0, 16, device="cuda", dtype=torch.bfloat16)).ends is None


def counted_run(arguments, grouped):
    """(result of the command, calls of the grouped product), with it or with one product per expert."""
    original = torch.nn.functional.grouped_mm
    with mock.patch.object(torch.nn.functional, "grouped_mm", wraps=original) as product, \
            mock.patch.object(grouped_linear, "has_grouped_product",
                              has_grouped_product if grouped else lambda rows: False):
        return command(arguments), product.call_count


@pytest.mark.slow
@pytest.mark.multi_gpu
@pytest.mark.parametrize("lora", [{}, {"rank": 8}], ids=["all", "adapters"])
def test_training_with_grouped_products_is_training_without(models, tmp_path, lora):
    """In bfloat16, experts on two ranks, gradients overlapped: an empty gradient must not reach the optimizer."""
    curves, calls = [], []
    for grouped in (True, False):
        arguments = train_arguments(
            models["qwen3_moe"], tmp_path / f"run{grouped}", "model.dtype=bfloat16", lora=lora,
            parallel={"expert_model_parallel_size": 2}, optimizer={"overlap_grad_reduce": True})
        results = run_on_ranks(counted_run, 2, arguments, grouped, timeout_seconds=SECONDS)
        curves.append(curve_of([result for result, _ in results], tmp_path / f"run{grouped}"))
        calls.append([count for _, count in results])
    assert all(calls[0]) and not any(calls[1])
    assert curves[0] == pytest.approx(curves[1], rel=0.02)
