"""Write a checkpoint's tensors as a Hugging Face directory: our parameters, passthrough tensors, a reranker's head."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from megatron_embed.checkpoint.safe_unpickler import DENSE_KEYS, HEAD_KEYS
from megatron_embed.convert.checkpoint_directory import CheckpointDirectory, PassthroughFile
from megatron_embed.convert.head_tensors import HeadExport, read_head, score_names
from megatron_embed.convert.hf_directory import largest_dtype
from megatron_embed.convert.report import progress
from megatron_embed.convert.storage.byte_range import ByteRange, take
from megatron_embed.convert.storage.copying import Copy, copy_and_verify
from megatron_embed.convert.storage.sharded import DeclaredTensor, ShardedWriter
from megatron_embed.convert.storage.torch_dist import DcpReader
from megatron_embed.convert.tables.family import Family
from megatron_embed.convert.tables.lookup import rules_for
from megatron_embed.convert.tables.transforms import Context, PadVocabulary, Transform, nbytes
from megatron_embed.convert.vocabulary_tensors import VocabularyExport, check_vocabulary_head
from megatron_embed.errors import CheckpointError
from megatron_embed.models.families import ModelShape
from megatron_embed.models.head_shapes import reranker_head_shapes
from megatron_embed.names import HeadKind

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
WRITTEN_DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}
"""Dtypes that a model can be written in, by their names; None: unchanged."""


@dataclass(frozen=True, kw_only=True)
class RerankerFormat:
    """Kind of Hugging Face model that a reranker's checkpoint is written as."""

    kind: HeadKind
    """Kind of its head."""
    classification: bool
    """*ForSequenceClassification; else *ForCausalLM."""
    token_ids: tuple[int, int] | None
    """Ids of yes and no; None for a score head."""


@dataclass(frozen=True, kw_only=True)
class StoredParameter:
    """One of our parameters: the rule that makes it, its layer and expert, and where a checkpoint stores it."""

    rule: Transform
    context: Context
    key: str
    """Key of the checkpoint's tensor."""
    index: int | None
    """Index along the first axis of the checkpoint's tensor; None: the parameter is the whole tensor."""

    @property
    def name(self) -> str:
        return self.context.name(self.rule.ours)

    @property
    def count(self) -> int | None:
        """Number of experts along the first axis of the checkpoint's tensor; None: it has no such axis."""
        return None if self.index is None else self.context.shape.num_experts

    def in_hf(self, tensors: Sequence[ByteRange]) -> list[ByteRange]:
        """The parameter's bytes, in its order, within its Hugging Face tensors."""
        row_bytes = [tensor.length // self.context.sizes(words)[0]
                     for tensor, words in zip(tensors, self.rule.hf_shapes(), strict=True)]
        return [tensors[rows.part].part(rows.hf_start * row_bytes[rows.part], rows.rows * row_bytes[rows.part])
                for rows in self.rule.row_ranges(self.context)]

    def in_ours(self, part: int, parameter: ByteRange) -> list[ByteRange]:
        """The bytes of Hugging Face tensor `part`, in its order, within our parameter."""
        row_bytes = parameter.length // self.rule.ours_shape(self.context)[0]
        return [parameter.part(rows.our_start * row_bytes, rows.rows * row_bytes)
                for rows in sorted(self.rule.row_ranges(self.context), key=lambda rows: rows.hf_start)
                if rows.part == part]

    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the checkpoint's tensor, without vocabulary padding."""
        shape = self.rule.ours_shape(self.context)
        return shape if self.count is None else (self.count, *shape)


def stored_parameters(family: Family, shape: ModelShape) -> Iterator[StoredParameter]:
    """Every parameter of a model, in the order of writing."""
    for rule, context in family.applied_rules(shape):
        key, index = family.checkpoint_key(context.name(rule.ours))
        yield StoredParameter(rule=rule, context=context, key=key, index=index)


