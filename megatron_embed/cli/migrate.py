"""`migrate --old VECTORS --new VECTORS|--model DIR --pairs FILE --output MAP`, and `migrate --old VECTORS --map MAP`"""

import argparse

from megatron_embed.cli.common import add_encoding_arguments, path, positive_int, write_output
from megatron_embed.cli.prompts import add_prompt_arguments
from megatron_embed.errors import ConfigError
from megatron_embed.names import MAP_KINDS
from megatron_embed.platform.launcher import process_rank

HELP = "Fit a map from an old model's vectors to a new one's, or bring an index to the new model with it"
EXAMPLES = ("megatron-embed migrate --old index/ --model runs/new/export --pairs corpus.jsonl --output map",
            "megatron-embed migrate --old index/ --map map --output index_new/")
PAGE = "docs/upgrades.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--old", required=True, metavar="FILE.npy|DIR", type=path,
                        help="Vectors of the old model, as `encode --role document` writes them")
    parser.add_argument("--new", metavar="FILE.npy|DIR", type=path,
                        help="Vectors of the same texts by the new model, in the same order")
    parser.add_argument("--model", metavar="DIR", type=path,
                        help="The new model, in place of --new: embeds the texts that are sampled")
    parser.add_argument("--pairs", metavar="FILE.jsonl", type=path,
                        help='With --model: the texts of --old, rows {"text": ..., "title"?: ...} in its order '
                             "(default: the corpus of --data)")
    parser.add_argument("--max-pairs", type=positive_int, metavar="N",
                        help="Number of texts to sample, of which a tenth is held out to choose the map and a tenth to "
                             "measure it (default: 20000)")
    parser.add_argument("--kind", choices=("auto", *MAP_KINDS),
                        help="Kind of the map: a rotation (orthogonal Procrustes), least squares with an offset and a "
                             "ridge, or a small network; auto: the best of them (default: auto)")
    parser.add_argument("--data", metavar="BEIR_DIR", type=path,
                        help="With --model: also measure nDCG@10 of the new model's queries over its corpus, whose "
                             "vectors --old are: embedded by the new model, mapped, and as they are")
    parser.add_argument("--split", help="Name of the qrels file of --data (default: test)")
    parser.add_argument("--map", metavar="MAP", type=path,
                        help="Map all vectors of --old with this map, which `migrate` has written, in place of fitting")
    parser.add_argument("--output", required=True, metavar="DIR", type=path,
                        help="Directory to write: the map, or with --map the mapped vectors")
    add_prompt_arguments(parser)
    add_encoding_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Fit a map and print what is known of it, or write mapped vectors."""
    check_options(args)
    if args.model is None and process_rank() != 0:  # One process does all; the others have nothing to do.
        return 0
    from megatron_embed.run.migrate_command import fit_map, map_vectors

    if args.map is not None:
        map_vectors(args)
        return 0
    report, rank = fit_map(args)
    if rank == 0:
        write_output(report)
    return 0


def check_options(args: argparse.Namespace) -> None:
    """Raises ConfigError for options that do not go together."""
    sources = [name for name in ("new", "model", "map") if vars(args)[name] is not None]
    if len(sources) != 1:
        given = " and ".join(f"--{name}" for name in sources) or "none of them"
        raise ConfigError(f"--old {args.old}: give one of --new, --model and --map ({given}): vectors of the new "
                          "model, the model that embeds them, or a map that was fitted", key="--old")
    needs_model = {"pairs": args.pairs, "data": args.data, "pooling": args.pooling, "max_length": args.max_length,
                   "dtype": args.dtype, "query_prompt": args.query_prompt, "document_prompt": args.document_prompt,
                   "no_normalize": args.no_normalize or None}
    for name, value in needs_model.items():
        if value is not None and args.model is None:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option}: has no effect without --model, the new model; add that, or leave it out",
                              key=option)
    for option, value in (("--kind", args.kind), ("--max-pairs", args.max_pairs)):
        if value is not None and args.map is not None:
            raise ConfigError(f"{option} {value}: has no effect with --map, which is fitted already; leave it out",
                              key=option)
    if args.model is not None and args.pairs is None and args.data is None:
        raise ConfigError(f"--model {args.model}: which texts are the vectors of --old of? Name their file in --pairs",
                          key="--pairs")
    if args.split is not None and args.data is None:
        raise ConfigError(f"--split {args.split}: has no effect without --data; add that, or leave it out",
                          key="--split")
