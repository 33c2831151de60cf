"""Read and write PEFT's adapter directories: `adapter_config.json` and `adapter_model.safetensors`."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from megatron_embed.checkpoint.safe_unpickler import HEAD_KEYS
from megatron_embed.config.json_file import read_json_object
from megatron_embed.config.load import read_resolved
from megatron_embed.convert.checkpoint_directory import (
    CheckpointDirectory,
    copy_files,
    open_checkpoint,
    staging,
    write_json,
)
from megatron_embed.convert.dense_tensors import holds_dense, write_trained_dense
from megatron_embed.convert.head_tensors import saved_modules, score_names
from megatron_embed.convert.lora_merge import CheckpointKey
from megatron_embed.convert.lora_names import AdapterTensor, adapter_tensors, linear_rules, peft_targets
from megatron_embed.convert.peft_selection import PeftSelection
from megatron_embed.convert.report import PeftReport
from megatron_embed.convert.storage.safetensors_file import SafetensorsFile, SafetensorsWriter
from megatron_embed.convert.storage.torch_dist import DcpReader
from megatron_embed.convert.tables.family import Family
from megatron_embed.convert.tables.lookup import rules_for
from megatron_embed.convert.tables.transforms import nbytes
from megatron_embed.errors import CheckpointError
from megatron_embed.models.families import ModelShape, model_shape
from megatron_embed.models.known_keys import ADAPTER_CONFIG
from megatron_embed.models.lora_settings import AdapterSettings
from megatron_embed.models.saved_settings import read_saved_settings
from megatron_embed.names import HeadKind

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TASK_TYPES = {None: "FEATURE_EXTRACTION", "score": "SEQ_CLS", "yes_no": "CAUSAL_LM"}
"""Head of the checkpoint -> PEFT's type of the model that the adapter is for."""


def is_peft_directory(path: str | Path) -> bool:
    """Whether `path` holds a PEFT adapter."""
    return (Path(path) / CONFIG_FILE).is_file()


def base_of(path: Path) -> str:
    """The base model that `adapter_config.json` names. Raises CheckpointError if it names none."""
    base = read_json_object(path / CONFIG_FILE).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{path / CONFIG_FILE}: base_model_name_or_path = {base!r} must name the directory of "
                              "the model that the adapter belongs to; write it there")
    return base


