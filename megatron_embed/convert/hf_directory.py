"""A Hugging Face directory as tensors: their names, a check against config.json, reading them whole or in slices."""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from megatron_embed.config.json_file import LARGEST_INDEX, read_json_file
from megatron_embed.convert.storage.byte_range import ByteRange
from megatron_embed.convert.storage.safetensors_file import SafetensorsFile, TensorEntry
from megatron_embed.convert.stored_quantization import STATE, int8_tensor, nf4_tensor, part_of, read_state
from megatron_embed.convert.tables.family import Family
from megatron_embed.convert.tables.lookup import rules_for
from megatron_embed.convert.tables.transforms import CONFIG_KEYS, Context
from megatron_embed.errors import CheckpointError
from megatron_embed.models.families import ModelShape, model_shape
from megatron_embed.models.file_checks import check_files, plain_name
from megatron_embed.models.modules_json import transformer_folder
from megatron_embed.models.quantization import StoredQuantization, stored_quantization
from megatron_embed.models.quantized_weight import QuantizedTensor, restored_whole

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHARDS_OF_RANKS = f"shard-{'[0-9]' * 5}-model-{'[0-9]' * 5}-of-{'[0-9]' * 5}.safetensors"
"""Names of the weight files of a checkpoint that several ranks wrote."""


