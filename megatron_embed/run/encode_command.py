"""The `encode` command: vectors of a file of texts, in one file or in shards."""

import argparse
import contextlib
import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_embed import __version__
from megatron_embed.batch import TextVectors
from megatron_embed.data.corpus import TextsOnDisk
from megatron_embed.errors import ConfigError, DataError, EmptyTextError, UserError
from megatron_embed.evaluation.encode import TextEncoder
from megatron_embed.evaluation.joint_vectors import token_vectors
from megatron_embed.evaluation.sparse_vectors import sparse_vectors, write_matrix
from megatron_embed.evaluation.stored_vectors import (
    as_dtype,
    needs_ranges,
    ranges_name,
    ranges_of,
    ranges_text,
    read_ranges,
)
from megatron_embed.evaluation.token_file import write_token_file
from megatron_embed.evaluation.token_pooling import pool_tokens
from megatron_embed.evaluation.vector_files import ShardWriter, write_shards
from megatron_embed.loading.model_directory import ModelDirectory
from megatron_embed.parallel.collectives import broadcast_from_rank0, raise_on_all_ranks
from megatron_embed.platform.atomic_file import write_atomic

TEXTS_PER_MATRIX = 65536
"""Texts of a matrix in a directory of sparse vectors."""

logger = logging.getLogger(__name__)


def encode_to_file(args: argparse.Namespace, texts: TextsOnDisk, encoder: TextEncoder, model: ModelDirectory) -> None:
    """Write a .npy file, complete or not at all, and beside int8 codes their ranges: those of --ranges, of the model
    directory, or of these vectors. Called by all ranks."""
    ranges = given_ranges(args, model, encoder.dim)
    vectors, error = _encoded(args, texts, encoder, range(len(texts))), None
    if encoder.topology.rank == 0:
        if needs_ranges(args.output_dtype):
            if ranges is None:
                logger.info("the ranges of %s are those of these %d vectors", args.output_dtype, len(vectors))
            ranges = ranges_of(vectors) if ranges is None else ranges
            error = _write_ranges(args, ranges)
        try:
            array = as_dtype(vectors, args.output_dtype, ranges)
            error = error or write_atomic("--output", args.output, lambda file: np.save(file, array), binary=True)
        except DataError as data_error:
            error = error or data_error
        if error is not None and ranges is not None:
            with contextlib.suppress(OSError):
                os.remove(ranges_name(args.output))
    raise_on_all_ranks(error)


def given_ranges(args: argparse.Namespace, model: ModelDirectory, dim: int) -> NDArray[np.float32] | None:
    """[2, dim] ranges of --ranges, otherwise of the model directory; None: there are none, or none are needed.

    Raises:
        ConfigError: those of --ranges are of other vectors.
    """
    if not needs_ranges(args.output_dtype):
        return None
    known = read_ranges(Path(args.ranges) if args.ranges is not None else model.root)
    if args.ranges is not None and dim not in known:
        raise ConfigError(f"--ranges {args.ranges}: has no ranges of vectors of {dim} numbers, which the model gives "
                          f"(widths there: {', '.join(map(str, known)) or 'none'}); name a file that `encode` or an "
                          "export has written", key="--ranges")
    return known.get(dim)


def _write_ranges(args: argparse.Namespace, ranges: NDArray[np.float32]) -> UserError | None:
    text = ranges_text({ranges.shape[1]: ranges})
    return write_atomic("--output", ranges_name(args.output), lambda file: file.write(text))


def encode_token_vectors(args: argparse.Namespace, texts: TextsOnDisk, encoder: TextEncoder) -> None:
    """Write the vectors of a multi-vector model from the first rank, complete or not at all; the other ranks compute
    their share of every block. Called by all ranks."""
    blocks: Iterator[TextVectors] = encoder.blocks(texts, args.role or "document",
                                                   show_progress=encoder.topology.rank == 0)
    joint, dim, error = encoder.tokenizer.joint, encoder.dim, None
    if joint is not None:
        blocks, dim = (token_vectors(block, joint) for block in blocks), joint.token_dim
    try:
        if encoder.topology.rank == 0:
            pooled = (pool_tokens(block, args.token_pooling or 1) for block in blocks)
            error = write_token_file(args.output, pooled, dim)
        else:
            for _ in blocks:
                pass
    except EmptyTextError as empty:
        raise EmptyTextError(empty.row, texts.source(empty.row), empty.text) from None
    raise_on_all_ranks(error)