class HFWriter:
    """Writes the tensors of a Hugging Face directory: declares all of them (headers precede data), then writes them.

    Attributes:
        declared: every tensor that will be written.
        dtype: the floating-point dtype of most bytes of the backbone.
        total_bytes: size of all tensors.
    """

    def __init__(self, reader: DcpReader, parameters: list[StoredParameter], checkpoint: CheckpointDirectory,
                 passthrough: PassthroughFile, *, head: HeadExport | VocabularyExport | None,
                 dtype: torch.dtype | None) -> None:
        """
        Args:
            reader: the checkpoint's tensors.
            passthrough: the checkpoint's passthrough tensors.
            head: the head of a reranker or of a sparse model; None: the model has none.
            dtype: dtype of every floating-point tensor; None: unchanged.
        """
        info, family = checkpoint.info, rules_for(checkpoint.info.family)
        self._reader, self._parameters, self._passthrough, self._head = reader, parameters, passthrough, head
        self._wanted_dtype = dtype
        # A model with a head always uses the prefix for its backbone's tensors.
        self._prefix = "" if info.prefixed or head is not None else family.prefix
        self._copies = {embedding: copy for copy, embedding in info.tied_copies.items()
                        if head is None or head.keeps(copy)}
        self._kept = {stored if head is None else full: full for full, stored in passthrough.stored_names.items()
                      if head is None or head.keeps(full)}
        """Passthrough tensors: name that is written -> full name."""
        self.declared: list[DeclaredTensor] = self._declared_parameters()
        self.dtype = largest_dtype((dtype, nbytes(shape, dtype)) for _, dtype, shape in self.declared)
        for name, full in self._kept.items():
            entry = passthrough.entry(full)
            self.declared.append((name, self._written_dtype(entry.dtype), entry.shape))
        if head is not None:
            self.declared += [(name, self._written_dtype(tensor.dtype), tuple(tensor.shape))
                              for name, tensor in head.added.items()]
        self.total_bytes = sum(nbytes(shape, dtype) for _, dtype, shape in self.declared)

    def write(self, directory: Path, max_shard_bytes: int) -> dict[str, ByteRange]:
        """Write everything and read it back; return the range of each tensor by its stored name.

        Raises:
            CheckpointError: something reads back differently, or the checkpoint is damaged.
        """
        targets: dict[str, ByteRange] = {}
        with ShardedWriter(directory, self.declared, max_shard_bytes) as writer:
            def reserve(*names: str) -> list[ByteRange]:
                targets.update((name, writer.reserve(name)) for name in names)
                return [targets[name] for name in names]

            def done(copy: Copy) -> None:
                for name in copy.writes:
                    writer.done(name)

            copy_and_verify(chain(self._parameter_copies(reserve), self._other_copies(reserve)), done)
        return targets

    def _declared_parameters(self) -> list[DeclaredTensor]:
        """The Hugging Face tensors of our parameters, with the copies that tied heads store."""
        declared = []
        for parameter in self._parameters:
            rule, context = parameter.rule, parameter.context
            dtype = self._written_dtype(self._reader.dtype(parameter.key))
            for name, words in zip(rule.hf_names(context), rule.hf_shapes(), strict=True):
                declared += [(stored, dtype, context.sizes(words)) for stored in self._stored_names(name)]
        return declared

    def _parameter_copies(self, reserve: Callable[..., list[ByteRange]]) -> Iterator[Copy]:
        """Copies of our parameters."""
        for parameter in progress(self._parameters, "converting"):
            names = (self._stored_names(name) for name in parameter.rule.hf_names(parameter.context))
            for stored in zip(*names, strict=True):  # twice for an embedding that a tied head repeats
                yield Copy(name=parameter.name, source=self._parameter_source(parameter),
                           target=parameter.in_hf(reserve(*stored)), writes=stored)

    def _parameter_source(self, parameter: StoredParameter) -> Sequence[ByteRange] | Callable[[], Tensor]:
        """Source of one of our parameters, without vocabulary padding."""
        shape, dtype = parameter.rule.ours_shape(parameter.context), self._reader.dtype(parameter.key)
        unchanged = self._written_dtype(dtype) == dtype
        ranges = self._reader.byte_ranges(parameter.key, parameter.index) if unchanged else None
        if ranges is not None:
            return take(ranges, nbytes(shape, dtype))
        return lambda: self._cast(self._reader.read(parameter.key, parameter.index))[:shape[0]]

    def _other_copies(self, reserve: Callable[..., list[ByteRange]]) -> Iterator[Copy]:
        """Copies of the tensors that no rule makes."""
        for name, full in self._kept.items():
            yield Copy(name=name, source=self._passthrough_source(full), target=reserve(name), writes=(name,))
        if self._head is not None:
            for name, tensor in self._head.added.items():
                yield Copy(name=name, source=partial(self._cast, tensor), target=reserve(name), writes=(name,))

    def _passthrough_source(self, name: str) -> Sequence[ByteRange] | Callable[[], Tensor]:
        """Source of the passthrough tensor of this full name, with the trained rows of a head inserted."""
        file, head = self._passthrough, self._head
        dtype = file.entry(name).dtype
        if head is None and self._written_dtype(dtype) == dtype:
            return [file.byte_range(name)]
        return lambda: self._cast(file.read(name) if head is None else head.edited(name, file.read(name)))

    def _written_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self._wanted_dtype if self._wanted_dtype is not None and dtype.is_floating_point else dtype

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._written_dtype(tensor.dtype))

    def _stored_names(self, name: str) -> list[str]:
        """Names in the file of a full name: its own, and that of a tied head that repeats it."""
        return [name.removeprefix(self._prefix), *([self._copies[name]] if name in self._copies else [])]


