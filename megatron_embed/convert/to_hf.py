"""What a conversion to Hugging Face writes: the rows of the table, the tensors to come, and a reranker's head."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_embed.convert.checkpoint_directory import CheckpointDirectory, open_carried
from megatron_embed.convert.heads import HeadExport, read_head
from megatron_embed.convert.hf_directory import largest_dtype
from megatron_embed.convert.storage.byte_range import Run, head_of_runs
from megatron_embed.convert.storage.copying import Copy, copy_and_verify
from megatron_embed.convert.storage.safetensors_file import SafetensorsFile
from megatron_embed.convert.storage.sharded import Announced, ShardedWriter
from megatron_embed.convert.storage.torch_dist import DcpReader
from megatron_embed.convert.tables.family import Family
from megatron_embed.convert.tables.transforms import Context, PadVocabulary, Transform, nbytes
from megatron_embed.errors import CheckpointError
from megatron_embed.models.families import ModelShape

HEAD_KEYS = "model.head."
"""Beginning of the keys of a reranker's head in a checkpoint."""
WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
WRITTEN_DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}
"""Dtypes that a model can be written in, by their names; null: as it is."""


@dataclass(frozen=True, kw_only=True)
class RerankerFormat:
    """Which Hugging Face model a reranker's checkpoint becomes."""

    kind: Literal["yes_no", "score"]
    """Of its head."""
    classification: bool
    """*ForSequenceClassification; else *ForCausalLM."""
    token_ids: tuple[int, int] | None
    """Of yes and no; null for a score head."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table for one layer and expert: a parameter of ours, and where a checkpoint keeps it."""

    rule: Transform
    context: Context
    key: str
    index: int | None
    """Along the first axis of the checkpoint's tensor; null: the parameter is the whole tensor."""

    @property
    def name(self) -> str:
        return self.context.name(self.rule.ours)

    @property
    def count(self) -> int | None:
        """Length of the checkpoint tensor's axis of experts; null without one."""
        return None if self.index is None else self.context.shape.num_experts

    def in_hf(self, parts: Sequence[Run]) -> list[Run]:
        """Where the parameter's bytes lie, in its order, in its Hugging Face tensors `parts`."""
        widths = [part.length // self.context.sizes(words)[0]
                  for part, words in zip(parts, self.rule.hf_shapes(), strict=True)]
        return [parts[piece.part].part(piece.theirs * widths[piece.part], piece.rows * widths[piece.part])
                for piece in self.rule.pieces(self.context)]

    def in_ours(self, part: int, ours: Run) -> list[Run]:
        """Where the bytes of Hugging Face tensor `part` lie, in its order, in the parameter `ours`."""
        width = ours.length // self.rule.ours_shape(self.context)[0]
        return [ours.part(piece.ours * width, piece.rows * width)
                for piece in self.rule.pieces(self.context) if piece.part == part]

    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the checkpoint's tensor, without vocabulary padding."""
        shape = self.rule.ours_shape(self.context)
        return shape if self.count is None else (self.count, *shape)


