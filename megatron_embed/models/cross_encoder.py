"""What a CrossEncoder's files say about how it scores: Sentence Transformers 6.2, and what earlier versions wrote.

A directory with modules.json and `model_type: CrossEncoder` was saved by that library, and all of its files count. Any
other directory counts by its config.json and its tokenizer alone: the library reads no more of it as a cross-encoder.
Nothing that a file names is imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_embed.config.json_file import read_json_file
from megatron_embed.errors import CheckpointError
from megatron_embed.models.families import read_hf_config
from megatron_embed.models.foreign_tables import CONFIG_BLOCK, LOGIT_SCORE
from megatron_embed.names import Activation, HeadKind, MessageFormat

_PLACES = {"Sigmoid": ("torch.nn", "torch.nn.modules", "torch.nn.modules.activation"),
           "Identity": ("torch.nn", "torch.nn.modules", "torch.nn.modules.linear")}
ACTIVATIONS: Mapping[str, Activation] = {
    f"{place}.{name}": "sigmoid" if name == "Sigmoid" else "identity"
    for name, places in _PLACES.items() for place in places}
"""Dotted names of the two activations that are computed."""

_TRANSFORMER_FILES = tuple(f"sentence_{name}_config.json" for name in (
    "bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"))
_NO_LIMIT = 10**9
_OUTPUTS = {"sequence-classification": "scores", "text-generation": "causal_logits"}
_CHAT_FLAGS = ("add_generation_prompt", "enable_thinking")


@dataclass(frozen=True, kw_only=True)
class CrossEncoderFiles:
    """None: the files do not say."""

    is_saved: bool
    """Whether Sentence Transformers saved it as a CrossEncoder."""
    head: HeadKind
    activation: Activation | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    """By name."""
    default_prompt: str | None = None
    """The name of the prompt that every pair gets."""
    max_length: int | None = None
    """Tokens of a pair: what is written, however many positions the model has."""
    message: MessageFormat | None = "auto"
    """How a pair reaches the chat template, if the tokenizer has one; None: it is a pair of texts whatever it has."""
    chat_arguments: dict[str, bool] = field(default_factory=dict)
    """Further variables of the chat template."""
    token_ids: tuple[int, int] | None = None
    """yes_no: ids of the two answers; None: those of yes and no."""
    lower_case: bool = False
    """Every text is lowercased before the tokenizer's own normalization."""
    pad_token_id: int | None = None
    """Of config.json: a decoder's classifier reads its last token that is another one."""

    @property
    def prompt(self) -> str:
        """The text that every pair gets, empty without one."""
        return "" if self.default_prompt is None else self.prompts[self.default_prompt]


def is_saved_cross_encoder(directory: str | Path) -> bool:
    """Whether Sentence Transformers saved the directory as a CrossEncoder."""
    folder = Path(directory)
    return (folder / "modules.json").is_file() and _object(
        folder / "config_sentence_transformers.json").get("model_type") == "CrossEncoder"


def read_cross_encoder(directory: str | Path, config_directory: str | Path | None = None) -> CrossEncoderFiles | None:
    """What the files of a directory say of it as a cross-encoder; None: it is neither a classifier, nor a causal
    language model, nor saved as a CrossEncoder.

    Args:
        config_directory: where config.json lies instead (a PEFT adapter has none).
    Raises:
        CheckpointError: naming file, key and value, for what is not computed, and for broken files.
    """
    folder, base = Path(directory), Path(config_directory or directory)
    config = read_hf_config(base)
    head, saved = _head(config), is_saved_cross_encoder(folder)
    if head is None and not saved:
        return None
    _check_labels(base / "config.json", config, head)
    pad = config.get("pad_token_id")
    pad_token_id = pad if head == "score" and isinstance(pad, int) else None
    if not saved:
        assert head is not None
        return CrossEncoderFiles(is_saved=False, head=head, activation=_activation_of_config(base, config),
                                 max_length=_length(folder / "tokenizer_config.json", "model_max_length"),
                                 pad_token_id=pad_token_id)
    values = _object(folder / "config_sentence_transformers.json")
    prompts, default = _prompts(folder / "config_sentence_transformers.json", values)
    module = _transformer_config(folder)
    transformer_task = _task(module[0], module[1])
    if transformer_task == "sequence-classification" and head != "score":
        raise CheckpointError(f"{base / 'config.json'}: architectures = {config.get('architectures')!r}: modules.json "
                              "makes a classifier of it, and there is none; save the trained classifier's config.json")
    token_ids = _check_modules(folder, transformer_task)
    return CrossEncoderFiles(
        is_saved=True, head="score" if transformer_task == "sequence-classification" else "yes_no", token_ids=token_ids,
        activation=_activation(folder / "config_sentence_transformers.json", "activation_fn",
                               values.get("activation_fn")) or _activation_of_config(base, config),
        prompts=prompts, default_prompt=default, message=_message(*module, transformer_task),
        lower_case=bool(module[1].get("do_lower_case")),
        chat_arguments=_chat_arguments(*module), pad_token_id=pad_token_id,
        max_length=_saved_length(*module) or _length(folder / "tokenizer_config.json", "model_max_length"))


