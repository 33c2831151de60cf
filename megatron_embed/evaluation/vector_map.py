"""Maps from the vectors of an old model to those of a new one, fitted on texts that both have embedded.

With such a map an index moves to a new model without embedding its documents again. All are y = x W + b + h(x), of
which the orthogonal one has W alone (Procrustes, Schönemann 1966, doi:10.1007/BF02289451), and the affine one no h.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from megatron_embed.config.json_file import open_ordinary, read_json_file
from megatron_embed.errors import ConfigError, DataError, UserError, first_line
from megatron_embed.evaluation.vector_files import VectorFile
from megatron_embed.names import MAP_KINDS, MapKind, Similarity
from megatron_embed.platform.atomic_file import write_atomic

TENSORS, SETTINGS = "vector_map.safetensors", "vector_map.json"
"""Files of a map's directory."""
FEWEST_PAIRS = 50
"""Pairs below which nothing could be held out."""
HELD_OUT = 0.1
"""Share of the pairs that is held out to choose the map, and another such share to measure it."""
MOST_HELD_OUT = 5000
RIDGES = tuple(10.0**power for power in range(-6, 2))
"""Tried in the affine map, in units of the mean variance of a component of the old vectors."""
LARGEST_MAP = 2 << 30
"""Bytes of a map's tensors that are read; one of 8,192 to 8,192 components has a sixth of them."""
MOST_HIDDEN = 2048
"""Hidden units of the mlp, which has twice the old width unless that is more."""
_EPOCHS, _PATIENCE, _BATCH = 60, 6, 256


@dataclass(frozen=True, kw_only=True)
class VectorMap:
    """A fitted map."""

    kind: MapKind
    tensors: Mapping[str, Tensor]
    """`weight` [old, new]; of affine and mlp `bias` [new]; of mlp `hidden_weight` [old, hidden], `hidden_bias` and
    `output_weight` [hidden, new]; float32."""
    unit_length: bool
    """The mapped vectors have unit length."""

    @property
    def old_dim(self) -> int:
        return len(self.tensors["weight"])

    @property
    def new_dim(self) -> int:
        return self.tensors["weight"].shape[1]

    def __call__(self, vectors: Tensor) -> Tensor:
        """[rows, new] float32 of [rows, old]."""
        return _mapped(vectors.float(), self.tensors, unit_length=self.unit_length)

    def write(self, directory: str, report: Mapping[str, Any]) -> UserError | None:
        """Write the map's two files, and what is known of it; the error if they cannot be written."""
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return ConfigError(f"--output {directory}: cannot be made ({error.strerror}); choose another directory",
                               key="--output")
        data = save({name: tensor.contiguous() for name, tensor in self.tensors.items()})
        described = {"kind": self.kind, "old_dim": self.old_dim, "new_dim": self.new_dim,
                     "unit_length": self.unit_length, **report}
        return write_atomic("--output", str(Path(directory) / TENSORS), lambda file: file.write(data),
                            binary=True) or write_atomic("--output", str(Path(directory) / SETTINGS),
                                                         lambda file: json.dump(described, file, indent=1))

    @classmethod
    def read(cls, directory: str, key: str) -> "VectorMap":
        """A map that was written. Raises ConfigError, naming the option `key`."""
        try:
            described = read_json_file(Path(directory) / SETTINGS)
            kind, sizes, unit_length = _described(described)
            tensors = _read_tensors(Path(directory) / TENSORS, kind, *sizes)
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigError(f"{key} {directory}: no map of vectors ({first_line(error)}); name what "
                              "`megatron-embed migrate` wrote", key=key) from None
        return cls(kind=kind, tensors=tensors, unit_length=unit_length)

    def identity(self) -> dict[str, Any]:
        """Kind, normalization and digest of the tensors, which identify the map, as JSON takes them."""
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tuple(tensor.shape)} ".encode() + tensor.contiguous().numpy().tobytes())
        return {"kind": self.kind, "unit_length": self.unit_length, "digest": digest.hexdigest()}


def _described(values: object) -> tuple[MapKind, tuple[int, int], bool]:
    """(kind, (old dim, new dim), whether mapped vectors have unit length) of a map's SETTINGS. Raises ValueError."""
    if not isinstance(values, dict):
        raise ValueError(f"{SETTINGS} must hold an object")
    kind, unit_length = values.get("kind"), values.get("unit_length")
    known = next((name for name in MAP_KINDS if name == kind), None)
    if known is None:
        raise ValueError(f"{SETTINGS}: kind = {kind!r:.40} must be one of {', '.join(MAP_KINDS)}")
    if not isinstance(unit_length, bool):
        raise ValueError(f"{SETTINGS}: unit_length = {unit_length!r:.40} must be true or false")
    sizes = values.get("old_dim"), values.get("new_dim")
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"{SETTINGS}: old_dim and new_dim must be whole numbers above 0")
    return known, (int(sizes[0]), int(sizes[1])), unit_length


