"""`data check CONFIG.yaml [section.key=value ...]`, `data check FILE...`, `data tokenize CONFIG.yaml`"""

import argparse
import json
from typing import TYPE_CHECKING

from megatron_embed.cli.columns import add_columns_argument
from megatron_embed.cli.common import Parser, path, positive_int, write_output
from megatron_embed.errors import ConfigError, UserError

if TYPE_CHECKING:
    from megatron_embed.config.schema import RunConfig

HELP = "Check training data before a run (counts, lengths, duplicates, truncation), or tokenize it"
EXAMPLES = ("megatron-embed data check run.yaml",
            "megatron-embed data check train.jsonl --model DIR",
            "megatron-embed data tokenize run.yaml data.token_cache=tokens")
PAGE = "docs/data.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("check", "tokenize"),
                        help="check: read and count every row; tokenize: write the token ids of every row to the "
                             "directory data.token_cache, for the run to look up")
    parser.add_argument("inputs", nargs="+", type=path, metavar="CONFIG.yaml|FILE",
                        help="A run's configuration and section.key=value, or data sets as in data.train")
    assert isinstance(parser, Parser)
    parser.rest = "inputs", path
    parser.add_argument("--model", metavar="DIR", type=path, help="Count tokens of FILEs with this model's tokenizer")
    parser.add_argument("--max-length", type=positive_int, metavar="TOKENS",
                        help="With FILEs: length that texts are truncated to (default: the model's own setting)")
    add_columns_argument(parser, "of FILEs")
    parser.add_argument("--json", action="store_true", help="Print a JSON array instead of text")


def run(args: argparse.Namespace) -> int:
    """Print counts of the data, or write its token ids; the first row that cannot be used is refused with its file and
    line."""
    if args.action == "tokenize":
        return tokenize(args)
    from megatron_embed.data.check import check_records, describe
    from megatron_embed.data.columns import COLUMNS_OPTION
    from megatron_embed.data.dataset import open_records

    config = _config_of(args)
    if _is_config(args) or args.model is not None:
        # Here, because it loads torch and Megatron-Core, which takes seconds.
        from megatron_embed.run.data_check_command import check_with_model

        counts = check_with_model(config, is_run=_is_config(args))
    else:
        counts = check_records(open_records(config.data.files, kind=None, columns_key=COLUMNS_OPTION))
    write_output(json.dumps(counts, ensure_ascii=False) if args.json else "\n".join(map(describe, counts)))
    return 0


def tokenize(args: argparse.Namespace) -> int:
    """Write the token ids of the data to data.token_cache, and print what it holds."""
    if not _is_config(args) or args.json:
        raise UserError(f"data tokenize {args.inputs[0]}: takes a run's configuration (.yaml), which says how the "
                        "texts are tokenized, and no --json")
    config = _config_of(args)
    from megatron_embed.run import tokenize_command

    write_output(tokenize_command.tokenize(config))
    return 0


def _is_config(args: argparse.Namespace) -> bool:
    return bool(args.inputs[0].endswith((".yaml", ".yml")))


def _config_of(args: argparse.Namespace) -> "RunConfig":
    """The run's configuration, or one made from the options."""
    from megatron_embed.config.data import DataConfig, TrainFile
    from megatron_embed.config.load import load_config
    from megatron_embed.config.schema import ModelConfig, RunConfig

    if not _is_config(args):
        files = tuple(TrainFile(path=name, columns=args.columns) for name in args.inputs)
        return RunConfig(model=ModelConfig(path=args.model or "none"), data=DataConfig(
            train=files, query_max_length=args.max_length, document_max_length=args.max_length))
    if args.columns:
        raise UserError(f"--columns: {args.inputs[0]} sets the columns of its data; write them there: data.train: "
                        "[{path: FILE, columns: {COLUMN: FIELD}}]")
    if args.model is not None or args.max_length is not None:
        raise UserError(f"{args.inputs[0]} sets the model and the lengths; leave --model and --max-length out, or "
                        "write model.path=DIR after it")
    config = load_config(args.inputs[0], args.inputs[1:])
    if not config.data.train:
        raise ConfigError("data.train = []: there is nothing to check; add `train: [FILE.jsonl]` under data",
                          key="data.train")
    return config
