"""`train CONFIG.yaml [section.key=value ...]`"""

import argparse
import re

from megatron_embed.cli.common import add_overrides, add_subdirectory, in_subdirectory
from megatron_embed.errors import CheckpointError, ConfigError

HELP = "train a model; resumes by itself if checkpoint.directory holds a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="the run's configuration")
    add_subdirectory(parser)
    add_overrides(parser, "", "section.key=value")


def run(args: argparse.Namespace) -> int:
    """Train; 0 when the last step is done. A PreemptedError ends the command with exit code 75."""
    from megatron_embed.config.load import load_with_places

    config, place_of = load_with_places(args.config, args.overrides)  # Refused before the libraries are loaded.
    config = in_subdirectory(config, args.subdirectory)
    from megatron_embed.run.assemble import run_training

    try:
        run_training(config)
    except (ConfigError, CheckpointError) as error:
        key, equals, _ = str(error).partition(" = ")
        if equals and re.fullmatch(r"[a-z_]+\.[a-z_]+", key):
            raise type(error)(f"{place_of(key)}: {error}") from error
        raise
    return 0