def _read_tensors(file: Path, kind: MapKind, old: int, new: int) -> dict[str, Tensor]:
    """A map's tensors, of the shapes that its kind has. Raises OSError, ValueError or SafetensorError."""
    with open_ordinary(file) as opened:  # a pipe would never end
        if opened.seek(0, 2) > LARGEST_MAP:
            raise ValueError(f"{TENSORS} is longer than {LARGEST_MAP >> 30} GiB")
    with safe_open(str(file), "pt") as stored:
        parts = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118  it is not a mapping
        shapes = {name: part.get_shape() for name, part in parts.items()}
        hidden = (shapes.get("hidden_bias") or [0])[0]
        expected = {"weight": [old, new]}
        if kind != "orthogonal":
            expected |= {"bias": [new]}
        if kind == "mlp":
            expected |= {"hidden_weight": [old, hidden], "hidden_bias": [hidden], "output_weight": [hidden, new]}
        if shapes != expected:
            raise ValueError(f"{TENSORS} has {_shown(shapes)}; a map of kind {kind} has {_shown(expected)}")
        other = next((name for name, part in parts.items() if part.get_dtype() != "F32"), None)
        if other is not None:
            raise ValueError(f"{TENSORS}: {other} is {parts[other].get_dtype()}, not F32")
        tensors = {name: stored.get_tensor(name) for name in parts}
    bad = next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)
    if bad is not None:
        raise ValueError(f"{TENSORS}: {bad} has numbers that are not finite")
    return tensors


def _shown(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))[:200]