def _object(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where the file does not exist."""
    if not path.is_file():
        return {}
    try:
        values = read_json_file(path)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); fetch the file again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(values).__name__}; fetch the file again")
    return values


def _head(config: Mapping[str, Any]) -> HeadKind | None:
    names = config.get("architectures") or [""]
    if str(names[0]).endswith("ForSequenceClassification"):
        return "score"
    return "yes_no" if str(names[0]).endswith("ForCausalLM") else None


def _check_labels(file: Path, config: Mapping[str, Any], head: str | None) -> None:
    """Refuses a classifier that says that it has several outputs (or none)."""
    if head != "score":
        return
    labels = config.get("id2label")
    said = {"num_labels": config.get("num_labels"), "id2label": len(labels) if isinstance(labels, dict) else None}
    for key, count in said.items():
        if count is not None and count != 1:
            raise CheckpointError(f"{file}: {key} = {config[key]!r}: a classifier of {count} outputs, and a reranker's "
                                  "score is one; take a model with num_labels = 1")


def _activation(file: Path, key: str, value: object) -> Activation | None:
    """Raises CheckpointError for one that is not computed; what the name stands for is never imported."""
    if value is None:
        return None
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise CheckpointError(f"{file}: {key} = {value!r} is no activation that scores can have; write "
                              "torch.nn.modules.activation.Sigmoid or torch.nn.modules.linear.Identity")
    return ACTIVATIONS[value]


def _activation_of_config(base: Path, config: Mapping[str, Any]) -> Activation | None:
    """Of config.json: in the block of versions from 4.0 on, else under the key of earlier ones."""
    block = config.get("sentence_transformers")
    if block is not None and not isinstance(block, dict):
        raise CheckpointError(f"{base / 'config.json'}: sentence_transformers = {block!r}: must be an object; remove "
                              "it, or restore the file")
    CONFIG_BLOCK.check(base / "config.json", block or {})
    if block and "activation_fn" in block:
        return _activation(base / "config.json", "sentence_transformers.activation_fn", block["activation_fn"])
    key = "sbert_ce_default_activation_function"
    return _activation(base / "config.json", key, config.get(key))


def _length(file: Path, key: str) -> int | None:
    """A number of tokens; None where there is none, or Transformers' 1e30, which is none."""
    value = _object(file).get(key)
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _NO_LIMIT:
        return value
    return None


def _prompts(file: Path, values: Mapping[str, Any]) -> tuple[dict[str, str], str | None]:
    """All prompts, and the name of the one that every pair gets."""
    prompts, default = values.get("prompts") or {}, values.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(text is None or isinstance(text, str) for text in prompts.values()):
        raise CheckpointError(f"{file}: prompts = {prompts!r} must map names to texts; correct it")
    if default is not None and default not in prompts:
        raise CheckpointError(f"{file}: default_prompt_name = {default!r} is none of its prompts "
                              f"({', '.join(map(repr, prompts)) or 'there are none'}); correct it, or set it to null")
    return {name: text or "" for name, text in prompts.items()}, default


def _transformer_config(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The settings of the Transformer module: the first of the names it may have that holds some."""
    for name in _TRANSFORMER_FILES:
        values = _object(folder / name)
        if values:
            return folder / name, values
    return folder / _TRANSFORMER_FILES[0], {}


def _task(file: Path, values: Mapping[str, Any]) -> Literal["sequence-classification", "text-generation"]:
    task = values.get("transformer_task", "feature-extraction")
    if task not in _OUTPUTS:
        raise CheckpointError(f"{file}: transformer_task = {task!r}: a cross-encoder whose score is not that of a "
                              "classifier (sequence-classification) or of two words (text-generation) is not supported")
    output = values.get("module_output_name")
    if output is not None and output != _OUTPUTS[task]:
        raise CheckpointError(f"{file}: module_output_name = {output!r} does not go with transformer_task = {task!r}; "
                              f"it must be {_OUTPUTS[task]}")
    return task  # type: ignore[no-any-return]


def _check_modules(folder: Path, transformer_task: str) -> tuple[int, int] | None:
    """Ids of the two answers, of a LogitScore. Raises CheckpointError for modules other than it and Transformer."""
    file = folder / "modules.json"
    try:
        modules = [(str(module["type"]), module["path"]) for module in read_json_file(file)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a list of modules ({error!r}); restore the file from its source") from error
    wanted = ["Transformer"] if transformer_task == "sequence-classification" else ["Transformer", "LogitScore"]
    kinds = [kind.rpartition(".")[2] for kind, _ in modules]
    known = all(kind.startswith("sentence_transformers.") for kind, _ in modules)
    if not known or kinds != wanted or modules[0][1] != "":
        raise CheckpointError(f"{file}: modules {[kind for kind, _ in modules]} are not supported for a cross-encoder "
                              f"with transformer_task = {transformer_task!r}; {' and '.join(wanted)} of Sentence "
                              "Transformers are")
    if transformer_task == "sequence-classification":
        return None
    name = modules[1][1]
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
        raise CheckpointError(f"{file}: path = {name!r} must be the name of a folder beside it; correct it")
    return _answers(folder / name / "config.json")


def _answers(file: Path) -> tuple[int, int]:
    values = _object(file)
    LOGIT_SCORE.check(file, values)
    ids = values.get("true_token_id"), values.get("false_token_id")
    for key, token in zip(("true_token_id", "false_token_id"), ids, strict=True):
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise CheckpointError(f"{file}: {key} = {token!r}: a score is the difference of two tokens' logits; write "
                                  "the token's id")
    return ids  # type: ignore[return-value]


def _message(file: Path, values: Mapping[str, Any], transformer_task: str) -> MessageFormat | None:
    """How pairs reach the chat template; None: they are pairs of texts."""
    modalities = values.get("modality_config")
    if modalities is None:
        return None
    if not isinstance(modalities, dict) or not modalities:
        raise CheckpointError(f"{file}: modality_config = {modalities!r} must map text, or text and message, to how "
                              "they are read; restore the file")
    for name, how in modalities.items():
        given = how if isinstance(how, dict) else {}
        if name not in ("text", "message") or given.get("method") != "forward" or (
                given.get("method_output_name") != "logits"):
            raise CheckpointError(f"{file}: modality_config: {name!r} = {how!r} is not supported; text and message by "
                                  "the method forward, whose output is logits, are")
    if "message" not in modalities:
        return None
    form = modalities["message"].get("format", "auto")
    if form not in ("flat", "structured", "auto"):
        raise CheckpointError(f"{file}: modality_config: format = {form!r}: flat, structured and auto are possible")
    return form  # type: ignore[no-any-return]


def _chat_arguments(file: Path, values: Mapping[str, Any]) -> dict[str, bool]:
    """Variables of the chat template; other arguments of the tokenizer are refused unless they change nothing."""
    given = values.get("processing_kwargs") or {}
    parts = {part: given.get(part) or {} for part in ("chat_template", "text")} if isinstance(given, dict) else {}
    if not parts or not set(given) <= set(parts) or not all(isinstance(part, dict) for part in parts.values()):
        raise CheckpointError(f"{file}: processing_kwargs = {given!r}: only its parts chat_template and text are "
                              "supported; remove the others")
    found = {}
    for key, value in parts["chat_template"].items():
        if key in _CHAT_FLAGS and isinstance(value, bool):
            found[key] = value
        elif (key, value) != ("restore_suffix", True):
            raise CheckpointError(f"{file}: processing_kwargs.chat_template.{key} = {value!r} is not supported; write "
                                  "what it does into the chat template")
    harmless = (("padding", True), ("truncation", True), ("truncation", "longest_first"))
    for key, value in parts["text"].items():
        if key not in ("max_length", "logits_to_keep") and (key, value) not in harmless:
            raise CheckpointError(f"{file}: processing_kwargs.text.{key} = {value!r} is not supported; remove it")
    return found


def _saved_length(file: Path, values: Mapping[str, Any]) -> int | None:
    """Of the module's settings: the tokenizer's argument, its own key, or the processor's."""
    processing = values.get("processing_kwargs") or {}
    processor = values.get("processor_kwargs") or values.get("tokenizer_args") or {}
    for key in ("model_kwargs", "model_args", "config_kwargs", "config_args"):
        if values.get(key):
            raise CheckpointError(f"{file}: {key} = {values[key]!r} is not supported; write it into config.json")
    others = sorted(set(processor) - {"model_max_length"}) if isinstance(processor, dict) else ["processor_kwargs"]
    if others:
        raise CheckpointError(f"{file}: processor_kwargs.{others[0]} is not supported; write it into "
                              "tokenizer_config.json")
    lengths = (("processing_kwargs.text.max_length", (processing.get("text") or {}).get("max_length")),
               ("processor_kwargs.model_max_length", processor.get("model_max_length")),
               ("max_seq_length", values.get("max_seq_length")))
    for key, length in lengths:
        if length is not None:
            if not isinstance(length, int) or isinstance(length, bool) or length < 1:
                raise CheckpointError(f"{file}: {key} = {length!r} must be a number of tokens; correct it")
            return length
    return None