class HFDirectory:
    """A Hugging Face model directory, checked on opening. Tensors are named as in the weight tables.

    Only headers are read on opening; a slice reads its own bytes only.
    """

    root: Path
    """The directory as given."""
    path: Path
    """The folder of config.json and weights: `root`, unless its modules.json names another one."""
    shape: ModelShape
    family: Family
    prefixed: bool
    """Whether the files name the backbone's tensors with the family's prefix."""
    stored_names: dict[str, str]
    """Full name -> name in the file, for every tensor of the directory."""
    passthrough: tuple[str, ...]
    """Full names of the tensors that a conversion copies unchanged."""
    stored: StoredQuantization | None
    """How its weights are quantized in the files; they are read as what they stand for then."""

    def __init__(self, path: str | Path) -> None:
        """Open `path` and compare its tensors with the family's table.

        Raises:
            CheckpointError: not a model directory, an unknown model or one with its own code, weights missing,
                truncated or only in `.bin`, a tensor unknown to the table, a missing tensor, a shape that contradicts
                config.json.
        """
        self.root = Path(path)
        if not self.root.is_dir():
            raise CheckpointError(f"{path}: no such directory; give a Hugging Face model directory")
        check_files(self.root)
        self.path = transformer_folder(self.root)
        self.stored = stored_quantization(self.path)
        if self.stored is not None and importlib.util.find_spec("bitsandbytes") is None:
            raise CheckpointError(f"{self.path}: the weights are quantized by bitsandbytes, which is not installed: "
                                  "pip install 'megatron_embed[quantization]', or take the original weights")
        self.shape = model_shape(self.path)
        self.family = rules_for(self.shape.family)
        self._files: dict[str, SafetensorsFile] = {}
        try:
            self._open_files()
            self._name_tensors()
            self._check_tensors()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the weight files."""
        for file in self._files.values():
            file.close()

    def entry(self, name: str) -> TensorEntry:
        """Dtype, shape and size of a tensor; of a quantized one, those that it is read in."""
        return self._described.get(name) or self._file_of[name].entries[self.stored_names[name]]

    def byte_range(self, name: str) -> ByteRange:
        """The range of the tensor's bytes; of a quantized one, of its codes."""
        return self._file_of[name].byte_range(self.stored_names[name])

    def source_of(self, name: str) -> Sequence[ByteRange] | Callable[[], Tensor]:
        """The tensor for a copy: its bytes, or what reads it if it is quantized."""
        return partial(self.read, name) if name in self._parts else [self.byte_range(name)]

    def is_quantized(self, name: str) -> bool:
        """Whether the file holds codes and scales of this tensor."""
        return name in self._parts

    def read(self, name: str) -> Tensor:
        """The whole tensor, in the dtype of `entry`."""
        if name in self._parts:
            return restored_whole(self.read_quantized(name), self.entry(name).dtype)
        return self._file_of[name].read(self.stored_names[name])

    def read_quantized(self, name: str) -> QuantizedTensor:
        """Codes and scales of a quantized tensor, whole, as the file has them."""
        assert self.stored is not None
        file, parts = self._file_of[name], {part: file.read(stored) for part, (file, stored) in
                                            self._parts[name].items()}
        make = int8_tensor if self.stored.quantization == "int8" else nf4_tensor
        return make(file.path, name, file.read(self.stored_names[name]), parts)

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Indices `start` to `stop` of `dim` (0, or 1 of a matrix); no other bytes are read unless it is quantized."""
        if name in self._parts:
            return self.read(name).narrow(dim, start, stop - start)
        return self._file_of[name].read_slice(self.stored_names[name], dim, start, stop)

    def dtype(self) -> torch.dtype:
        """The floating-point dtype of most bytes among the tensors that are converted."""
        entries = (self.entry(name) for name in self.stored_names if name not in self.passthrough)
        return largest_dtype((entry.dtype, entry.nbytes) for entry in entries)

    def _open_files(self) -> None:
        index_file = self.path / INDEX_FILE
        for file in self.path.glob(_SHARDS_OF_RANKS):
            raise CheckpointError(f"{file}: of a checkpoint that several ranks wrote, with which Transformers reads "
                                  "all weight files; save the model with it elsewhere, or remove the file")
        if (self.path / SINGLE_FILE).is_file():
            self._files[SINGLE_FILE] = SafetensorsFile(self.path / SINGLE_FILE)
            return
        if not index_file.is_file():
            raise CheckpointError(_no_weights(self.path))
        weight_map = _weight_map(index_file)
        for shard in dict.fromkeys(weight_map.values()):
            if not (self.path / shard).is_file():
                count = sum(file == shard for file in weight_map.values())
                raise CheckpointError(f"{index_file}: {shard} is missing; it holds {count} of {len(weight_map)} "
                                      "tensors: fetch it into the same directory")
            self._files[shard] = SafetensorsFile(self.path / shard)
        for name, shard in weight_map.items():
            if name not in self._files[shard].entries:
                raise CheckpointError(f"{index_file}: {name} should be in {shard} but is not; "
                                      "fetch index and shards of one revision")

    def _name_tensors(self) -> None:
        stored = [(name, file) for file in self._files.values() for name in file.entries]
        self.prefixed = any(name.startswith(self.family.prefix) for name, _ in stored)
        self.stored_names = {}
        self._file_of: dict[str, SafetensorsFile] = {}
        for name, file in stored:
            full = self.family.full_name(name, prefixed=self.prefixed)
            if full in self._file_of:
                raise CheckpointError(f"{file.path}: tensor {name} is also in {self._file_of[full].path.name} (as "
                                      f"{self.stored_names[full]}), and one of the two would be lost; fetch index and "
                                      "shards of one revision into an empty directory")
            self.stored_names[full] = name
            self._file_of[full] = file
        self._describe_quantized()
        self.passthrough = tuple(sorted(name for name in self.stored_names if self.family.is_passthrough(name)))

    def _describe_quantized(self) -> None:
        """Take the parts of quantized weights (scales and the like) out of the tensors' names."""
        self._parts: dict[str, dict[str, tuple[SafetensorsFile, str]]] = {}
        self._described: dict[str, TensorEntry] = {}
        if self.stored is None:
            return
        for full in list(self.stored_names):
            weight, part = part_of(full, self.stored.quantization) or (None, "")
            if weight in self.stored_names:
                self._parts.setdefault(weight, {})[part] = (self._file_of.pop(full), self.stored_names.pop(full))
        dtype = largest_dtype((self.entry(name).dtype, self.entry(name).nbytes) for name in self.stored_names)
        for weight, parts in self._parts.items():
            entry = self._file_of[weight].entries[self.stored_names[weight]]
            if self.stored.quantization == "nf4":
                file, name = parts.get(STATE, (self._file_of[weight], None))
                shape, dtype, _ = read_state(file.path, weight, None if name is None else file.read(name))
                entry = dataclasses.replace(entry, shape=shape)
            self._described[weight] = dataclasses.replace(entry, dtype=dtype)

    def _check_tensors(self) -> None:
        unknown = set(self.stored_names) - set(self.passthrough)
        for rule, context in self.family.applied_rules(self.shape):
            for name, words in zip(rule.hf_names(context), rule.hf_shapes(), strict=True):
                self._check_tensor(name, words, context)
                unknown.discard(name)
        if unknown:
            first = min(unknown)
            raise CheckpointError(
                f"{self._file_of[first].path}: tensor {self.stored_names[first]} is unknown to the {self.family.name} "
                f"weight table ({len(unknown)} such); is config.json (num_hidden_layers = {self.shape.num_layers}) of "
                "this model, and are quantized or adapter weights merged?")

    def _check_tensor(self, name: str, words: str, context: Context) -> None:
        """Check that a tensor of the table exists and has the shape that config.json implies."""
        if name not in self.stored_names:
            raise CheckpointError(
                f"{self.path}: tensor {self._stored_form(name)} is missing; a {self.family.name} model with "
                f"num_hidden_layers = {self.shape.num_layers} has it: fetch the weights again or correct config.json")
        expected, stored = context.sizes(words), self.entry(name).shape
        if stored != expected:
            keys = ", ".join(f"{CONFIG_KEYS[word]} = {context.size(word)}" for word in words.split())
            raise CheckpointError(
                f"{self._file_of[name].path}: {self.stored_names[name]} has shape {list(stored)}, but config.json says "
                f"{list(expected)} ({keys}); use the config.json that belongs to these weights")

    def _stored_form(self, name: str) -> str:
        """A full name in the form that this directory's files use."""
        return name if self.prefixed else name.removeprefix(self.family.prefix)


