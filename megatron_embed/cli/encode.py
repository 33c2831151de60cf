"""`encode --model DIR --input FILE.jsonl --output FILE.npy`"""

import argparse
import os
from typing import TYPE_CHECKING

from megatron_embed.cli.common import add_encoding_arguments, add_model_argument, path
from megatron_embed.cli.prompts import add_prompt_arguments
from megatron_embed.errors import ConfigError, EmptyTextError, UserError
from megatron_embed.parallel.lost_rank import monitored_ranks
from megatron_embed.platform.atomic_file import write_atomic

if TYPE_CHECKING:
    from torch import Tensor

HELP = "Encode texts as vectors"
EXAMPLES = ("megatron-embed encode --model runs/a/best --input texts.jsonl --output vectors.npy --role document",)
PAGE = "docs/evaluation.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("--input", required=True, metavar="FILE.jsonl", type=path,
                        help='Rows {"text": ..., "title"?: ...}; a title is put before its text, as in evaluate')
    parser.add_argument("--output", required=True, metavar="FILE.npy", type=path,
                        help="File to write: float32 vectors, one row per text")
    parser.add_argument("--role", choices=("query", "document"),
                        help="Put the prompt of this role before every text (default: no prompt)")
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
    with monitored_ranks() as start:
        encoder, _, topology = open_encoder(args, prompts=args.role is not None, given_prompts=prompts, start=start)
        try:
            vectors = encoder.encode(texts, args.role or "document", show_progress=topology.rank == 0)
        except EmptyTextError as error:
            raise EmptyTextError(error.row, source_of_text(args.input, error.row), error.text) from None
        raise_on_all_ranks(write_vectors(args.output, vectors) if topology.rank == 0 else None)
    return 0


def write_vectors(output: str, vectors: "Tensor") -> UserError | None:
    """Write [texts, dim] as a .npy file, complete or not at all; the error if it cannot be written."""
    import numpy as np

    return write_atomic("--output", output, lambda file: np.save(file, vectors.numpy()), binary=True)
