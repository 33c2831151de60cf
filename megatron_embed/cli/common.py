"""What every command shares: argument groups, logging, and output."""

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_embed.errors import UserError
from megatron_embed.names import MODEL_DTYPES, POOLINGS
from megatron_embed.platform.terminal_text import LogFormatter, guard_records, printable

if TYPE_CHECKING:
    from megatron_embed.config.schema import RunConfig


class Parser(argparse.ArgumentParser):
    """Bad arguments are a UserError like every other bad input: one line, from one rank, exit code 2.

    Attributes:
        rest: name and type of the positional argument that also takes what stands behind options: argparse itself ends
            it at the first one, as in `plan run.yaml --gpus 8 training.micro_batch_size=4`. null: none does.
    """

    rest: tuple[str, Callable[[str], str]] | None = None

    def parse_known_args(self, args: Sequence[str] | None = None,  # type: ignore[override]
                         namespace: argparse.Namespace | None = None) -> tuple[argparse.Namespace, list[str]]:
        namespace, unknown = super().parse_known_args(args, namespace)
        if self.rest is None or any(text.startswith("-") for text in unknown):
            return namespace, unknown
        name, convert = self.rest
        values: dict[str, Any] = vars(namespace)
        try:
            values[name] = [*values[name], *map(convert, unknown)]
        except argparse.ArgumentTypeError as error:
            self.error(str(error))
        return namespace, []

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def setup_logging(rank: int) -> None:
    """Log to stderr: our messages from INFO on at rank 0, warnings from everyone else and every other library."""
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    guard_records()
    logging.getLogger("megatron_embed").setLevel(logging.INFO if rank == 0 else logging.WARNING)


def write_output(text: str) -> None:
    """Write one result line to stdout, at once; nothing else goes there."""
    sys.stdout.write(printable(text) + "\n")
    sys.stdout.flush()


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", type=path,
                        help="Hugging Face or Sentence Transformers directory, or one of our checkpoints")


def add_encoding_arguments(parser: argparse.ArgumentParser) -> None:
    """How texts become vectors; the defaults are what the model directory says."""
    parser.add_argument("--pooling", choices=POOLINGS,
                        help="default: what the directory says")
    parser.add_argument("--max-length", type=positive_int, metavar="TOKENS",
                        help="longest text, special tokens included; default: what the directory says")
    parser.add_argument("--dtype", choices=("auto", *MODEL_DTYPES),
                        help="of the computation; auto: bfloat16 where every rank's GPU or processor has instructions "
                             "for it, else float32; default: what the directory says, else float32")
    parser.add_argument("--no-normalize", action="store_true",
                        help="vectors as the pooling gives them instead of unit length")
    add_overrides(parser, "parallel.", "parallel.KEY=VALUE")


def add_overrides(parser: argparse.ArgumentParser, prefix: str, metavar: str) -> None:
    """Trailing settings, of which only those that begin with `prefix` are taken."""

    def override(text: str) -> str:
        if text.startswith(prefix) and "=" in text:
            return text
        raise argparse.ArgumentTypeError(f"{text!r} is no setting; write {metavar}")

    parser.add_argument("overrides", nargs="*", type=override, metavar=metavar, help="a setting of the configuration")
    assert isinstance(parser, Parser)
    parser.rest = "overrides", override


def add_subdirectory(parser: argparse.ArgumentParser) -> None:
    """For runs of one configuration beside each other; see in_subdirectory."""
    parser.add_argument("--subdirectory", metavar="NAME", type=folder_name,
                        help="write into a folder of this name in checkpoint.directory, logging.directory and "
                             "checkpoint.export_at_end, whichever are set: for runs that share a configuration")


def in_subdirectory(config: "RunConfig", name: str | None) -> "RunConfig":
    """The run with every output directory that it sets one folder deeper; unchanged if `name` is null."""
    if name is None:
        return config

    def deeper(directory: str | None) -> str | None:
        return None if directory is None else os.path.join(directory, name)

    checkpoint = dataclasses.replace(config.checkpoint, directory=deeper(config.checkpoint.directory),
                                     export_at_end=deeper(config.checkpoint.export_at_end))
    logging_section = dataclasses.replace(config.logging, directory=deeper(config.logging.directory))
    return dataclasses.replace(config, checkpoint=checkpoint, logging=logging_section)


def folder_name(text: str) -> str:
    if text in ("", ".", "..") or "/" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a folder")
    return text


def path(text: str) -> str:
    """A path whose `~` the shell left alone, as in --model=~/models/a."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return os.path.expanduser(text)


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)