def largest_dtype(sizes: Iterable[tuple[torch.dtype, int]]) -> torch.dtype:
    """The floating-point dtype of most bytes, given (dtype, bytes) of each tensor; float32 if there is none."""
    totals: dict[torch.dtype, int] = {torch.float32: 0}
    for dtype, size in sizes:
        if dtype.is_floating_point:
            totals[dtype] = totals.get(dtype, 0) + size
    return max(totals, key=lambda dtype: totals[dtype])


def hf_weight_shards(source: HFDirectory, *, names: Iterable[str], tp_rank: int, tp_size: int,
                     padded_vocab_size: int, etp_rank: int = 0, etp_size: int = 1) -> Iterator[tuple[str, Tensor]]:
    """This rank's shard of each of our parameters `names`, read from the slices of the files that hold it.

    Args:
        source: the directory, open.
        names: our parameter names; layers and experts are counted over the whole model, not on this rank.
        tp_rank: tensor-parallel rank, 0 <= tp_rank < tp_size.
        padded_vocab_size: rows of the whole word embeddings, at least the vocabulary's, divisible by tp_size.
        etp_rank, etp_size: expert-tensor-parallel rank and size, which split the experts.
    Yields:
        (name, tensor in the dtype of the file). No communication.
    Raises:
        CheckpointError: a name that no rule makes, or a size that `tp_size` does not divide.
    """
    for name in names:
        rule, layer, expert = source.family.rule_for(name)
        context = Context(shape=source.shape, layer=layer, expert=expert, padded_vocab_size=padded_vocab_size)
        rank, size = (etp_rank, etp_size) if rule.is_expert else (tp_rank, tp_size)
        yield name, rule.shard(source.read_slice, context, rank, size)


def _weight_map(index_file: Path) -> dict[str, str]:
    """Tensor name -> shard, from an index file."""
    try:
        weight_map: Any = read_json_file(index_file, LARGEST_INDEX)["weight_map"]
        for shard in set(weight_map.values()):
            plain_name(shard, f"{index_file}: a file in weight_map")
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index_file}: no usable weight_map ({error!r}); fetch the file again") from error
    return dict(weight_map)


def _no_weights(path: Path) -> str:
    """Message about a directory without weights: reason and remedy."""
    binaries = sorted(file.name for pattern in ("*model*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    if binaries:
        return (f"{path}: weights only in {binaries[0]}, a pickle that is never opened; write safetensors once: "
                f"python -c \"from transformers import AutoModel; "
                f"AutoModel.from_pretrained('{path}').save_pretrained('{path}')\"")
    return f"{path}: no {SINGLE_FILE} and no {INDEX_FILE}, so there are no weights; fetch them into this directory"
