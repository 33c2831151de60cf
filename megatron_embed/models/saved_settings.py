"""What a model directory's Sentence Transformers files say about pooling, normalization, prompts and length.

Every key of these files is looked up in foreign_tables.py: nothing that changes the vectors is left out in silence.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_embed.config.data import DEFAULT_LENGTH
from megatron_embed.config.json_file import read_json_file
from megatron_embed.errors import CheckpointError
from megatron_embed.models import st_modules
from megatron_embed.models.families import ModelShape, read_hf_config
from megatron_embed.models.foreign_files import shown_value
from megatron_embed.models.foreign_tables import (
    CONFIG_SENTENCE_TRANSFORMERS,
    NORMALIZE,
    POOLING,
    POOLING_FLAGS,
    SENTENCE_BERT_CONFIG,
    TOKENIZER_CONFIG,
)
from megatron_embed.names import POOLINGS, ROLES, MessageFormat, Pooling, Similarity, TruncationSide

_TRANSFORMER_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"))
"""Names of the settings of the module Transformer; Sentence Transformers reads the first that is there."""

_NO_LIMIT = 10**9
"""Transformers writes 1e30 where a tokenizer has no limit."""

_DOCUMENT_PROMPTS = ("document", "passage", "corpus")
"""Names of the documents' prompt, the first that is there."""


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How every text is put into the tokenizer's chat template."""

    content: MessageFormat
    """A message's content: the text itself, or a list of one part that holds it; auto: as the template looks."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """For the template, beside the messages."""


@dataclass(frozen=True, kw_only=True)
class SavedSettings:
    """None: the directory does not say."""

    pooling: Pooling | None = None
    normalize: bool | None = None
    max_length: int | None = None
    """Tokens, special tokens included: sentence_bert_config.json's, else the tokenizer's."""
    stated_length: int | None = None
    """The same, but for the tokenizer's, which is what it allows and not what the model was trained with."""
    role_lengths: dict[str, int] = field(default_factory=dict)
    """Tokens of the roles `query` and `document`, where one has a length of its own."""
    similarity: Similarity = "cosine"
    prompts: dict[str, str] = field(default_factory=dict)
    """By role; `passage` and `corpus` count as document."""
    named_prompts: dict[str, str] = field(default_factory=dict)
    """All of them, by name."""
    default_prompt_name: str | None = None
    """Of texts without a role."""
    truncation_side: TruncationSide = "right"
    """Where a text that is too long loses its tokens."""
    lower_case: bool = False
    """Every text is lowercased before the tokenizer's own normalization."""
    chat: ChatFormat | None = None
    """Every text is put into the tokenizer's chat template; None: it is tokenized as it is."""
    adds_eos: bool = False
    """tokenizer_config.json asks for an EOS behind every text."""
    dtype: str | None = None
    """Of config.json."""

    @property
    def default_prompt(self) -> str:
        """Of texts without a role."""
        return "" if self.default_prompt_name is None else self.named_prompts.get(self.default_prompt_name, "")

    @property
    def trains_unit_length(self) -> bool:
        """Whether a run that is not told otherwise scales its vectors: all but those that are compared by dot product
        and that no module scales."""
        return self.normalize is not False or self.similarity == "cosine"


def default_pooling(shape: ModelShape) -> Pooling:
    """Of a directory that does not say how it pools: the mean where every token sees the whole text, else the last."""
    return "mean" if shape.bidirectional else "lasttoken"


def trained_lengths(saved: SavedSettings, longest: int, by_role: Mapping[str, int]) -> dict[str, int]:
    """Tokens of `query` and `document` that a model was trained with; 512 where nothing says how many.

    Args:
        longest: the model's positions.
        by_role: of a checkpoint of ours, which knows.
    """
    return {role: min(by_role.get(role) or saved.role_lengths.get(role) or saved.stated_length or DEFAULT_LENGTH,
                      longest) for role in ROLES}


def _json(path: Path) -> Any:
    try:
        return read_json_file(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); fetch the file again") from error