class PeftAdapter:
    """A PEFT adapter directory for a model of the given family and shape, checked on opening."""

    settings: AdapterSettings
    head: dict[str, str]
    """Full Hugging Face name -> name in the file, for tensors outside the backbone: a reranker's classifier, adapters
    of a language-model head."""

    def __init__(self, path: Path, family: Family, shape: ModelShape) -> None:
        """Open `path` and compare its tensors with the model's linear layers.

        Raises:
            CheckpointError: not a LoRA adapter, a variant that is not supported, or tensors that are unknown, missing
                or of another shape.
        """
        self.path = path
        values = self._config()
        file = path / WEIGHTS_FILE
        if not file.is_file():
            raise CheckpointError(f"{path}: no {WEIGHTS_FILE}; save the adapter with safe_serialization=True")
        self._file = SafetensorsFile(file)
        try:
            stored = self._backbone_names(family)
            modules = self._modules(stored, family)
            self._selection = PeftSelection(path / CONFIG_FILE, values)
            self._check_selection(stored.values())
            if values.get("init_lora_weights", True) not in (True, "gaussian"):
                self._check_complete(stored, family, shape, modules)
            self.settings = AdapterSettings(
                rank=values["r"], alpha=float(values["lora_alpha"]), use_rslora=bool(values.get("use_rslora")),
                modules=modules, base_model=base_of(path))
            self.tensors = {tensor.ours: tensor
                            for tensor in adapter_tensors(family, shape, modules, self.settings.rank)}
            self._stored = {tensor.ours: self._stored_name(stored, tensor) for tensor in self.tensors.values()}
        except BaseException:
            self.close()
            raise
        unknown = set(stored.values()) - set(self._stored.values())
        if unknown:
            self.close()
            raise CheckpointError(f"{file}: tensor {min(unknown)} lies outside the model's {shape.num_layers} layers "
                                  f"and {shape.num_experts} experts ({len(unknown)} such); use the base model that the "
                                  "adapter was made for")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the weight file."""
        self._file.close()

    def shards(self, names: Iterable[str], *, tp_rank: int, tp_size: int, etp_rank: int,
               etp_size: int) -> Iterator[tuple[str, Tensor]]:
        """This rank's shard of each of our adapter parameters `names`, in the dtype of the file."""
        for name in names:
            tensor, stored = self.tensors[name], self._stored[name]
            rank, size = (etp_rank, etp_size) if tensor.is_expert else (tp_rank, tp_size)
            dim = tensor.shard_dim or 0
            width = tensor.shape[dim] // (1 if tensor.shard_dim is None else size)
            first = (rank * width if tensor.shard_dim is not None else 0) + (tensor.hf_rows[0] if dim == 0 else 0)
            yield name, self._file.read_slice(stored, dim, first, first + width)

    def stored_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the backbone's adapters and of the head, by its name in the file."""
        for name in dict.fromkeys((*self._stored.values(), *self.head.values())):
            yield name, self._file.read(name)

    def read_head(self, name: str) -> Tensor:
        """One of the tensors of `head`, in the dtype of the file.

        Raises:
            CheckpointError: its module is not trained whole by the settings, so that PEFT leaves the tensor out.
        """
        stored = self.head[name]
        if not self._selection.trains_whole(stored.removeprefix(_PREFIX).rpartition(".")[0]):
            raise CheckpointError(f"{self.path / CONFIG_FILE}: modules_to_save does not name the module of {stored} in "
                                  f"{WEIGHTS_FILE}, so that PEFT leaves it out; name it there, or remove the tensor")
        return self._file.read(stored)

    def _config(self) -> dict[str, Any]:
        file = self.path / CONFIG_FILE
        values = read_json_object(file)
        if values.get("peft_type") != "LORA":
            raise CheckpointError(f"{file}: peft_type = {values.get('peft_type')!r} is not supported; LORA is")
        ADAPTER_CONFIG.check(file, values)
        for key in ("r", "lora_alpha"):
            if type(values.get(key)) not in ((int,) if key == "r" else (int, float)) or not 0 < values[key] <= 2**20:
                kind = "whole number" if key == "r" else "number"
                raise CheckpointError(f"{file}: {key} = {str(values.get(key))[:40]} must be a {kind} above 0, at most "
                                      "2**20")
        return values

    def _backbone_names(self, family: Family) -> dict[str, str]:
        """Full name -> name in the file, for the tensors of the backbone; the others become `head`."""
        stored: dict[str, str] = {}
        for name in self._file.entries:
            other = stored.setdefault(_full_name(name, family), name)
            if other != name:
                raise CheckpointError(f"{self.path / WEIGHTS_FILE}: {other} and {name} are the same tensor; remove one "
                                      "of them")
        self.head = {full: name for full, name in stored.items() if family.is_passthrough(full)}
        return {full: name for full, name in stored.items() if full not in self.head}

    def _modules(self, stored: dict[str, str], family: Family) -> tuple[str, ...]:
        """The adapted linear modules, as patterns."""
        known, adapted = linear_rules(family), set()
        for full, name in stored.items():
            pattern = module_pattern(full.removesuffix(".A").removesuffix(".B"), known)
            if pattern is None:
                raise CheckpointError(f"{self.path / WEIGHTS_FILE}: tensor {name} is not an adapter of a linear layer "
                                      f"that the {family.name} weight table knows; merge the adapter with PEFT's "
                                      "merge_and_unload, and give the merged model")
            adapted.add(pattern)
        return tuple(name for name in known if name in adapted)

    def _check_selection(self, stored: Iterable[str]) -> None:
        """Raises CheckpointError for a tensor of a layer that has no adapter by the settings."""
        for name in stored:
            module = name.removeprefix(_PREFIX).removesuffix(".weight").removesuffix(".lora_A").removesuffix(".lora_B")
            if not self._selection.adapts(module):
                raise CheckpointError(f"{self.path / CONFIG_FILE}: target_modules, exclude_modules and modules_to_save "
                                      f"give {module} no adapter, and {WEIGHTS_FILE} has {name}, which PEFT leaves "
                                      "out; remove the tensors, or correct the settings")

    def _check_complete(self, stored: dict[str, str], family: Family, shape: ModelShape,
                        modules: Sequence[str]) -> None:
        """Raises CheckpointError for a layer that has an adapter by the settings, and whose tensors are missing: PEFT
        then leaves the adapter as it begins, and not every initialization begins with no effect."""
        prefixed = any(name.startswith(_PREFIX + family.prefix) for name in stored.values())
        for pattern in set(linear_rules(family)) - set(modules):
            for layer in range(shape.num_layers):
                name = pattern.replace("*", str(layer)).replace("#", "0")
                name = name if prefixed else name.removeprefix(family.prefix)
                if self._selection.adapts(name):
                    raise CheckpointError(f"{self.path / CONFIG_FILE}: target_modules gives {name} an adapter, and "
                                          f"{WEIGHTS_FILE} has no tensors of it; leave it out of target_modules")

    def _stored_name(self, stored: dict[str, str], tensor: AdapterTensor) -> str:
        """Name in the file of a tensor, after a check that it exists and has the right shape."""
        name = stored.get(f"{tensor.module}.{tensor.matrix}")
        if name is None:
            raise CheckpointError(f"{self.path / WEIGHTS_FILE}: no lora_{tensor.matrix} of {tensor.module}; adapters "
                                  "on only some layers or experts are not supported: merge with PEFT")
        shape, expected = self._file.entries[name].shape, (tensor.hf_rows[1], tensor.shape[1])
        if shape != expected:
            raise CheckpointError(f"{self.path / WEIGHTS_FILE}: {name} has shape {list(shape)}, but the base model and "
                                  f"r require {list(expected)}; use the base model that the adapter was made for")
        return name


