"""`megatron-embed convert` under the argument names of Megatron-LM's tools/checkpoint/convert.py.

    python tools/convert_checkpoint.py --model-type GPT --loader llama_mistral --saver core \\
        --load-dir models/qwen3 --save-dir checkpoints/qwen3 --target-tensor-parallel-size 8
    python tools/convert_checkpoint.py --model-type GPT --loader core --saver hf --load-dir runs/qwen3 --save-dir export

The directory decides the direction: a Hugging Face directory becomes a checkpoint, a checkpoint or a training run's
directory becomes a Hugging Face directory. Options without an effect are accepted, and one line says why: a checkpoint
has no parallel sizes, since every layout reads its own share of it, and shapes, dtype and vocabulary come from
config.json. Exit codes as for `megatron-embed`: 0 for success, 2 with a one-line error for an invalid request.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_embed.__main__ import main as megatron_embed
from megatron_embed.cli.common import Parser
from megatron_embed.errors import ConfigError, UserError

MEGATRON_FORMATS = ("core", "mcore", "megatron", "megatron_mcore", "torch_dist")
"""Loaders and savers for checkpoints; every other name means Hugging Face."""
ENCODERS = ("bert", "xlm-roberta", "roberta")
"""Values of config.json's model_type that Megatron calls BERT; the others are GPT."""

LAYOUT = ("the checkpoint has no parallel sizes: every layout reads its own share of it; set parallel.* in the run's "
          "configuration")
FROM_CONFIG = "it is read from config.json"
WITHOUT_USE = {
    "target_tensor_parallel_size": LAYOUT, "target_pipeline_parallel_size": LAYOUT,
    "target_expert_parallel_size": LAYOUT, "target_expert_tensor_parallel_size": LAYOUT, "model_size": FROM_CONFIG,
    "checkpoint_type": FROM_CONFIG, "true_vocab_size": FROM_CONFIG,
    "make_vocab_size_divisible_by": "the vocabulary is stored without padding and padded when a layout loads it",
    "tokenizer_model": "tokenizer files are copied from --load-dir",
    "vocab_file": "tokenizer files are copied from --load-dir",
    "megatron_path": "megatron-core is imported as it is installed",
    "loader_transformer_impl": "local and Transformer Engine layers read the same checkpoint",
    "saver_transformer_impl": "local and Transformer Engine layers read the same checkpoint",
    "max_queue_size": "tensors stream through this one process, at most three at a time",
}
"""Options of Megatron's converter without an effect here -> the reason that is printed."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model-type", choices=("GPT", "BERT"), help="checked against the directory")
    parser.add_argument("--loader", help="checked against the directory: core, or any name for Hugging Face")
    parser.add_argument("--saver", help="checked against the directory: core, or hf")
    parser.add_argument("--load-dir", required=True, metavar="DIR")
    parser.add_argument("--save-dir", required=True, metavar="DIR")
    parser.add_argument("--bf16", action="store_true", help="write bfloat16 weights to a Hugging Face directory")
    parser.add_argument("--no-checking", action="store_true",
                        help="do not load the result with the stock library; tensors are always compared")
    for name, reason in WITHOUT_USE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="X", help=f"accepted without effect: {reason}")
    return parser.parse_args(argv)


def command_of(args: argparse.Namespace) -> list[str]:
    """Equivalent `megatron-embed` arguments. Raises ConfigError if the options contradict the directory."""
    from megatron_embed.convert.checkpoint_directory import is_checkpoint, open_checkpoint
    from megatron_embed.models.families import model_shape

    to_hf = is_checkpoint(args.load_dir)
    content = "a checkpoint of megatron-embed" if to_hf else "not a checkpoint of megatron-embed"
    if args.loader is not None and is_megatron(args.loader) != to_hf:
        raise ConfigError(f"--loader {args.loader} does not fit: --load-dir {args.load_dir} is {content}; give "
                          f"--loader {'core' if to_hf else 'hf'}, or leave it out")
    if args.saver is not None and is_megatron(args.saver) == to_hf:
        raise ConfigError(f"--saver {args.saver} does not fit: --load-dir {args.load_dir} is {content}, which becomes "
                          f"{'a Hugging Face directory: give --saver hf' if to_hf else 'one: give --saver core'}")
    family = model_shape(open_checkpoint(args.load_dir).hf if to_hf else args.load_dir).family
    kind = "BERT" if family in ENCODERS else "GPT"
    if args.model_type not in (None, kind):
        raise ConfigError(f"--model-type {args.model_type} does not fit: {args.load_dir} holds a {family} model; give "
                          f"--model-type {kind}")
    if args.bf16 and not to_hf:
        raise ConfigError("--bf16 is for Hugging Face directories: a checkpoint keeps the dtype of its source; set "
                          "model.dtype in the run's configuration")
    options = [*(["--dtype", "bfloat16"] if args.bf16 else []), *(["--no-compare"] if args.no_checking else [])]
    return ["convert", "megatron-to-hf" if to_hf else "hf-to-megatron", args.load_dir, args.save_dir,
            *(options if to_hf else [])]


def is_megatron(name: str) -> bool:
    return name.removeprefix("loader_").removeprefix("saver_") in MEGATRON_FORMATS


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = parse_arguments(argv)
        command = command_of(args)
    except UserError as error:
        print(f"convert_checkpoint.py: error: {error}", file=sys.stderr)
        return 2
    for name, reason in WITHOUT_USE.items():
        if vars(args)[name] is not None:
            print(f"--{name.replace('_', '-')} {vars(args)[name]} has no effect: {reason}", file=sys.stderr)
    return megatron_embed(command)


if __name__ == "__main__":
    sys.exit(main())