def _object(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where the file does not exist."""
    if not path.is_file():
        return {}
    values = _json(path)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(values).__name__}; fetch the file again")
    return values


def read_modules(directory: Path) -> list[tuple[str, str]]:
    """(class, folder) of each module that `modules.json` names, the transformer first; empty without the file.

    Raises:
        CheckpointError: a module that we do not compute, another order, or a broken file.
    """
    path = directory / "modules.json"
    if not path.is_file():
        return []
    modules: list[tuple[str, str]] = []
    for module in st_modules.read_modules(path):
        if module.kind is None:
            raise CheckpointError(f"{path}: module {module.type!r} is not supported; Transformer, Pooling and "
                                  "Normalize of Sentence Transformers are, under its own full names")
        if module.kind == "Transformer" and module.path:
            raise CheckpointError(f"{path}: path = {module.path!r}: a transformer in a folder of its own is not "
                                  "supported; move the files of that folder up beside modules.json, and write path "
                                  "= ''")
        if module.kind != "Dropout":  # which does nothing outside training
            modules.append((module.kind, module.path))
    order = [kind for kind, _ in modules]
    if order not in (["Transformer"], ["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"],
                     ["Transformer", "LogitScore"]):
        raise CheckpointError(f"{path}: the modules {', '.join(order) or '(none)'} are not supported in this order; "
                              "Transformer, Pooling and perhaps Normalize are")
    return modules


def _pooling(path: Path) -> tuple[Pooling, bool]:
    """The one pooling that a 1_Pooling/config.json switches on, in either spelling, and whether it takes the prompt."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, and modules.json names it; fetch it into its folder")
    config = _object(path)
    if config.get("pooling_mode") is None:
        active = [name for flag, name in POOLING_FLAGS.items() if config.get(flag)]
        POOLING.check(path, config)
        active = active or ["mean"]  # as the library has it
    else:
        mode = config["pooling_mode"]
        active = mode if isinstance(mode, list) else [mode]
        # The library then reads none of the older flags.
        POOLING.check(path, {key: value for key, value in config.items() if not key.startswith("pooling_mode_")})
    if len(active) != 1 or active[0] not in POOLINGS:
        raise CheckpointError(f"{path}: pooling {active} is not supported; one of {', '.join(POOLINGS)} is")
    return active[0], config.get("include_prompt") is not False


def read_saved_settings(directory: str | Path, base: Path | None = None) -> SavedSettings:
    """Settings of a Hugging Face or Sentence Transformers directory.

    Args:
        base: where config.json lies instead (a PEFT adapter has none), and the tokenizer, if it lies there alone.
    Raises:
        CheckpointError: a key, module or pooling that we do not compute, or a broken file.
    """
    folder = Path(directory)
    modules = read_modules(folder)
    hf = read_hf_config(base or folder)
    dtype = hf.get("dtype") or hf.get("torch_dtype")
    transformer = _Transformer(folder, base, known=bool(modules))
    common: dict[str, Any] = {"dtype": dtype if isinstance(dtype, str) else None, "adds_eos": transformer.adds_eos,
                              "max_length": transformer.max_length, "stated_length": transformer.stated_length,
                              "truncation_side": transformer.truncation_side}
    if not modules:
        return SavedSettings(**common)
    pooling, include_prompt, normalize = None, True, False
    for kind, path in modules:
        if kind == "Pooling":
            pooling, include_prompt = _pooling(folder / path / "config.json")
        elif kind == "Normalize":
            NORMALIZE.check(folder / path / "config.json", _object(folder / path / "config.json"))
            normalize = True
    if pooling is not None:
        transformer.check_embeds()
    file = folder / "config_sentence_transformers.json"
    settings = _object(file)
    CONFIG_SENTENCE_TRANSFORMERS.check(file, settings)
    named, default = _prompts(file, settings)
    prompts = _by_role(named)
    if not include_prompt and any([*prompts.values(), named.get(default or "")]):
        raise CheckpointError(f"{folder}: include_prompt = false in its pooling is not supported together with "
                              "prompts; set it to true, or empty the prompts in config_sentence_transformers.json")
    similarity: Similarity = (
        "dot" if settings.get("similarity_fn_name") in ("dot", "dot_product") else "cosine")
    return SavedSettings(
        pooling=pooling, normalize=normalize, prompts=prompts, named_prompts=named, default_prompt_name=default,
        similarity=similarity, role_lengths=transformer.role_lengths, lower_case=transformer.lower_case,
        chat=transformer.chat, **common)


