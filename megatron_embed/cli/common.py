"""Argument groups and output that the commands share."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from megatron_embed.errors import ConfigError, UserError
from megatron_embed.names import INDEXES, POOLINGS
from megatron_embed.platform.terminal_text import printable

_Entry = TypeVar("_Entry")
_COMMANDS_OF_OTHERS = {
    "sft": "train", "pt": "train", "fit": "train", "finetune": "train", "fine-tune": "train", "run": "train",
    "export": "convert megatron-to-hf", "merge-lora": "convert megatron-to-hf", "infer": "encode", "embed": "encode",
    "predict": "encode", "eval": "evaluate", "test": "evaluate", "deploy": "serve", "app": "serve",
    "config": "init", "tokenize": "data tokenize", "version": "--version"}
"""Commands of other trainers, and what does the same here."""


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError for bad arguments: one line, from one rank, exit code 2.

    Attributes:
        rest: name and type of the positional argument that also takes the values after options. argparse itself ends
            it at the first option, as in `plan run.yaml --gpus 8 training.micro_batch_size=4`. None: there is none.
        takes_settings: whether these are settings of a run, of every section.
    """

    rest: tuple[str, Callable[[str], str]] | None = None
    takes_settings = False

    def parse_known_args(self, args: Sequence[str] | None = None,  # type: ignore[override]
                         namespace: argparse.Namespace | None = None) -> tuple[argparse.Namespace, list[str]]:
        self._refuse_unknown_options(sys.argv[1:] if args is None else args)
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

    def _refuse_unknown_options(self, args: Sequence[str]) -> None:
        """The first unknown option is named; argparse would take its value for one of the positional arguments."""
        if self._subparsers is not None:
            return
        for text, following in zip(args, [*args[1:], ""], strict=False):
            option, _, value = text.partition("=")
            if text == "--":
                return
            if text.startswith("--") and not any(name.startswith(option) for name in self._option_string_actions):
                self.error(self._answer(option, value or following))

    def _answer(self, option: str, value: str) -> str:
        """The message about an unknown option: the argument or setting it is here, or the nearest option."""
        name = option.lstrip("-").replace("-", "_")
        if any(action.dest.removesuffix("s") == name.removesuffix("s") for action in self._get_positional_actions()):
            return f"{option} is not an option, its value stands alone: `{self.prog} {value}`"
        known = [name for name in self._option_string_actions if name.startswith("--")]
        if near := difflib.get_close_matches(option.replace("_", "-"), known, n=1, cutoff=0.75):
            return f"unrecognized arguments: {option}; did you mean {near[0]}?"
        if not self.takes_settings:
            return f"unrecognized arguments: {option}"
        from megatron_embed.config.schema import RunConfig
        from megatron_embed.config.unknown_keys import setting_for_option

        instead = setting_for_option(RunConfig, name)
        return f"unrecognized arguments: {option}; settings have no dashes: {instead}"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = difflib.get_close_matches(str(value), list(map(str, action.choices or ())), n=1)
            if action.dest == "command" and (instead := _COMMANDS_OF_OTHERS.get(str(value), *near[:1])):
                error.message = f"invalid choice: {value!r}; did you mean `{instead}`?"
            raise

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def with_examples(examples: Sequence[str], page: str) -> str:
    """The end of a command's help."""
    return "\n".join(["examples:", *(f"  {example}" for example in examples), "", f"more: {page}"])


def write_output(text: str) -> None:
    """Write one result line to stdout and flush; nothing else is written there."""
    sys.stdout.write(printable(text) + "\n")
    sys.stdout.flush()


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", type=path,
                        help="Hugging Face or Sentence Transformers directory, or a checkpoint of megatron-embed")