def encode_sparse_vectors(args: argparse.Namespace, texts: TextsOnDisk, encoder: TextEncoder) -> None:
    """Write the vectors of a sparse model from the first rank: a matrix, complete or not at all, or a directory of
    them, each of TEXTS_PER_MATRIX texts, complete or not there. Called by all ranks."""
    for name, rows in sparse_parts(args.output, len(texts)):
        try:
            matrix = sparse_vectors(encoder, texts[rows.start : rows.stop], args.role or "document",
                                    show_progress=encoder.topology.rank == 0)
        except EmptyTextError as empty:
            row = rows.start + empty.row
            raise EmptyTextError(empty.row, texts.source(row), empty.text) from None
        error: UserError | None = None
        if encoder.topology.rank == 0:
            error = make_directory(args.output, name) or write_atomic(
                "--output", name, functools.partial(write_matrix, matrix=matrix), binary=True)
        raise_on_all_ranks(error)


def sparse_parts(output: str, count: int) -> list[tuple[str, range]]:
    """(file, its texts) of all texts."""
    if output.endswith(".npz"):
        return [(output, range(count))]
    return [(os.path.join(output, f"{first // TEXTS_PER_MATRIX:06d}.npz"),
             range(first, min(first + TEXTS_PER_MATRIX, count))) for first in range(0, count, TEXTS_PER_MATRIX)]


def make_directory(output: str, name: str) -> UserError | None:
    """Make the directory of a file in it; the error if a file of that name is there or it cannot be made."""
    if output == name:
        return None
    try:
        os.makedirs(output, exist_ok=True)
    except OSError as error:
        return ConfigError(f"--output {output}: cannot be made ({error.strerror}); name another one", key="--output")
    if os.path.exists(name):
        return ConfigError(f"--output {output}: holds {os.path.basename(name)} already; name a new directory",
                           key="--output")
    return None


def encode_to_directory(args: argparse.Namespace, texts: TextsOnDisk, encoder: TextEncoder,
                        model: ModelDirectory) -> None:
    """Write the shards that a directory lacks. Called by all ranks, which write in turn.

    Raises:
        UserError: on all ranks.
    """
    rank, settings = encoder.topology.rank, settings_of_vectors(args, encoder, model)
    ranges = given_ranges(args, model, encoder.dim)
    if needs_ranges(args.output_dtype):
        if ranges is None:
            raise ConfigError(f"--output-dtype {args.output_dtype}: shards need ranges that are known before the first "
                              f"of them, and {args.model} has none; encode some of the texts into one .npy file first, "
                              "and name the ranges beside it with --ranges", key="--output-dtype")
        settings["ranges"] = hashlib.sha256(ranges.tobytes()).hexdigest()
    writer: ShardWriter | None = None
    for is_turn in (rank == 0, rank != 0):  # rank 0 makes the directory, which the others then find
        error: UserError | None = None
        try:
            if is_turn:
                writer = ShardWriter(args.output, settings, rows=len(texts), dim=encoder.dim, dtype=args.output_dtype,
                                     ranges=ranges, is_first=rank == 0)
                if rank == 0 and ranges is not None:
                    error = _write_ranges(args, ranges)
        except ConfigError as config_error:
            error = config_error
        raise_on_all_ranks(error)
    assert writer is not None
    missing: list[int] = json.loads(broadcast_from_rank0(json.dumps(writer.missing())))
    write_shards(writer, missing, lambda rows: _encoded(args, texts, encoder, rows), rank=rank,
                 world_size=encoder.topology.world_size, agree=raise_on_all_ranks)
    dist.barrier()


def settings_of_vectors(args: argparse.Namespace, encoder: TextEncoder, model: ModelDirectory) -> dict[str, Any]:
    """All that decides the vectors, as JSON takes it."""
    stamps = [[str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns]
              for folder in model.read_from for file in sorted(folder.rglob("*"))
              if file.is_file() and file.suffix in (".json", ".safetensors", ".bin", ".txt", ".model", ".distcp")]
    status = os.stat(args.input)
    role = args.role or "document"
    return {"version": __version__, "model": os.path.abspath(args.model), "files of the model": stamps,
            "texts": [os.path.abspath(args.input), status.st_size, status.st_mtime_ns],
            "role": args.role, "prompt": encoder.tokenizer.fill_prompt(role), "pooling": encoder.pooling,
            "max_length": encoder.tokenizer.max_length(role), "normalize": not args.no_normalize,
            "computed in": str(next(encoder.chunks[0].parameters()).dtype)}


def _encoded(args: argparse.Namespace, texts: TextsOnDisk, encoder: TextEncoder, rows: range) -> Tensor:
    """[rows, dim] on every rank."""
    part: Sequence[str] = texts[rows.start:rows.stop]
    try:
        return encoder.encode(part, args.role or "document", show_progress=encoder.topology.rank == 0)
    except EmptyTextError as error:
        raise EmptyTextError(error.row, texts.source(rows.start + error.row), error.text) from None