def _full_name(stored: str, family: Family) -> str:
    """`<full Hugging Face module name>.A` or `.B`, from a tensor's name in PEFT's file."""
    name = stored.removeprefix(_PREFIX)
    for matrix in "AB":
        name = name.replace(f".lora_{matrix}.weight", f".{matrix}")
    return family.full_name(name, prefixed=name.startswith(family.prefix))


def module_pattern(module: str, known: Iterable[str]) -> str | None:
    """The pattern among `known` (`*` and `#` stand for numbers) that a full module name matches."""
    for pattern in known:
        words, others = module.split("."), pattern.split(".")
        if len(words) == len(others) and all(
                other == word or (other in "*#" and word.isdecimal())
                for word, other in zip(words, others, strict=True)):
            return pattern
    return None


def write_peft(src: str | Path, dst: str | Path, *, finish: Callable[[Path], object] | None = None) -> PeftReport:
    """Write the PEFT adapter directory `dst` of the checkpoint `src`, in the dtype of the checkpoint.

    The directory also has the tokenizer and Sentence Transformers' files, so that Sentence Transformers can load it. A
    reranker's classifier, whose weights are all trained, is written as PEFT's `modules_to_save`; its adapter is for
    *ForSequenceClassification, that of a yes_no head for *ForCausalLM. Dense modules, which are trained too, are
    Sentence Transformers' own and are written whole.

    `finish` is called with the complete directory before it gets its name; if it raises, nothing is left behind.

    Raises:
        CheckpointError: `src` holds no adapters, `dst` cannot be written, or it reads back differently.
    """
    started = time.monotonic()
    checkpoint = open_checkpoint(src)
    settings = checkpoint.info.adapters
    if settings is None:
        raise CheckpointError(f"{src}: holds no adapters; --format peft needs a checkpoint of a run with lora.rank > 0")
    family, shape = rules_for(checkpoint.info.family), model_shape(checkpoint.hf)
    tensors = list(adapter_tensors(family, shape, settings.modules, settings.rank))
    prefix = "" if checkpoint.info.head is None else family.prefix
    keys: dict[str, list[CheckpointKey]] = {}
    """Name in PEFT's file -> our parameters whose rows make it up, in order."""
    for tensor in tensors:
        keys.setdefault(_peft_name(tensor, family, prefix), []).append(family.checkpoint_key(tensor.ours))
    with DcpReader(checkpoint.model) as reader:
        if checkpoint.info.head == "score":
            held = set(reader.keys())
            keys |= {_PREFIX + name: [(HEAD_KEYS + ours, None)]
                     for ours, name in score_names(family.name).items() if HEAD_KEYS + ours in held}
        declared = [(name, reader.dtype(parts[0][0]), _shape_of(reader, parts)) for name, parts in keys.items()]
        total = sum(nbytes(shape, dtype) for _, dtype, shape in declared)
        with staging(dst, total) as work:
            copy_files(checkpoint.hf, work)
            (work / "config.json").unlink(missing_ok=True)  # PEFT's readers take it from the base model.
            if holds_dense(reader):
                write_trained_dense(reader, read_saved_settings(checkpoint.hf).dense, checkpoint.path, work)
            with SafetensorsWriter(work / WEIGHTS_FILE, declared) as writer:
                for name, parts in keys.items():
                    writer.write(name, _read(reader, parts))
            write_json(work / CONFIG_FILE, _config_of(settings, family, checkpoint.info.head,
                                                      dropout=dropout_of(checkpoint)))
            _verify(work, family, shape, settings, {name: _read(reader, parts) for name, parts in keys.items()})
            if finish is not None:
                finish(work)
    return PeftReport(destination=Path(dst), tensors=len(keys), total_bytes=total,
                      seconds=time.monotonic() - started)


