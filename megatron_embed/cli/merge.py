"""`merge --method linear|slerp|multi_slerp|task_arithmetic MODEL... --output DIR`"""

import argparse

from megatron_embed.cli.common import path, write_output
from megatron_embed.names import MERGE_METHODS

HELP = "Merge several trained models into one, tensor by tensor"
EXAMPLES = ("megatron-embed merge --method slerp export/a export/b --output merged",)
PAGE = "docs/merging.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", type=path,
                        help="Hugging Face or Sentence Transformers directories of one architecture")
    parser.add_argument("--method", required=True, choices=MERGE_METHODS,
                        help="Mean of the weights, point on the arc between them, the same for more than two, or sum "
                             "of differences from --base")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W",
                        help="Weights, one per model (default: all equal; task_arithmetic: 1 each)")
    parser.add_argument("--base", metavar="DIR", type=path,
                        help="Model before training: required by task_arithmetic, optional for multi_slerp")
    parser.add_argument("--output", required=True, metavar="DIR", type=path, help="Directory to create")


def run(args: argparse.Namespace) -> int:
    """Merge in this one process and print the report."""
    from megatron_embed.convert.merge import merge_models

    report = merge_models(args.models, args.output, method=args.method, weights=args.weights, base=args.base)
    write_output(str(report))
    return 0
