"""Settings of Sentence Transformers' module Transformer in a model directory: how a text becomes token vectors.

The file is sentence_bert_config.json; lengths and the end that is cut may be in tokenizer_config.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_embed.config.json_file import read_optional_json_object
from megatron_embed.errors import CheckpointError
from megatron_embed.models.key_table import shown_value
from megatron_embed.models.known_keys import SENTENCE_BERT_CONFIG, TOKENIZER_CONFIG
from megatron_embed.models.modules_json import transformer_settings_files
from megatron_embed.names import ROLES, MessageFormat, TruncationSide

_NO_LIMIT = 10**9
"""Transformers writes 1e30 where a tokenizer has no limit."""


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How the tokenizer's chat template is applied to every text."""

    content: MessageFormat
    """Format of a message's content."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the template, besides the messages."""


def token_limit(value: object) -> int | None:
    """A `model_max_length` in tokens; None if it is missing, or so large that it stands for no limit."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _NO_LIMIT else None


def settings_file(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The first of the module's possible settings files that is not empty, and its contents."""
    files = transformer_settings_files(folder)
    for file in files:
        values = read_optional_json_object(file)
        if values:
            return file, values
    return next((file for file in files if file.is_file()), files[0]), {}


class TransformerSettings:
    """Settings of the Transformer module: how a text becomes token vectors."""

    file: Path
    values: Mapping[str, Any]
    max_length: int | None
    """Tokens, special tokens included; None: no limit."""
    stated_length: int | None
    """The same without the tokenizer's own limit."""
    length_key: str
    """File and key of `max_length`, for messages; empty without one."""
    role_lengths: dict[str, int]
    lower_case: bool
    chat: ChatFormat | None
    adds_eos: bool

    def __init__(self, folder: Path, base: Path | None, *, known: bool, defaults: Mapping[str, Any]) -> None:
        """
        Args:
            folder: of the module's files.
            base: the directory of the tokenizer, if `folder` has none.
            known: there is a modules.json; without one Sentence Transformers ignores its own settings files.
            defaults: values of keys that the module's file lacks.
        Raises:
            CheckpointError: a key that we do not honour, or a broken file.
        """
        self.file, own = settings_file(folder)
        SENTENCE_BERT_CONFIG.check(self.file, own)
        self.values = {**defaults, **own}
        tokenizer_file = folder / "tokenizer_config.json"
        if base is not None and not tokenizer_file.is_file():
            tokenizer_file = base / "tokenizer_config.json"
        tokenizer = read_optional_json_object(tokenizer_file)
        TOKENIZER_CONFIG.check(tokenizer_file, tokenizer)
        self.adds_eos = tokenizer.get("add_eos_token") is True
        # Of both names the library takes the older one.
        loading = self._part("tokenizer_args", "processor_kwargs")
        calling = self._part("processing_kwargs")
        text = calling.get("text") or {}
        self._read_lengths(text, loading)
        if not self.length_key:
            self.max_length = token_limit(tokenizer.get("model_max_length"))
            self.length_key = "" if self.max_length is None else f"{tokenizer_file}: model_max_length"
        self.role_lengths = {}
        for role in ROLES:
            length = self._length(self.values, f"{role}_length", f"{role}_length")
            if length is not None and "max_length" not in text:
                self.role_lengths[role] = length
        self.truncation_side: TruncationSide | None = (
            loading.get("truncation_side") or tokenizer.get("truncation_side"))
        self.lower_case = self.values.get("do_lower_case") is True
        self.chat = self._chat(calling.get("chat_template") or {}) if known else None

    def _read_lengths(self, text: Mapping[str, Any], loading: Mapping[str, Any]) -> None:
        """`stated_length` by the first of the keys that is there, even if its value is not a limit."""
        self.stated_length = self.max_length = None
        self.length_key = ""
        named = "processor_kwargs" if self.values.get("tokenizer_args") is None else "tokenizer_args"
        for name, values, key in (("processing_kwargs.text.", text, "max_length"),
                                  (f"{named}.", loading, "model_max_length")):
            if key in values:
                if values[key] is None:
                    raise CheckpointError(f"{self.file}: {name}{key} = None stands before every other length, and "
                                          "means none; remove the key")
                self._state(values, f"{name}{key}", key)
                return
        if self.values.get("max_seq_length") is not None:
            self._state(self.values, "max_seq_length", "max_seq_length")

    def _state(self, values: Mapping[str, Any], name: str, key: str) -> None:
        self.stated_length = self.max_length = self._length(values, name, key)
        self.length_key = f"{self.file}: {name}"

    def check_embeds(self) -> None:
        """Raises CheckpointError if the module gives logits, which cannot be pooled."""
        for key, expected in (("transformer_task", "feature-extraction"), ("module_output_name", "token_embeddings")):
            value = self.values.get(key)
            if value not in (None, expected):
                raise CheckpointError(f"{self.file}: {key} = {value!r}: must be {expected!r} in an embedding model; "
                                      "correct it")

    def check_gives_logits(self, *, by_default: bool) -> None:
        """Raises CheckpointError unless the module gives logits of the vocabulary; `by_default`: without a key."""
        task = self.values.get("transformer_task", "fill-mask" if by_default else "feature-extraction")
        output = self.values.get("module_output_name")
        if task not in ("fill-mask", "text-generation") or output not in (None, "token_embeddings") or (
                task == "text-generation" and output is None):
            raise CheckpointError(f"{self.file}: transformer_task = {task!r}, module_output_name = {output!r}: must be "
                                  "'fill-mask' or 'text-generation', and 'token_embeddings', before SpladePooling; "
                                  "correct them")
        kept = (self._part("processing_kwargs").get("text") or {}).get("logits_to_keep", 1)
        if task == "text-generation" and kept != 0:
            raise CheckpointError(f"{self.file}: processing_kwargs.text.logits_to_keep = {kept!r}: Sentence "
                                  "Transformers then gives the last token's logits alone; write 0")
        if self.chat is not None:
            raise CheckpointError(f"{self.file}: modality_config with messages is not supported in a sparse model; "
                                  "remove it")

    def _chat(self, variables: object) -> ChatFormat | None:
        kinds = self.values.get("modality_config") or {"text": {}}
        if "message" in kinds:
            if not isinstance(variables, dict):
                raise CheckpointError(f"{self.file}: processing_kwargs.chat_template = {shown_value(variables)} must "
                                      "be a JSON object; correct it")
            for key in ("padding", "truncation", "max_length", "return_tensors", "restore_suffix", "tokenize"):
                if key in variables:
                    raise CheckpointError(f"{self.file}: processing_kwargs.chat_template.{key} = "
                                          f"{shown_value(variables[key])} is not supported: it changes how a text is "
                                          "cut; remove it")
            return ChatFormat(content=(kinds["message"] or {}).get("format", "auto"), variables=variables)
        if "text" not in kinds:
            raise CheckpointError(f"{self.file}: modality_config = {shown_value(kinds)}: the model takes no texts; "
                                  "give one that does")
        return None

    def _part(self, *names: str) -> dict[str, Any]:
        """The value of the first of these keys that is present."""
        return next((self.values[name] for name in names if self.values.get(name) is not None), {})

    def _length(self, values: Mapping[str, Any], name: str, key: str) -> int | None:
        length = values.get(key)
        if length is None:
            return None
        if not isinstance(length, int | float) or isinstance(length, bool) or length < 1 or length != int(length):
            raise CheckpointError(f"{self.file}: {name} = {shown_value(length)} must be a whole number of tokens above "
                                  "0; correct it")
        return int(length) if length < _NO_LIMIT else None
