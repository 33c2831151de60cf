"""`doctor`, `doctor --config CONFIG.yaml --ranks N`, and `doctor --run DIR`"""

import argparse
import os
import re

from megatron_embed.cli.common import add_overrides, add_subdirectory, path, positive_int, write_output
from megatron_embed.errors import UserError
from megatron_embed.platform.terminal_text import counted

HELP = ("Check this machine: versions, backends, what is missing; with --config, check whether a run can start here; "
        "with --run, name the likely mistake of a run that goes wrong")
EXAMPLES = ("megatron-embed doctor",
            "megatron-embed doctor --config run.yaml --ranks 8",
            "megatron-embed doctor --run runs/a")
PAGE = "docs/troubleshooting.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="CONFIG.yaml",
                        help="Check what this run needs instead: layout, GPUs, model, tokenizer, data, evaluation "
                             "sets, packages, output directories, free disk space")
    parser.add_argument("--run", metavar="DIR", type=path,
                        help="Read the metrics and the configuration of the run in this checkpoint.directory or "
                             "logging.directory, and name what is likely wrong with it; exit code 1 if anything is")
    parser.add_argument("--ranks", type=positive_int, metavar="N", default=1,
                        help="Number of ranks of the run (default: 1)")
    parser.add_argument("--ranks-per-node", type=ranks_of_node, metavar="N",
                        help="Number of ranks on this node, or Slurm's list if nodes differ, such as 8(x2),4 (default: "
                             "--ranks)")
    parser.add_argument("--min-free-gib", type=positive_int, metavar="GIB", default=1,
                        help="Minimum free space on the disks of the output directories, however little the run writes "
                             "(default: 1)")
    add_subdirectory(parser)
    add_overrides(parser, "", "section.key=value")


def ranks_of_node(text: str) -> int:
    """The ranks of this node: a number, or this node's of a list such as `8(x2),4` (SLURM_TASKS_PER_NODE)."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([1-9][0-9]{0,5})(?:\(x([1-9][0-9]{0,5})\))?", part)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r} is neither a number above 0 nor a list such as 8(x2),4")
        counts += [int(match.group(1))] * int(match.group(2) or 1)
    node = os.environ.get("SLURM_NODEID", "")
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else max(counts)


def run(args: argparse.Namespace) -> int:
    """Print the checks; 0 if training can run here, else 1."""
    if args.run is not None:
        return diagnose_run(args)
    from megatron_embed.platform.doctor import report, run_checks

    if args.config is None:
        given = args.overrides[0] if args.overrides else args.subdirectory and f"--subdirectory {args.subdirectory}"
        if given:
            raise UserError(f"{given} is a setting of a configuration; name one with --config")
        checks = run_checks()
    else:
        from megatron_embed.config.load import in_subdirectory, load_config
        from megatron_embed.run.doctor_checks import examine_run

        config = in_subdirectory(load_config(args.config, args.overrides), args.subdirectory)
        checks = examine_run(config, ranks=args.ranks, ranks_per_node=args.ranks_per_node or args.ranks,
                             min_free_gib=args.min_free_gib)
    write_output(report(checks))
    return 1 if any(check.remedy for check in checks) else 0


def diagnose_run(args: argparse.Namespace) -> int:
    """Print the likely mistakes of a run; 0 if there is none, else 1."""
    from megatron_embed.run.diagnosis import mistakes
    from megatron_embed.run.logged_run import read_run

    if args.config is not None or args.overrides:
        raise UserError("--run DIR: the run's own configuration is read; leave --config and settings out")
    log = read_run(args.run)
    named = [f"{name}: {text}" for name, text in mistakes(log)]
    known = f"{counted(len(log.steps), 'logged step')}, {counted(len(log.evaluations), 'evaluation')}"
    write_output("\n".join([*named, f"{counted(len(named), 'likely mistake')} in {args.run} ({known})"]))
    return 1 if named else 0
