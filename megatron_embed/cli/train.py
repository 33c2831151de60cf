"""`train CONFIG.yaml [section.key=value ...]`"""

import argparse

from megatron_embed.cli.common import add_overrides, add_subdirectory, write_output
from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.platform.launcher import process_rank

HELP = "Train a model, or resume if checkpoint.directory contains a checkpoint"
EXAMPLES = ("megatron-embed train run.yaml",
            "megatron-embed train run.yaml training.learning_rate=2e-5 --dry-run",
            "launch/torchrun/one_node.sh --nproc-per-node 8 run.yaml")
PAGE = "docs/launching.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="The run's configuration")
    parser.add_argument("--dry-run", action="store_true",
                        help="Check everything that a run checks before its first step, print what it would do (model, "
                             "parameters, layout, batch, rows, steps, evaluations, files), and stop")
    add_subdirectory(parser)
    add_overrides(parser, "", "section.key=value")


def run(args: argparse.Namespace) -> int:
    """Train; 0 when the last step is done. A PreemptedError ends the command with exit code 75."""
    from megatron_embed.config.load import in_subdirectory, load_with_locations

    config, location_of = load_with_locations(args.config, args.overrides)  # Refused before the libraries are loaded.
    config = in_subdirectory(config, args.subdirectory)

    try:
        from megatron_embed.run.environment import set_environment

        set_environment(config)
        if args.dry_run:
            from megatron_embed.run.introduction import dry_run

            if process_rank() == 0:  # All ranks would read the same.
                write_output(dry_run(config))
            return 0
        from megatron_embed.run.assemble import run_training

        run_training(config)
    except (ConfigError, CheckpointError) as error:
        if error.key is None:
            raise
        raise type(error)(f"{location_of(error.key)}: {error}", key=error.key) from error
    return 0
