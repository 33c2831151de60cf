"""`encode --model DIR --input FILE.jsonl --output FILE.npy|DIR`"""

import argparse
import os

from megatron_embed.cli.common import add_encoding_arguments, add_model_argument, path, positive_int
from megatron_embed.cli.prompts import add_prompt_arguments
from megatron_embed.errors import ConfigError
from megatron_embed.names import VECTOR_DTYPES
from megatron_embed.parallel.lost_rank import monitored_ranks

HELP = "Encode texts as vectors"
EXAMPLES = ("megatron-embed encode --model runs/a/best --input texts.jsonl --output vectors.npy --role document",
            "megatron-embed encode --model runs/a/best --input corpus.jsonl --output vectors --role document "
            "--output-dtype float16",
            "megatron-embed encode --model runs/a/best --input corpus.jsonl --output bits.npy --role document "
            "--output-dtype ubinary")
PAGE = "docs/evaluation.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("--input", required=True, metavar="FILE.jsonl", type=path,
                        help='Rows {"text": ..., "title"?: ...}; a title is put before its text, as in evaluate')
    parser.add_argument("--output", required=True, metavar="FILE.npy|FILE.npz|DIR", type=path,
                        help="File to write, one row per text; or a directory of such files (shards), for corpora that "
                             "do not fit into memory: a command that was killed resumes with the next shard. Of a "
                             "multi-vector model one row per vector, text after text, and FILE.offsets.npy with the "
                             "first row of each text. Of a sparse model FILE.npz, a matrix in compressed rows for "
                             "scipy.sparse.load_npz, or a directory of them")
    parser.add_argument("--output-dtype", choices=VECTOR_DTYPES, default="float32",
                        help="Type of the numbers in the files (default: float32). int8, uint8: a byte for each "
                             "component, within ranges that are written beside them; binary, ubinary: a bit for each, "
                             "eight in a byte; as Sentence Transformers' quantize_embeddings")
    parser.add_argument("--ranges", metavar="FILE.json|DIR", type=path,
                        help="With int8 or uint8: ranges that an export or `encode` has written (default: the model "
                             "directory's; without those, the smallest and largest values of these vectors)")
    parser.add_argument("--role", choices=("query", "document"),
                        help="Put the prompt of this role before every text (default: no prompt)")
    parser.add_argument("--head", choices=("sparse", "multi_vector"),
                        help="Of a model with joint heads (BGE-M3): write the weights of the tokens that a text "
                             "contains, as of a sparse model, or the tokens' vectors, as of a multi-vector model "
                             "(default: the text's own vector)")
    parser.add_argument("--token-pooling", type=positive_int, metavar="N",
                        help="Of a multi-vector model: keep about one vector in N of every document, means of clusters "
                             "(with --role document)")
    add_prompt_arguments(parser)
    add_encoding_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Write [texts, dim], in the order of the rows; nothing half-written is left behind."""
    from megatron_embed.data.corpus import TextsOnDisk

    texts = TextsOnDisk(args.input, "--input")
    if args.ranges is not None and args.output_dtype not in ("int8", "uint8"):
        raise ConfigError(f"--ranges {args.ranges}: has no effect on --output-dtype {args.output_dtype}; leave it out",
                          key="--ranges")
    folder = os.path.dirname(os.path.abspath(args.output))
    is_file_name = os.path.splitext(args.output)[1] != ""
    if (not (os.path.isdir(folder) and os.access(folder, os.W_OK)) or (os.path.isfile(args.output) != is_file_name
            and os.path.exists(args.output)) or (is_file_name and not args.output.endswith((".npy", ".npz")))):
        raise ConfigError(f"--output {args.output}: must be a .npy or .npz file, or a directory, in a directory that "
                          "exists and is writable", key="--output")
    from megatron_embed.loading.model_directory import open_encoder
    from megatron_embed.loading.prompts import given_prompts
    from megatron_embed.run.encode_command import (
        encode_sparse_vectors,
        encode_to_directory,
        encode_to_file,
        encode_token_vectors,
    )

    prompts = given_prompts(args, () if args.role is None else (args.role,))
    with monitored_ranks() as start:
        encoder, model, _ = open_encoder(args, prompts=args.role is not None, given_prompts=prompts, start=start,
                                         multi_vector=True if args.head is None else "joint")
        kind = {"sparse": "splade", "multi_vector": "tokens"}.get(args.head, encoder.pooling)
        check_options_of_head(args, kind)
        if kind == "splade":
            encode_sparse_vectors(args, texts, encoder)
        elif kind == "tokens":
            encode_token_vectors(args, texts, encoder)
        elif args.output.endswith(".npy"):
            encode_to_file(args, texts, encoder, model)
        else:
            encode_to_directory(args, texts, encoder, model)
    return 0


def check_options_of_head(args: argparse.Namespace, pooling: str) -> None:
    """Raises ConfigError if the model, of one vector per text, of several, or of a sparse one, cannot do what is
    asked."""
    several, sparse = pooling == "tokens", pooling == "splade"
    if args.output.endswith(".npz") != sparse and (args.output.endswith(".npz") or args.output.endswith(".npy")):
        raise ConfigError(f"--output {args.output}: sparse vectors are written as .npz, others as .npy; name a "
                          f"{'.npz' if sparse else '.npy'} file", key="--output")
    given = f"--token-pooling {args.token_pooling}"
    if args.token_pooling is not None and not several:
        raise ConfigError(f"{given}: {args.model} gives one vector for a text; leave it out", key="--token-pooling")
    if args.token_pooling is not None and args.role == "query":
        raise ConfigError(f"{given}: queries keep all of their vectors; leave it out, or give --role document",
                          key="--token-pooling")
    if several and not args.output.endswith(".npy"):
        raise ConfigError(f"--output {args.output}: vectors of a multi-vector model go into one file; name a .npy file",
                          key="--output")
    if (several or sparse) and args.output_dtype != "float32":
        raise ConfigError(f"--output-dtype {args.output_dtype}: vectors of a multi-vector or sparse model are written "
                          "in float32; leave it out", key="--output-dtype")