def _prompts(file: Path, settings: dict[str, Any]) -> tuple[dict[str, str], str | None]:
    """The prompts by name, and the name of the one for texts without a role."""
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise CheckpointError(f"{file}: prompts = {shown_value(prompts)} must map names to texts; correct it")
    default = settings.get("default_prompt_name")
    if default not in (None, "query", "document", *prompts):
        raise CheckpointError(f"{file}: default_prompt_name = {shown_value(default)} is none of the prompts "
                              f"{', '.join(prompts) or '(none)'}; correct it")
    return {name: text or "" for name, text in prompts.items()}, default


def _by_role(prompts: dict[str, str]) -> dict[str, str]:
    """Those of queries and of documents, where there are any."""
    names = {"query": "query" if "query" in prompts else None,
             "document": next((name for name in _DOCUMENT_PROMPTS if name in prompts), None)}
    return {role: prompts[name] for role, name in names.items() if name is not None}


class _Transformer:
    """What a directory says about the way from a text to its token vectors."""

    max_length: int | None
    stated_length: int | None
    role_lengths: dict[str, int]
    lower_case: bool
    chat: ChatFormat | None
    adds_eos: bool

    def __init__(self, folder: Path, base: Path | None, *, known: bool) -> None:
        """`known`: there is a modules.json; without one Sentence Transformers reads no settings of its own."""
        self.file = next((folder / name for name in _TRANSFORMER_FILES if (folder / name).is_file()),
                         folder / _TRANSFORMER_FILES[0])
        self.values = _object(self.file)
        SENTENCE_BERT_CONFIG.check(self.file, self.values)
        tokenizer_file = folder / "tokenizer_config.json"
        if base is not None and not tokenizer_file.is_file():
            tokenizer_file = base / "tokenizer_config.json"
        tokenizer = _object(tokenizer_file)
        TOKENIZER_CONFIG.check(tokenizer_file, tokenizer)
        self.adds_eos = tokenizer.get("add_eos_token") is True
        loading = self._part("processor_kwargs", "tokenizer_args")
        calling = self._part("processing_kwargs")
        text = calling.get("text") or {}
        whole = self._length(text, "processing_kwargs.text.max_length", "max_length")
        self.stated_length = (whole or self._length(loading, "processor_kwargs.model_max_length", "model_max_length")
                              or self._length(self.values, "max_seq_length", "max_seq_length"))
        length = tokenizer.get("model_max_length")
        allowed = length if isinstance(length, int) and 0 < length < _NO_LIMIT else None
        self.max_length = self.stated_length or allowed
        self.role_lengths = {}
        for role in ROLES:
            length = self._length(self.values, f"{role}_length", f"{role}_length")
            if length is not None and whole is None:
                self.role_lengths[role] = length
        self.truncation_side: TruncationSide = (
            loading.get("truncation_side") or tokenizer.get("truncation_side") or "right")
        self.lower_case = self.values.get("do_lower_case") is True
        self.chat = self._chat(calling.get("chat_template") or {}) if known else None

    def check_embeds(self) -> None:
        """Raises CheckpointError where the module gives logits, which no pooling takes."""
        task, output = self.values.get("transformer_task"), self.values.get("module_output_name")
        for key, value, right in (("transformer_task", task, "feature-extraction"),
                                  ("module_output_name", output, "token_embeddings")):
            if value not in (None, right):
                raise CheckpointError(f"{self.file}: {key} = {value!r}: an embedding model's is {right!r}; correct it")

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
        """The object of the first of these keys that is there."""
        return next((self.values[name] for name in names if self.values.get(name) is not None), {})

    def _length(self, values: dict[str, Any], name: str, key: str) -> int | None:
        length = values.get(key)
        if length is None:
            return None
        if not isinstance(length, int | float) or isinstance(length, bool) or length < 1 or length != int(length):
            raise CheckpointError(f"{self.file}: {name} = {shown_value(length)} must be a whole number of tokens above "
                                  "0; correct it")
        return int(length) if length < _NO_LIMIT else None
