"""`encode --model DIR --input FILE.jsonl --output FILE.npy`"""

import argparse
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from megatron_embed.cli.common import add_encoding_arguments, add_model_argument, path, positive_int
from megatron_embed.cli.prompts import add_prompt_arguments
from megatron_embed.errors import ConfigError, EmptyTextError, UserError
from megatron_embed.parallel.lost_rank import monitored_ranks
from megatron_embed.platform.atomic_file import write_atomic

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_embed.batch import TextVectors

HELP = "Encode texts as vectors"
EXAMPLES = ("megatron-embed encode --model runs/a/best --input texts.jsonl --output vectors.npy --role document",)
PAGE = "docs/evaluation.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("--input", required=True, metavar="FILE.jsonl", type=path,
                        help='Rows {"text": ..., "title"?: ...}; a title is put before its text, as in evaluate')
    parser.add_argument("--output", required=True, metavar="FILE.npy", type=path,
                        help="File to write: float32 vectors, one row per text; of a multi-vector model one row per "
                             "vector, text after text, and FILE.offsets.npy with the first row of each text")
    parser.add_argument("--role", choices=("query", "document"),
                        help="Put the prompt of this role before every text (default: no prompt)")
    parser.add_argument("--token-pooling", type=positive_int, metavar="N",
                        help="Of a multi-vector model: keep about one vector in N of every document, means of clusters "
                             "(with --role document)")
    add_prompt_arguments(parser)
    add_encoding_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Write [texts, dim] float32, in the order of the rows; nothing half-written is left behind."""
    from megatron_embed.data.dataset import read_texts, source_of_text

    texts = read_texts(args.input)
    folder = os.path.dirname(os.path.abspath(args.output))
    writable = os.path.isdir(folder) and os.access(folder, os.W_OK)
    if os.path.isdir(args.output) or not args.output.endswith(".npy") or not writable:
        raise ConfigError(f"--output {args.output}: must be a .npy file, not a directory, in a directory that "
                          "exists and is writable", key="--output")
    from megatron_embed.loading.model_directory import open_encoder
    from megatron_embed.loading.prompts import given_prompts
    from megatron_embed.parallel.collectives import raise_on_all_ranks

    prompts = given_prompts(args, () if args.role is None else (args.role,))
    role = args.role or "document"
    with monitored_ranks() as start:
        encoder, _, topology = open_encoder(args, prompts=args.role is not None, given_prompts=prompts, start=start,
                                            multi_vector=True)
        is_first, several = topology.rank == 0, encoder.pooling == "tokens"
        check_token_pooling(args, several=several)
        try:
            if several:
                blocks = encoder.blocks(texts, role, show_progress=is_first)
                raise_on_all_ranks(write_blocks(args.output, blocks, encoder.dim, factor=args.token_pooling or 1,
                                                is_first=is_first))
                return 0
            vectors = encoder.encode(texts, role, show_progress=is_first)
        except EmptyTextError as error:
            raise EmptyTextError(error.row, source_of_text(args.input, error.row), error.text) from None
        raise_on_all_ranks(write_vectors(args.output, vectors) if is_first else None)
    return 0


def check_token_pooling(args: argparse.Namespace, *, several: bool) -> None:
    """Raises ConfigError if --token-pooling has no effect."""
    if args.token_pooling is None:
        return
    given = f"--token-pooling {args.token_pooling}"
    if not several:
        raise ConfigError(f"{given}: {args.model} gives one vector for a text; leave it out", key="--token-pooling")
    if args.role == "query":
        raise ConfigError(f"{given}: queries keep all of their vectors; leave it out, or give --role document",
                          key="--token-pooling")


def write_blocks(output: str, blocks: "Iterable[TextVectors]", dim: int, *, factor: int,
                 is_first: bool) -> UserError | None:
    """Write the vectors of a multi-vector model from the first rank, complete or not at all; the other ranks compute
    their share of every block. The error if they cannot be written."""
    from megatron_embed.evaluation.token_file import write_token_file
    from megatron_embed.evaluation.token_pooling import pool_tokens

    if is_first:
        return write_token_file(output, (pool_tokens(block, factor) for block in blocks), dim)
    for _ in blocks:
        pass
    return None


def write_vectors(output: str, vectors: "Tensor") -> UserError | None:
    """Write [texts, dim] as a .npy file, complete or not at all; the error if it cannot be written."""
    import numpy as np

    return write_atomic("--output", output, lambda file: np.save(file, vectors.numpy()), binary=True)
