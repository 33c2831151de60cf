"""Transformer Engine's FP8 emulated on the CPU: numbers are scaled, cast to torch's float8 types and back.

Scaling as in common/recipe/__init__.py. Float8CurrentScaling: the largest number of a tensor becomes the largest of the
format. Float8BlockScaling: of each 128 numbers along the sum (of 128 x 128 in weights), factors are powers of two.
Products are summed in the dtype of the tensors (the GPU: float32, of FP8 numbers exactly).
"""

import contextlib
import enum

import torch
import torch.nn.functional as functional
import torch.utils.checkpoint

TYPES = {448: torch.float8_e4m3fn, 57344: torch.float8_e5m2}
BLOCK = 128


class Format(enum.Enum):
    """Largest numbers of the forward and of the backward pass."""

    E4M3 = (448, 448)
    HYBRID = (448, 57344)


class DelayedScaling:
    pass


class Float8CurrentScaling:
    per_tensor = True

    def __init__(self, fp8_format=Format.HYBRID, fp8_dpa=False, fp8_mha=False):
        assert not fp8_dpa and not fp8_mha
        self.fp8_format = fp8_format


class Float8BlockScaling:
    per_tensor = False

    def __init__(self, fp8_format=Format.E4M3):
        self.fp8_format = fp8_format


class FP8GlobalStateManager:
    recipe = None

    @classmethod
    def is_fp8_enabled(cls):
        return cls.recipe is not None


@contextlib.contextmanager
def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None, _graph=False):
    assert not calibrating and not _graph and not isinstance(fp8_recipe, DelayedScaling)
    outer, FP8GlobalStateManager.recipe = FP8GlobalStateManager.recipe, fp8_recipe if enabled else None
    try:
        yield
    finally:
        FP8GlobalStateManager.recipe = outer


def checkpoint(function, *args, distribute_saved_activations=False, get_rng_state_tracker=None, tp_group=None):
    """distributed.py: the function is run again with the recipe that it had."""
    recipe = FP8GlobalStateManager.recipe

    def run(*inputs):
        with fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe):
            return function(*inputs)

    return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=True)


def _cast(scaled, largest):
    """Rounded to the format, saturated."""
    return scaled.clamp(-largest, largest).to(TYPES[largest]).to(scaled.dtype)


def _quantized(blocks, largest, dims, power_of_two):
    """`blocks` with one factor for all numbers along `dims`."""
    values = blocks.float()
    scale = largest / values.abs().amax(dim=dims, keepdim=True).clamp(min=1e-30)
    if power_of_two:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    return (_cast(values * scale, largest) / scale).to(blocks.dtype)


def _largest(recipe, backward):
    return recipe.fp8_format.value[int(backward)]


def along_features(matrix, recipe, backward=False):
    """[tokens, features] for a product that sums over features."""
    if recipe is None:
        return matrix
    if recipe.per_tensor:
        return _quantized(matrix, _largest(recipe, backward), (0, 1), False)
    padded = functional.pad(matrix, (0, -matrix.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    return _quantized(padded, _largest(recipe, backward), (2,), True).flatten(1)[:, : matrix.shape[1]]


def along_tokens(matrix, recipe, backward=False):
    """[tokens, features] for a product that sums over tokens."""
    if recipe is None or recipe.per_tensor:
        return along_features(matrix, recipe, backward)
    return along_features(matrix.T, recipe, backward).T


def weights(matrix, recipe):
    """[outputs, inputs], the same numbers for both passes."""
    if recipe is None or recipe.per_tensor:
        return along_features(matrix, recipe)
    rows, columns = matrix.shape
    padded = functional.pad(matrix, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [row blocks, BLOCK, column blocks, BLOCK]
    return _quantized(blocks, _largest(recipe, False), (1, 3), True).flatten(2).flatten(0, 1)[:rows, :columns]
