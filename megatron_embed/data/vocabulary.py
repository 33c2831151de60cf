"""The files of a model directory that hold its tokenizer's vocabulary. Light to import: a run's preflight needs it."""

from pathlib import Path

from megatron_embed.config.json_file import LARGEST_FILE, LARGEST_TOKENIZER
from megatron_embed.errors import CheckpointError, first_line
from megatron_embed.names import MERGES_FILE, VOCABULARY_FILES

_OTHER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
                "chat_template.json")
TEMPLATES_FOLDER = "additional_chat_templates"
"""Folder of the chat templates that have names, all of which Transformers reads."""
_SHOWN = 300
"""Characters of an error of Transformers in a message."""


def has_tokenizer_files(directory: Path) -> bool:
    """Whether a model directory holds a vocabulary; without one Transformers makes an empty tokenizer, silently."""
    return any((directory / name).is_file() for name in VOCABULARY_FILES)


def refuse_large_files(directory: Path) -> None:
    """Raises CheckpointError if a file that Transformers would read whole is too long for a tokenizer's."""
    limits = dict.fromkeys((*VOCABULARY_FILES, MERGES_FILE), LARGEST_TOKENIZER) | dict.fromkeys(
        _OTHER_FILES, LARGEST_FILE)
    named = (directory / TEMPLATES_FOLDER).glob("*.jinja")
    limits |= dict.fromkeys((f"{TEMPLATES_FOLDER}/{file.name}" for file in named), LARGEST_FILE)
    for name, limit in limits.items():
        file = directory / name
        if file.is_file() and file.stat().st_size > limit:
            raise CheckpointError(f"{file}: longer than {limit >> 20} MiB, too long for a tokenizer; fetch it again")


def loading_error(directory: Path, error: Exception) -> CheckpointError:
    """The error to raise if Transformers cannot load a directory's tokenizer: it reads config.json first, and that may
    be the file at fault."""
    from transformers import AutoConfig

    file = directory / "config.json"
    try:
        if file.is_file():
            AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as of_config:  # noqa: BLE001  # what the tokenizer's loading may raise
        if str(of_config) == str(error):
            text = " ".join(str(of_config).split())
            return CheckpointError(f"{file}: Transformers cannot read it: {text[:_SHOWN]}; correct the value, or fetch "
                                   "the file again")
    return CheckpointError(f"{directory}: the tokenizer cannot be loaded: {first_line(error)}; copy tokenizer.json and "
                           "tokenizer_config.json of the model into it")
