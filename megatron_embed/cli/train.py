"""`train CONFIG.yaml [section.key=value ...]`"""

import argparse

from megatron_embed.cli.common import add_overrides

HELP = "train a model; resumes by itself if checkpoint.directory holds a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="the run's configuration")
    add_overrides(parser, "", "section.key=value")


def run(args: argparse.Namespace) -> int:
    """Train; 0 when the last step is done."""
    from megatron_embed.config.load import load_config

    config = load_config(args.config, args.overrides)  # Refused before the libraries are loaded.
    from megatron_embed.cli.training import run_training

    run_training(config)
    return 0
