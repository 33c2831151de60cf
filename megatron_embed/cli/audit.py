"""`audit RUN --step N`"""

import argparse
import json

from megatron_embed.cli.common import add_overrides, path, positive_int, write_output

HELP = ("Replay a step of a run from its checkpoint and compare it with the run's log; exit code 0: equal, 3: "
        "different")
EXAMPLES = ("megatron-embed audit runs/a --step 1200",
            "megatron-embed audit runs/a --step 1200 --dtype float32 --json")
PAGE = "docs/audit.md"
DIFFERENT = 3
"""Exit code of an audit that found a difference."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=path, help="The run's checkpoint.directory or logging.directory")
    parser.add_argument("--step", required=True, type=positive_int, metavar="N", help="Optimizer step, from 1")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"),
                        help="Dtype of the replay (default: the run's); another one needs a wider tolerance")
    parser.add_argument("--json", action="store_true", help="Print the result as one JSON object, with all rows")
    add_overrides(parser, "parallel.", "parallel.KEY=VALUE")


def run(args: argparse.Namespace) -> int:
    """Print the result from rank 0. The exit code is 3 on every rank if the step is not as logged."""
    from megatron_embed.audit.audit import audit
    from megatron_embed.audit.report import as_text, as_values

    result, rank = audit(args)
    if rank == 0:
        write_output(json.dumps(as_values(result)) if args.json else as_text(result))
    return 0 if result.difference is None else DIFFERENT