class Plan:
    """The tensors of a Hugging Face directory to come: announced first (a header precedes its data), then written."""

    def __init__(self, reader: DcpReader, rows: list[Row], checkpoint: CheckpointDirectory,
                 family: Family, carried: SafetensorsFile | None, head: HeadExport | None,
                 dtype: torch.dtype | None) -> None:
        info = checkpoint.info
        self._reader, self._rows, self._carried, self._head = reader, rows, carried, head
        self._wanted = dtype
        # A model with a head names its backbone's tensors with the prefix, whatever it was made of.
        self._prefix = "" if info.prefixed or head is not None else family.prefix
        self._copies = {embedding: copy for copy, embedding in info.tied_copies.items()
                        if head is None or head.keeps(copy)}
        self._passed: dict[str, str] = {}
        """Tensors that pass through: name to be -> name in the carried file."""
        for name in () if carried is None else carried.entries:
            full = family.full_name(name, prefixed=info.prefixed)
            if head is None or head.keeps(full):
                self._passed[name if head is None else full] = name
        self.announced: list[Announced] = []
        for row in rows:
            written = self._written_dtype(reader.dtype(row.key))
            for name, words in zip(row.rule.hf_names(row.context), row.rule.hf_shapes(), strict=True):
                self.announced += [(stored, written, row.context.sizes(words)) for stored in self._stored(name)]
        self.dtype = largest_dtype((dtype, nbytes(shape, dtype)) for _, dtype, shape in self.announced)
        for name, stored in self._passed.items():
            assert carried is not None
            entry = carried.entries[stored]
            self.announced.append((name, self._written_dtype(entry.dtype), entry.shape))
        if head is not None:
            self.announced += [(name, self._written_dtype(tensor.dtype), tuple(tensor.shape))
                               for name, tensor in head.added.items()]
        self.total_bytes = sum(nbytes(shape, dtype) for _, dtype, shape in self.announced)

    def write(self, directory: Path, max_shard_bytes: int) -> dict[str, Run]:
        """Write everything and read it back; gives the place of each tensor by its stored name.

        Raises:
            CheckpointError: something reads back differently, or the checkpoint is damaged.
        """
        places: dict[str, Run] = {}
        with ShardedWriter(directory, self.announced, max_shard_bytes) as writer:
            def placed(*names: str) -> list[Run]:
                places.update((name, writer.place(name)) for name in names)
                return [places[name] for name in names]

            def done(copy: Copy) -> None:
                for name in copy.writes:
                    writer.done(name)

            copy_and_verify(chain(self._of_rows(placed), self._others(placed)), done)
        return places

    def _of_rows(self, placed: Callable[..., list[Run]]) -> Iterator[Copy]:
        """Our parameters' ways into the files."""
        for row in progress(self._rows, "converting"):
            names = (self._stored(name) for name in row.rule.hf_names(row.context))
            for stored in zip(*names, strict=True):  # a second time for an embedding that a head repeats
                yield Copy(name=row.name, source=self._source(row), target=row.in_hf(placed(*stored)), writes=stored)

    def _source(self, row: Row) -> Sequence[Run] | Callable[[], Tensor]:
        """Where one of our parameters comes from, vocabulary padding left out."""
        shape, dtype = row.rule.ours_shape(row.context), self._reader.dtype(row.key)
        runs = self._reader.runs(row.key, row.index) if self._written_dtype(dtype) == dtype else None
        if runs is not None:
            return head_of_runs(runs, nbytes(shape, dtype))
        return lambda: self._cast(self._reader.read(row.key, row.index))[:shape[0]]

    def _others(self, placed: Callable[..., list[Run]]) -> Iterator[Copy]:
        """The ways of the tensors that no row makes."""
        for name, stored in self._passed.items():
            yield Copy(name=name, source=self._passing(name, stored), target=placed(name), writes=(name,))
        if self._head is not None:
            for name, tensor in self._head.added.items():
                yield Copy(name=name, source=partial(self._cast, tensor), target=placed(name), writes=(name,))

    def _passing(self, name: str, stored: str) -> Sequence[Run] | Callable[[], Tensor]:
        """Where a tensor of the carried file comes from, as it will be written."""
        carried, head = self._carried, self._head
        assert carried is not None
        dtype = carried.entries[stored].dtype
        if head is None and self._written_dtype(dtype) == dtype:
            return [carried.run(stored)]
        return lambda: self._cast(carried.read(stored) if head is None else head.edited(name, carried.read(stored)))

    def _written_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self._wanted if self._wanted is not None and dtype.is_floating_point else dtype

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._written_dtype(tensor.dtype))

    def _stored(self, name: str) -> list[str]:
        """Names in the file of a full name: its own, and that of a head that repeats it."""
        return [name.removeprefix(self._prefix), *([self._copies[name]] if name in self._copies else [])]