def head_export(reader: DcpReader, checkpoint: CheckpointDirectory, passthrough: PassthroughFile, shape: ModelShape,
                reranker: RerankerFormat | None) -> HeadExport | VocabularyExport | None:
    """The head of a reranker's checkpoint, or of a trained sparse model's; None for any other."""
    family = rules_for(checkpoint.info.family)
    keys = [key for key in reader.keys() if key.startswith(HEAD_KEYS)]  # noqa: SIM118  a reader is not a mapping
    trained = {key.removeprefix(HEAD_KEYS): reader.read(key) for key in keys}
    if reranker is None:
        if checkpoint.info.head is not None:
            raise CheckpointError(f"{checkpoint.path}: is a reranker's checkpoint (head {checkpoint.info.head}); use "
                                  "--format cross-encoder or --format hf")
        if trained:
            check_vocabulary_head({ours: tuple(head.shape) for ours, head in trained.items()}, shape, checkpoint.path)
        return VocabularyExport(shape, trained) if trained else None
    head = trained if checkpoint.info.head is not None else read_head(
        passthrough, shape, reranker.kind, reranker.token_ids, str(checkpoint.path))
    expected = reranker_head_shapes(reranker.kind, shape)
    if {name: tuple(tensor.shape) for name, tensor in head.items()} != expected:
        missing = [score_names(family.name)[name] for name in expected if name not in head]
        raise CheckpointError(f"{checkpoint.path}: has no classifier ({', '.join(missing) or 'of the right shape'}), "
                              "so it is not a reranker yet; train it with task: reranker first")
    if not expected:
        assert reranker.token_ids is not None
        embeddings = reader.read(family.checkpoint_key(WORD_EMBEDDINGS)[0])
        head = {"weight": embeddings[list(reranker.token_ids)]}
    return HeadExport(family.name, reranker.kind, head=head, token_ids=reranker.token_ids,
                      classification=reranker.classification)


def check_checkpoint(reader: DcpReader, parameters: list[StoredParameter], directory: Path) -> None:
    """Check that the checkpoint's model tensors are exactly those of the table, each of the right shape."""
    keys = set(reader.keys())
    unknown = {key for key in keys if key.startswith("model.") and not key.startswith((HEAD_KEYS, DENSE_KEYS))}
    for parameter in parameters:
        _check_parameter(reader, keys, parameter, directory)
        unknown.discard(parameter.key)
    if unknown:
        raise CheckpointError(f"{directory}: {min(unknown)} is unknown to the weight table ({len(unknown)} such); "
                              "hf/config.json must be of this model")


def check_sizes(directory: Path, family: Family, shape: ModelShape) -> None:
    """Check config.json's sizes against those of the checkpoint's tensors, before a model of that size is built.

    `directory` holds the tensors; only their description is read. Other tensors, such as adapters, may be there.
    """
    with DcpReader(directory) as reader:
        keys = set(reader.keys())
        for parameter in stored_parameters(family, shape):
            _check_parameter(reader, keys, parameter, directory)


def _check_parameter(reader: DcpReader, keys: set[str], parameter: StoredParameter, directory: Path) -> None:
    """Check that the checkpoint has the parameter's tensor, of the right shape."""
    key = parameter.key
    if key not in keys:
        raise CheckpointError(f"{directory}: {key} is missing; a model with num_hidden_layers = "
                              f"{parameter.context.shape.num_layers} (hf/config.json) has it: take another checkpoint")
    stored, expected = reader.shape(key), parameter.stored_shape()
    padded = (isinstance(parameter.rule, PadVocabulary) and len(stored) == len(expected) and stored[0] > expected[0]
              and stored[1:] == expected[1:])
    if stored != expected and not padded:
        raise CheckpointError(f"{directory}: {key} has shape {list(stored)}, but hf/config.json says "
                              f"{list(expected)}; use the config.json that belongs to this checkpoint")
