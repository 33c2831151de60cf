"""Merge fine-tuned models into one: linear, slerp, multi-slerp, task arithmetic, one tensor at a time.

Every method is a linear combination of the models' tensors (or of their differences from a base) whose coefficients
follow from lengths and angles. So each tensor is read twice in blocks, for its Gram matrix and for the combination, and
memory holds one output tensor and some blocks, whatever the number of layers and models.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_embed.convert.checkpoint_directory import copy_files, is_checkpoint, staging, write_json
from megatron_embed.convert.dense_tensors import STORED_NAMES, DenseWeights, read_dense, write_dense
from megatron_embed.convert.hf_directory import HFDirectory
from megatron_embed.convert.merge_joint import HeadTensors, merge_joint_heads
from megatron_embed.convert.merge_match import require_mergeable
from megatron_embed.convert.report import MergeReport, progress
from megatron_embed.convert.storage.safetensors_file import checksum
from megatron_embed.convert.storage.sharded import ShardedWriter, parse_size
from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.models.saved_settings import read_saved_settings
from megatron_embed.names import MergeMethod

MERGE_FILE = "megatron_embed_merge.json"
"""File of a merged directory that names the models, the method and the weights."""
PARALLEL = 0.9995
"""Cosine above which slerp is linear: dividing by the sine of a tiny angle would only magnify rounding."""
EPSILON = 1e-8
_BLOCK_ELEMENTS = 1 << 22
"""Elements of one tensor that are in float64 at the same time."""
TensorSource = HFDirectory | DenseWeights | HeadTensors


def merge_models(models: Sequence[str | Path], destination: str | Path, *, method: MergeMethod,
                 weights: Sequence[float] | None = None, base: str | Path | None = None,
                 max_shard_size: str = "5GB") -> MergeReport:
    """Write the Hugging Face directory `destination`: the merged weights, everything else from the first model.

    Computed in float64, written in the models' dtype. Integer tensors must be the same in all models.

    Args:
        models: Hugging Face or Sentence Transformers directories of one model trained in several ways; two for slerp.
        method: see `coefficients`.
        weights: one per model; None: all equal (task_arithmetic: all 1). Only their ratio matters, except for
            task_arithmetic.
        base: the model before training; required by task_arithmetic, optional for multi_slerp.
        max_shard_size: largest safetensors file, e.g. "5GB".
    Raises:
        ConfigError: an invalid combination of arguments.
        CheckpointError: the models do not match, or `destination` cannot be written.
    """
    started = time.monotonic()
    factors = checked_weights(method, len(models), weights, has_base=base is not None)
    shard_bytes = parse_size(max_shard_size)
    with ExitStack() as stack:
        opened = [stack.enter_context(_open(path)) for path in models]
        origin = None if base is None else stack.enter_context(_open(base))
        require_mergeable(opened, origin)
        first = opened[0]
        full_names = list(first.stored_names)
        total = sum(first.entry(name).nbytes for name in full_names)
        with staging(destination, total) as work:
            copy_files(first.root, work)
            write_json(work / MERGE_FILE, _provenance(method, models, factors, base))
            declared = [(first.stored_names[name], first.entry(name).dtype, first.entry(name).shape)
                         for name in full_names]
            checksums: dict[str, bytes] = {}
            with ShardedWriter(work, declared, shard_bytes) as writer:
                for name in progress(full_names, "merging"):
                    merged = merge_tensor(name, opened, origin, method, factors)
                    checksums[name] = checksum(merged)
                    writer.write(first.stored_names[name], merged)
            _verify(work, checksums)
            _merge_dense(work, opened, origin, method, factors)
            merge_joint_heads(work, [model.path for model in opened], None if origin is None else origin.path,
                              functools.partial(merge_tensor, method=method, weights=factors))
    return MergeReport(destination=Path(destination), method=method, models=len(models), tensors=len(full_names),
                       total_bytes=total, seconds=time.monotonic() - started)


def _merge_dense(work: Path, models: Sequence[HFDirectory], base: HFDirectory | None, method: MergeMethod,
                 weights: Sequence[float]) -> None:
    """The Dense modules of a Sentence Transformers directory, merged as its other tensors are."""
    if not (models[0].root / "modules.json").is_file():
        return
    for settings in read_saved_settings(models[0].root).dense:
        with ExitStack() as stack:
            opened = [stack.enter_context(DenseWeights(model.root, settings)) for model in models]
            origin = None if base is None else stack.enter_context(DenseWeights(base.root, settings))
            merged = {name: merge_tensor(STORED_NAMES[name], opened, origin, method, weights)
                      for name in settings.shapes}
        write_dense(work / settings.path, merged)
        written = read_dense(work, settings)
        if not all(checksum(written[name]) == checksum(tensor) for name, tensor in merged.items()):
            raise CheckpointError(f"{work / settings.path}: reads back differently from what was written; check the "
                                  "disk and try again")


def checked_weights(method: MergeMethod, count: int, weights: Sequence[float] | None, *,
                    has_base: bool) -> tuple[float, ...]:
    """One weight per model. Raises ConfigError for arguments that the method cannot use."""
    if count < (1 if method == "task_arithmetic" else 2):
        raise ConfigError(f"--method {method}: {count} model cannot be merged; name two or more")
    if method == "slerp" and count != 2:
        raise ConfigError(f"--method slerp: {count} models, but slerp takes two; use multi_slerp for more")
    if method == "task_arithmetic" and not has_base:
        raise ConfigError("--method task_arithmetic adds differences from the model before training; name it with "
                          "--base")
    if method in ("linear", "slerp") and has_base:
        raise ConfigError(f"--base: {method} does not use it; omit it, or use task_arithmetic or multi_slerp")
    given = tuple(weights) if weights is not None else (1.0,) * count
    argument = f"--weights {' '.join(map(str, given))}"
    if len(given) != count:
        raise ConfigError(f"{argument}: {len(given)} weights for {count} models; give one for each")
    if not all(math.isfinite(weight) for weight in given):
        raise ConfigError(f"{argument}: each must be a finite number")
    if method != "task_arithmetic" and (min(given) < 0 or sum(given) <= 0):
        raise ConfigError(f"{argument}: {method} needs weights of at least 0 that are not all 0")
    return given


def coefficients(method: MergeMethod, weights: Sequence[float], gram: Tensor) -> Tensor:
    """Factor of each model's tensor, [models] float64.

    linear: the weights, scaled to sum 1 (model soups, Wortsman et al. 2022, arXiv:2203.05482).
    slerp: on the arc from the first to the second, at the second's share of the weights (Shoemake 1985); linear if
    they are nearly parallel, with the constants of mergekit.
    multi_slerp: the direction is the weighted mean of the models' directions, the length their weighted mean length.
    (mergekit's one step in the tangent space at that mean is zero, because the mean is where the tangents cancel.)
    task_arithmetic: the weights unchanged, for differences from the base (Ilharco et al. 2023, arXiv:2212.04089).

    Args:
        weights: one per model.
        gram: [models, models] float64, dot products of the flattened tensors (of their differences if there is a base).
    """
    given = torch.tensor(list(weights), dtype=torch.float64)
    if method == "task_arithmetic":
        return given
    shares = given / given.sum()
    if method == "linear":
        return shares
    lengths = gram.diagonal().sqrt()
    if method == "slerp":
        return _slerp(float(shares[1]), gram, lengths)
    scales = shares / (lengths + EPSILON)
    mean_length = (scales @ gram @ scales).clamp(min=0.0).sqrt()
    if mean_length < EPSILON:  # All zero, or directions that cancel out: the mean direction is undefined.
        return shares
    return scales * ((shares @ lengths) / mean_length)


def _slerp(share: float, gram: Tensor, lengths: Tensor) -> Tensor:
    """Coefficients of the two ends of an arc, at `share` of the way."""
    # A zero tensor keeps its length, as in mergekit: its cosine with the other is 0, a right angle.
    units = torch.where(lengths > EPSILON, lengths, torch.ones_like(lengths))
    cosine = float(gram[0, 1] / (units[0] * units[1]))
    if abs(cosine) > PARALLEL:
        return torch.tensor([1.0 - share, share], dtype=torch.float64)
    angle = math.acos(cosine)
    sines = [math.sin((1.0 - share) * angle), math.sin(share * angle)]
    return torch.tensor(sines, dtype=torch.float64) / math.sin(angle)


def merge_tensor(name: str, models: Sequence[TensorSource], base: TensorSource | None, method: MergeMethod,
                 weights: Sequence[float]) -> Tensor:
    """One merged tensor, in the dtype and shape of the first model's. Raises CheckpointError with its name."""
    entry = models[0].entry(name)
    if not entry.dtype.is_floating_point:
        return _same_in_all(name, models)
    gram = torch.zeros(len(models), len(models), dtype=torch.float64)
    if method in ("slerp", "multi_slerp"):
        for block in _blocks(name, models, base):
            gram += block.deltas @ block.deltas.T
    factors = coefficients(method, weights, gram)
    merged = torch.empty(math.prod(entry.shape), dtype=entry.dtype)
    done = 0
    for block in _blocks(name, models, base):
        values = factors @ block.deltas
        if block.base is not None:
            values += block.base
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(f"{models[0].path}: the merged {name} has values that are not finite; one of the "
                                  "models is broken, or a weight is much too large")
        merged[done:done + len(values)] = values.to(entry.dtype)
        done += len(values)
    return merged.reshape(entry.shape)


@dataclass(frozen=True)
class _Block:
    """The same elements of one tensor in every model."""

    deltas: Tensor
    """[models, elements] float64; minus the base, if there is one."""
    base: Tensor | None
    """[elements] float64."""


def _blocks(name: str, models: Sequence[TensorSource], base: TensorSource | None) -> Iterator[_Block]:
    """The tensor in every model, a block of rows at a time."""
    shape = models[0].entry(name).shape
    if not shape:
        yield _block(models, base, lambda model: model.read(name))
        return
    step = max(1, _BLOCK_ELEMENTS // max(1, math.prod(shape[1:]) * len(models)))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        yield _block(models, base, _slice_reader(name, start, stop))


def _slice_reader(name: str, start: int, stop: int) -> Callable[[TensorSource], Tensor]:
    return lambda model: model.read_slice(name, 0, start, stop)


def _block(models: Sequence[TensorSource], base: TensorSource | None,
           read: Callable[[TensorSource], Tensor]) -> _Block:
    deltas = torch.stack([read(model).reshape(-1).double() for model in models])
    if base is None:
        return _Block(deltas, None)
    origin = read(base).reshape(-1).double()
    deltas -= origin
    return _Block(deltas, origin)


def _same_in_all(name: str, models: Sequence[TensorSource]) -> Tensor:
    tensor = models[0].read(name)
    for model in models[1:]:
        if not torch.equal(tensor, model.read(name)):
            raise CheckpointError(f"{model.path}: {name} holds {tensor.dtype} values that differ from those of "
                                  f"{models[0].path}; integers cannot be averaged: merge other models")
    return tensor


def _open(path: str | Path) -> HFDirectory:
    """Open a model. Raises CheckpointError for one of our checkpoints, with the command that converts it."""
    if is_checkpoint(path):
        raise CheckpointError(f"{path}: is a checkpoint of megatron-embed, but merge takes Hugging Face directories; "
                              "convert it first: megatron-embed convert megatron-to-hf SRC DST")
    model = HFDirectory(path)
    if model.stored is not None:
        model.close()
        raise CheckpointError(f"{path}: its weights are quantized, and averages of rounded weights are worse than of "
                              "the original ones; take these")
    return model


def _provenance(method: MergeMethod, models: Sequence[str | Path], weights: Sequence[float],
                base: str | Path | None) -> dict[str, Any]:
    return {"method": method, "models": [str(model) for model in models], "weights": list(weights),
            "base": None if base is None else str(base)}


def _verify(directory: Path, checksums: dict[str, bytes]) -> None:
    """Check that the written directory is a model and that every tensor reads back unchanged."""
    with HFDirectory(directory) as written:
        for name in progress(list(checksums), "verifying"):
            if checksum(written.read(name)) != checksums[name]:
                raise CheckpointError(f"{directory}: {name} reads back differently from what was written; check the "
                                      "disk and try again")
        assert written.stored_names.keys() == checksums.keys()