def rows_of(family: Family, shape: ModelShape) -> list[Row]:
    """Every row of the table with what it must know, in the order of writing."""
    return list(_rows(family, shape))


def _rows(family: Family, shape: ModelShape) -> Iterator[Row]:
    for rule, context in family.rows(shape):
        key, index = family.checkpoint_place(context.name(rule.ours))
        yield Row(rule=rule, context=context, key=key, index=index)


def head_of(reader: DcpReader, checkpoint: CheckpointDirectory, family: Family, shape: ModelShape,
             reranker: RerankerFormat | None) -> HeadExport | None:
    """The head of a reranker's checkpoint; null for any other."""
    if reranker is None:
        if checkpoint.info.head is not None:
            raise CheckpointError(f"{checkpoint.path}: is a reranker's checkpoint (head {checkpoint.info.head}); use "
                                  "--format cross-encoder or --format hf")
        return None
    keys = [key for key in reader.keys() if key.startswith(HEAD_KEYS)]  # noqa: SIM118  a reader is no mapping
    head = {key.removeprefix(HEAD_KEYS): reader.read(key) for key in keys}
    if not head and reranker.kind == "yes_no" and shape.tie_word_embeddings:
        assert reranker.token_ids is not None
        embeddings = reader.read(family.checkpoint_place(WORD_EMBEDDINGS)[0])
        head = {"weight": embeddings[list(reranker.token_ids)]}
    if not head:
        with open_carried(checkpoint) as carried:
            head = read_head(carried, family.name, reranker.kind, reranker.token_ids, str(checkpoint.path))
    if "weight" not in head:
        raise CheckpointError(f"{checkpoint.path}: has no classifier, so it is no reranker yet; train it with task: "
                              "reranker first")
    return HeadExport(family.name, reranker.kind, head=head, token_ids=reranker.token_ids,
                      classification=reranker.classification)


def progress(rows: list[Row], what: str) -> Iterable[Row]:
    """The rows, with a progress bar if someone is watching."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    bar: Iterable[Row] = tqdm(rows, desc=what, unit="tensor", disable=not sys.stderr.isatty())
    return bar


def check_checkpoint(reader: DcpReader, rows: list[Row], directory: Path) -> None:
    """The checkpoint's model tensors are exactly those of the table, each of the right shape."""
    keys = set(reader.keys())
    unnamed = {key for key in keys if key.startswith("model.") and not key.startswith(HEAD_KEYS)}
    for row in rows:
        _check_row(reader, keys, row, directory)
        unnamed.discard(row.key)
    if unnamed:
        raise CheckpointError(f"{directory}: {min(unnamed)} is unknown to the weight table ({len(unnamed)} such); "
                              "hf/config.json must be of this model")


def check_sizes(directory: Path, family: Family, shape: ModelShape) -> None:
    """config.json's sizes are those of the checkpoint's tensors, found before memory is taken for a model of that size.

    `directory`: of the tensors. Reads their description alone; other tensors, such as adapters, may be there.
    """
    with DcpReader(directory) as reader:
        keys = set(reader.keys())
        for row in _rows(family, shape):
            _check_row(reader, keys, row, directory)


def _check_row(reader: DcpReader, keys: set[str], row: Row, directory: Path) -> None:
    """The checkpoint has the row's tensor, of the right shape."""
    if row.key not in keys:
        raise CheckpointError(f"{directory}: {row.key} is missing; a model with num_hidden_layers = "
                              f"{row.context.shape.num_layers} (hf/config.json) has it: take another checkpoint")
    found, expected = reader.shape(row.key), row.stored_shape()
    padded = isinstance(row.rule, PadVocabulary) and len(found) == len(expected) and found[0] > expected[0]
    if found != expected and not (padded and found[1:] == expected[1:]):
        raise CheckpointError(f"{directory}: {row.key} has shape {list(found)}, but hf/config.json says "
                              f"{list(expected)}; use the config.json that belongs to this checkpoint")
