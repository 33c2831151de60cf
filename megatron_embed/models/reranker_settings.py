"""reranker.json: a reranker's head, prompt and length, in our checkpoints and exports."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_embed.config.json_file import read_json_file
from megatron_embed.errors import CheckpointError
from megatron_embed.models.families import read_hf_config
from megatron_embed.names import ACTIVATIONS, HEAD_KINDS, Activation, HeadKind

RERANKER_FILE = "reranker.json"
"""Beside config.json, in our checkpoints' hf/ and in exports."""


@dataclass(frozen=True, kw_only=True)
class RerankerSettings:
    """How a query and a document become a reranker's input and score."""

    head: HeadKind
    template: str | None
    """With the fields {instruction}, {query} and {document}; None: query and document are a pair of texts."""
    instruction: str
    true_token: str
    false_token: str
    max_length: int
    """Tokens of a pair, everything included."""
    activation: Activation
    prompts: dict[str, str] = field(default_factory=dict)
    """Prompts of a pair of texts, by name, as CrossEncoder knows them."""
    default_prompt: str | None = None
    """The name of the prompt before every query."""
    lower_case: bool = False
    """Lowercase what is read, unless the tokenizer does so itself."""

    @property
    def prompt(self) -> str:
        """The text before the query of a pair of texts."""
        return "" if self.default_prompt is None or self.template is not None else self.prompts[self.default_prompt]


def read_reranker_settings(directory: str | Path) -> RerankerSettings | None:
    """Contents of `DIRECTORY/reranker.json`, None if there is none. Raises CheckpointError if it is damaged."""
    file = Path(directory) / RERANKER_FILE
    if not file.is_file():
        return None
    try:
        values: dict[str, Any] = read_json_file(file)
        settings = RerankerSettings(**values)
        if settings.head not in HEAD_KINDS or settings.activation not in ACTIVATIONS:
            raise ValueError(f"head = {settings.head!r}, activation = {settings.activation!r}")
        if type(settings.max_length) is not int or not 0 < settings.max_length <= 10**9:
            raise ValueError(f"max_length = {str(settings.max_length)[:40]} is not a whole number from 1 to 10**9")
        _check_types(settings)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: not readable ({error}); restore it, or remove it and set reranker.* again"
                              ) from error
    return settings


def _check_types(settings: RerankerSettings) -> None:
    """Raises ValueError for a value of the wrong type: the file may be somebody else's."""
    prompts = settings.prompts
    good = {
        "template": settings.template is None or isinstance(settings.template, str),
        **{name: isinstance(value, str) for name, value in asdict(settings).items()
           if name in ("instruction", "true_token", "false_token")},
        "prompts": isinstance(prompts, dict) and all(isinstance(text, str) for text in prompts.values()),
        "default_prompt": settings.default_prompt is None or (
            isinstance(prompts, dict) and settings.default_prompt in prompts),
        "lower_case": isinstance(settings.lower_case, bool)}
    for name in (name for name, is_good in good.items() if not is_good):
        raise ValueError(f"{name} = {asdict(settings)[name]!r}")


def write_reranker_settings(directory: str | Path, settings: RerankerSettings) -> None:
    """Write `DIRECTORY/reranker.json`."""
    (Path(directory) / RERANKER_FILE).write_text(
        json.dumps(asdict(settings), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def head_of_architecture(directory: str | Path) -> HeadKind | None:
    """The reranker head that the `architectures` of DIRECTORY/config.json have; None if they have neither."""
    return head_in_config(read_hf_config(directory))


def head_in_config(config: Mapping[str, Any]) -> HeadKind | None:
    """`head_of_architecture` of the contents of a config.json."""
    names = config.get("architectures") or [""]
    if str(names[0]).endswith("ForSequenceClassification"):
        return "score"
    return "yes_no" if str(names[0]).endswith("ForCausalLM") else None