def _read(reader: DcpReader, parts: Sequence[CheckpointKey]) -> Tensor:
    """The rows of several tensors of a checkpoint as one tensor."""
    tensors = [reader.read(*part) for part in parts]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _shape_of(reader: DcpReader, parts: Sequence[CheckpointKey]) -> tuple[int, ...]:
    """Shape of what `_read` returns."""
    shapes = [reader.shape(key) if index is None else reader.shape(key)[1:] for key, index in parts]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _peft_name(tensor: AdapterTensor, family: Family, prefix: str) -> str:
    """Name of a matrix in PEFT's file; `prefix`: that of the backbone in Transformers' class (AutoModel: none)."""
    return f"{_PREFIX}{prefix}{tensor.module.removeprefix(family.prefix)}.lora_{tensor.matrix}.weight"


def dropout_of(checkpoint: CheckpointDirectory) -> float:
    """The adapters' dropout in the run that wrote a checkpoint; 0 if it was not written by a run."""
    file = checkpoint.path / "config.yaml"
    lora = read_resolved(file).get("lora") if file.is_file() else None
    value = lora.get("dropout") if isinstance(lora, dict) else None
    return float(value) if isinstance(value, int | float) else 0.0


def _config_of(settings: AdapterSettings, family: Family, head: HeadKind | None, *,
               dropout: float) -> dict[str, Any]:
    """Contents of adapter_config.json."""
    alpha = settings.alpha
    has_experts = any("#" in module for module in settings.modules)
    return {
        "peft_type": "LORA", "task_type": _TASK_TYPES[head], "base_model_name_or_path": settings.base_model,
        "r": settings.rank, "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "use_rslora": settings.use_rslora,
        # PEFT refuses to load adapters of experts with a dropout.
        "lora_dropout": 0.0 if has_experts else dropout,
        "target_modules": peft_targets(family, settings.modules), "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True,
        "modules_to_save": saved_modules(family.name) if head == "score" else None,
        "rank_pattern": {}, "alpha_pattern": {}, "use_dora": False, "revision": None}


def _verify(directory: Path, family: Family, shape: ModelShape, settings: AdapterSettings,
            expected: dict[str, Tensor]) -> None:
    """Check that the written adapter reads back the same: its settings, and every tensor of the file."""
    with PeftAdapter(directory, family, shape) as written:
        read = dict(written.stored_tensors())
        same = written.settings == settings and read.keys() == expected.keys() and all(
            tensor.equal(expected[name]) and tensor.dtype == expected[name].dtype for name, tensor in read.items())
    if not same:
        raise CheckpointError(f"{directory}: reads back differently from what was written; check the disk and try "
                              "again")