class MappedVectors(VectorFile):
    """Stored vectors of an old model, mapped when they are read."""

    def __init__(self, path: str, key: str, vector_map: VectorMap, *, similarity: Similarity) -> None:
        """Raises ConfigError, naming the option `key`, also for vectors of another width than the map takes."""
        super().__init__(path, key, similarity=similarity)
        if super().full_width != vector_map.old_dim:
            raise ConfigError(f"{key} {path}: vectors of {super().full_width} components, and the map takes "
                              f"{vector_map.old_dim}; name those that it was fitted on", key=key)
        self._map, self.width = vector_map, vector_map.new_dim

    @property
    def full_width(self) -> int:
        """Components of a mapped vector."""
        return self._map.new_dim

    def rows(self, start: int, stop: int) -> Tensor:
        """[stop - start, new] float32."""
        return self._mapped_rows(super().rows(start, stop), range(start, stop))

    def gather(self, rows: NDArray[np.int64]) -> Tensor:
        """[len(rows), new] float32 of these rows, in any order."""
        return self._mapped_rows(super().gather(rows), rows)

    def _mapped_rows(self, block: Tensor, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """The mapped vectors of these rows. Raises DataError for one that float32 cannot hold."""
        mapped = self._map(block)
        bad = ~torch.isfinite(mapped).all(dim=1)
        if self._map.unit_length:  # the length of a vector overflows before its components
            bad |= (mapped == 0).all(dim=1) & (block != 0).any(dim=1)
        if bool(bad.any()):
            raise DataError(f"{self.path}:{int(rows[int(bad.nonzero()[0])]) + 1}: the vector is too long to be mapped; "
                            "name those that the map was fitted on, or fit it again")
        return mapped


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Vectors of the same texts by both models, split."""

    old: Tensor
    new: Tensor
    validation: tuple[Tensor, Tensor]
    """(old, new), to choose the map by."""
    test: tuple[Tensor, Tensor]
    """(old, new), to measure it by."""

    @staticmethod
    def split(old: Tensor, new: Tensor, seed: int = 0) -> "Pairs":
        """[pairs, old], [pairs, new] float32 of at least FEWEST_PAIRS texts."""
        order = torch.randperm(len(old), generator=torch.Generator().manual_seed(seed))
        held = min(MOST_HELD_OUT, max(1, int(HELD_OUT * len(old))))
        test, validation, rest = order[:held], order[held : 2 * held], order[2 * held :]
        return Pairs(old=old[rest], new=new[rest], validation=(old[validation], new[validation]),
                     test=(old[test], new[test]))


def mean_cosine(mapped: Tensor, new: Tensor) -> float:
    """Mean cosine of rows."""
    return float(functional.cosine_similarity(mapped.double(), new.double(), dim=1).mean())


def fit(kind: MapKind, pairs: Pairs, *, unit_length: bool) -> VectorMap:
    """The map of a kind that fits the pairs best.

    Args:
        unit_length: the new vectors have it.
    """
    if kind == "orthogonal":
        tensors = {"weight": _procrustes(pairs.old, pairs.new)}
    else:
        tensors = _ridge_by_validation(pairs, unit_length=unit_length)
    if kind == "mlp":
        tensors = _trained(tensors, pairs, unit_length=unit_length)
    return VectorMap(kind=kind, tensors={name: tensor.float() for name, tensor in tensors.items()},
                     unit_length=unit_length)


def _mapped(vectors: Tensor, tensors: Mapping[str, Tensor], *, unit_length: bool) -> Tensor:
    result = vectors @ tensors["weight"]
    if "bias" in tensors:
        result = result + tensors["bias"]
    if "hidden_weight" in tensors:
        hidden = functional.gelu(vectors @ tensors["hidden_weight"] + tensors["hidden_bias"])
        result = result + hidden @ tensors["output_weight"]
    return functional.normalize(result, dim=1) if unit_length else result


def _procrustes(old: Tensor, new: Tensor) -> Tensor:
    """[old, new] matrix with orthonormal rows or columns of the least squared distance."""
    left, _, right = torch.linalg.svd(old.double().T @ new.double(), full_matrices=False)
    return left @ right


def _ridge_by_validation(pairs: Pairs, *, unit_length: bool) -> dict[str, Tensor]:
    """Least squares with the ridge of RIDGES whose map has the highest cosine on the pairs held out to choose by."""
    old, new = pairs.old.double(), pairs.new.double()
    old_mean, new_mean = old.mean(dim=0), new.mean(dim=0)
    old, new = old - old_mean, new - new_mean
    values, vectors = torch.linalg.eigh(old.T @ old)
    projected = vectors.T @ (old.T @ new)
    best, best_cosine = {}, -math.inf
    for ridge in RIDGES:
        weight = vectors @ (projected / (values.clamp(min=0) + ridge * values.mean())[:, None])
        tensors = {"weight": weight, "bias": new_mean - old_mean @ weight}
        mapped = _mapped(pairs.validation[0].double(), tensors, unit_length=unit_length)
        cosine = mean_cosine(mapped, pairs.validation[1].double())
        if cosine > best_cosine:
            best, best_cosine = tensors, cosine
    return best


def _trained(affine: Mapping[str, Tensor], pairs: Pairs, *, unit_length: bool) -> dict[str, Tensor]:
    """The affine map and hidden units that add to it, trained by Adam until the held-out loss no longer falls."""
    generator, (width, new_width) = torch.Generator().manual_seed(0), affine["weight"].shape
    hidden = min(MOST_HIDDEN, 2 * width)
    # Unit vectors have components of about width**-0.5.
    tensors = {"weight": affine["weight"].float(), "bias": affine["bias"].float(),
               "hidden_weight": torch.randn(width, hidden, generator=generator), "hidden_bias": torch.zeros(hidden),
               "output_weight": torch.zeros(hidden, new_width)}
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    optimizer = torch.optim.Adam(leaves, lr=1e-3)

    def loss_of(old: Tensor, new: Tensor) -> Tensor:
        mapped = _mapped(old, tensors, unit_length=unit_length)
        if unit_length:
            return (1 - functional.cosine_similarity(mapped, new, dim=1)).mean()
        return functional.mse_loss(mapped, new)

    def snapshot() -> tuple[float, dict[str, Tensor]]:
        with torch.no_grad():
            return float(loss_of(*pairs.validation)), {name: leaf.detach().clone() for name, leaf in tensors.items()}

    best, since = snapshot(), 0
    for _ in range(_EPOCHS):
        for rows in torch.randperm(len(pairs.old), generator=generator).split(_BATCH):
            optimizer.zero_grad()
            loss_of(pairs.old[rows], pairs.new[rows]).backward()
            optimizer.step()
        now = snapshot()
        best, since = (now, 0) if now[0] < best[0] else (best, since + 1)
        if since >= _PATIENCE:
            break
    return best[1]


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The chosen map, and the held-out cosine of every kind that was tried."""

    vector_map: VectorMap
    cosines: Mapping[MapKind, float]
    """On the pairs that nothing was fitted or chosen by."""
    before: float | None
    """That of the old vectors as they are; None: they have another width."""


def fit_best(kinds: Sequence[MapKind], pairs: Pairs, *, unit_length: bool) -> Fitted:
    """The map of these kinds with the highest cosine on the pairs held out to choose by."""
    maps = {kind: fit(kind, pairs, unit_length=unit_length) for kind in kinds}
    chosen = max(maps, key=lambda kind: mean_cosine(maps[kind](pairs.validation[0]), pairs.validation[1]))
    same = pairs.old.shape[1] == pairs.new.shape[1]
    return Fitted(vector_map=maps[chosen], before=mean_cosine(*pairs.test) if same else None,
                  cosines={kind: mean_cosine(own(pairs.test[0]), pairs.test[1]) for kind, own in maps.items()})