def add_encoding_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of encoding texts; their defaults are the model's own settings."""
    parser.add_argument("--pooling", choices=POOLINGS,
                        help="Pooling of token states (default: the model's own setting)")
    parser.add_argument("--max-length", type=positive_int, metavar="TOKENS",
                        help="Maximum number of tokens per text, including special tokens (default: the model's own "
                             "setting)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"),
                        help="Computation dtype; auto: bfloat16 if the GPU or processor of every rank supports it, "
                             "else float32 (default: the model's own setting, else float32)")
    parser.add_argument("--no-normalize", action="store_true", help="Do not L2-normalize the vectors")
    add_overrides(parser, ("parallel.", "model.cpu_matmul="), "parallel.KEY=VALUE")


def add_given_vectors(parser: argparse.ArgumentParser, of_what: str) -> None:
    """Add the options of vectors that `encode` has written, and of the search over them."""
    parser.add_argument("--vectors", metavar="FILE.npy|DIR", type=path,
                        help=f"Vectors of {of_what}, in its order, as `encode --role document` writes them: they are "
                             "read and not computed")
    parser.add_argument("--index", choices=INDEXES,
                        help="With --vectors: flat: exact; ivf, hnsw: approximate, kept beside the vectors and reused "
                             "(default: flat up to 10 million vectors, ivf above)")
    parser.add_argument("--probes", type=positive_int, metavar="N",
                        help="With --index ivf: lists that a query looks into (default: a sixteenth of them, at least "
                             "16)")
    parser.add_argument("--ef-search", type=positive_int, metavar="N",
                        help="With --index hnsw: candidates while a query is answered (default: 128)")


def check_vector_options(args: argparse.Namespace) -> None:
    """Raises ConfigError for an option of the search that would have no effect."""
    for name, needs in (("index", None), ("probes", "ivf"), ("ef_search", "hnsw")):
        value, option = vars(args)[name], f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if args.vectors is None:
            raise ConfigError(f"{option} {value}: searches vectors that are on the disk; write them with "
                              "`megatron-embed encode --output DIR --role document`, and name them: --vectors DIR",
                              key=option)
        if needs is not None and args.index != needs:
            raise ConfigError(f"{option} {value}: has no effect without --index {needs}; add that, or leave it out",
                              key=option)


def add_overrides(parser: argparse.ArgumentParser, prefix: str | tuple[str, ...], metavar: str) -> None:
    """Add the trailing settings, which must begin with `prefix`, or with one of several."""

    def override(text: str) -> str:
        if text.startswith(prefix) and "=" in text:
            return text
        raise argparse.ArgumentTypeError(f"{text!r} is not a setting; write {metavar}")

    settings = parser.add_argument("overrides", nargs="*", type=override, metavar=metavar,
                                   help="Settings that override the configuration")
    settings.required = False  # argparse names it among missing arguments otherwise
    assert isinstance(parser, Parser)
    parser.rest, parser.takes_settings = ("overrides", override), not prefix


def add_subdirectory(parser: argparse.ArgumentParser) -> None:
    """Add the option for several runs of one configuration; see config.load.in_subdirectory."""
    parser.add_argument("--subdirectory", metavar="NAME", type=folder_name,
                        help="Write to subdirectories of this name in checkpoint.directory, logging.directory and "
                             "checkpoint.export_at_end, for several runs of one configuration")


def folder_name(text: str) -> str:
    if text in ("", ".", "..") or "/" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a folder")
    return text


def path(text: str) -> str:
    """A path with `~` expanded, which the shell does not do in --model=~/models/a."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return os.path.expanduser(text)


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def comma_list(text: str, convert: Callable[[str], _Entry]) -> tuple[_Entry, ...]:
    """The entries of a list with commas. Raises ArgumentTypeError for one that is there twice, however it is spelled.

    `convert`: raises ArgumentTypeError for text that is no entry.
    """
    entries: list[_Entry] = []
    for part in text.split(","):
        entry = convert(part.strip())
        if entry in entries:
            raise argparse.ArgumentTypeError(f"{text!r} names {part.strip()} twice; keep one of them")
        entries.append(entry)
    return tuple(entries)
