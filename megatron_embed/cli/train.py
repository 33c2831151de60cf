"""`train CONFIG.yaml [section.key=value ...]`"""

import argparse
from typing import TYPE_CHECKING

from megatron_embed.cli.common import add_overrides, add_subdirectory
from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.platform import cuda_environment

if TYPE_CHECKING:
    from megatron_embed.config.schema import RunConfig

HELP = "Train a model, or resume if checkpoint.directory contains a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="The run's configuration")
    add_subdirectory(parser)
    add_overrides(parser, "", "section.key=value")


def run(args: argparse.Namespace) -> int:
    """Train; 0 when the last step is done. A PreemptedError ends the command with exit code 75."""
    from megatron_embed.config.load import in_subdirectory, load_with_locations

    config, location_of = load_with_locations(args.config, args.overrides)  # Refused before the libraries are loaded.
    config = in_subdirectory(config, args.subdirectory)

    try:
        set_environment(config)
        from megatron_embed.run.assemble import run_training

        run_training(config)
    except (ConfigError, CheckpointError) as error:
        if error.key is None:
            raise
        raise type(error)(f"{location_of(error.key)}: {error}", key=error.key) from error
    return 0


def set_environment(config: "RunConfig") -> None:
    """Set the variables that depend on the run, before CUDA starts. Raises ConfigError if one contradicts it."""
    cuda_environment.set_for_layout(config.parallel.tensor_model_parallel_size, config.parallel.context_parallel_size)
    if config.training.deterministic:
        cuda_environment.set_deterministic()
