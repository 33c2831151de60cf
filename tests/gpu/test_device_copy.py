"""Copies between host and device: the same values, one transfer."""

from dataclasses import dataclass

import pytest
import torch

from megatron_embed.parallel.device_copy import copy_to_device, copy_to_host

DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"]


@dataclass(frozen=True)
class Inner:
    mask: torch.Tensor
    name: str
    sizes: list[int]


@dataclass(frozen=True)
class Outer:
    ids: torch.Tensor
    again: torch.Tensor
    parts: tuple[Inner, torch.Tensor | None]
    weights: torch.Tensor


def value():
    ids = torch.arange(7)[None]
    return Outer(ids=ids, again=ids, parts=(Inner(torch.tensor([True, False, True]), "mask", [1, 2]), None),
                 weights=torch.tensor(0.25))


@pytest.mark.parametrize("device", DEVICES)
def test_nested_values_arrive_as_they_were(device):
    before = value()
    after = copy_to_device(before, torch.device(device))
    inner, nothing = after.parts
    pairs = [(after.ids, before.ids), (after.again, before.ids), (inner.mask, before.parts[0].mask),
             (after.weights, before.weights)]
    for ours, wanted in pairs:
        assert ours.device.type == device and ours.dtype == wanted.dtype
        assert torch.equal(ours.cpu(), wanted)
    assert (nothing, inner.name, inner.sizes) == (None, "mask", [1, 2])
    assert before.ids.device.type == "cpu", "the original was changed"
    # One buffer holds all of them, and a tensor that is met twice once.
    addresses = {tensor.untyped_storage().data_ptr() for tensor, _ in pairs}
    assert len(addresses) == (1 if device == "cuda" else 3)
    assert after.ids.data_ptr() == after.again.data_ptr()


@pytest.mark.parametrize("device", DEVICES)
def test_an_empty_tensor_and_nothing_at_all(device):
    empty, nothing = copy_to_device((torch.zeros(0, 3, dtype=torch.int64), None), torch.device(device))
    assert (empty.shape, empty.dtype, empty.device.type, nothing) == ((0, 3), torch.int64, device, None)
    assert copy_to_device((1, "text", None), torch.device(device)) == (1, "text", None)


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_come_back_in_float64(device):
    single = torch.tensor(1 / 3, device=device)
    matrix, scalar = copy_to_host(torch.full((2, 3), 0.1, dtype=torch.float64, device=device), single)
    assert matrix.tolist() == [[0.1] * 3] * 2 and scalar.item() == single.item()
    assert {matrix.dtype, scalar.dtype} == {torch.float64} and {matrix.device.type, scalar.device.type} == {"cpu"}
