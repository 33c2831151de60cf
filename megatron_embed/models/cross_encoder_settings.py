"""Settings with which a CrossEncoder scores, read from its files: Sentence Transformers 6.2 and earlier versions.

A directory with modules.json and `model_type: CrossEncoder` was saved by that library, and all of its files are read.
Of any other directory only config.json and the tokenizer are read, as in that library. Nothing that a file names is
imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_embed.config.json_file import read_optional_json_object
from megatron_embed.errors import CheckpointError
from megatron_embed.models.families import read_hf_config
from megatron_embed.models.known_keys import CONFIG_BLOCK, LOGIT_SCORE
from megatron_embed.models.modules_json import read_modules
from megatron_embed.models.reranker_settings import head_in_config
from megatron_embed.models.saved_settings import named_prompts
from megatron_embed.models.transformer_settings import settings_file, token_limit
from megatron_embed.names import MESSAGE_FORMATS, Activation, HeadKind, MessageFormat

ACTIVATION_CLASSES: Mapping[str, Activation] = {
    **{f"{module}.Sigmoid": "sigmoid" for module in ("torch.nn", "torch.nn.modules", "torch.nn.modules.activation")},
    **{f"{module}.Identity": "identity" for module in ("torch.nn", "torch.nn.modules", "torch.nn.modules.linear")}}
"""Dotted class names of the two activations that are computed."""

_OUTPUTS = {"sequence-classification": "scores", "text-generation": "causal_logits"}
_CHAT_FLAGS = ("add_generation_prompt", "enable_thinking")


@dataclass(frozen=True, kw_only=True)
class CrossEncoderSettings:
    """None: the files do not say."""

    is_saved: bool
    """Whether Sentence Transformers saved it as a CrossEncoder."""
    head: HeadKind
    activation: Activation | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    """Texts before a pair, by name."""
    default_prompt: str | None = None
    """The name of the prompt that every pair gets."""
    max_length: int | None = None
    """Tokens of a pair, as written; the model may have fewer positions."""
    message: MessageFormat | None = "auto"
    """Format of the chat message that holds a pair, if the tokenizer has a template; None: no template is applied."""
    chat_arguments: dict[str, bool] = field(default_factory=dict)
    """Additional variables for the chat template."""
    token_ids: tuple[int, int] | None = None
    """yes_no: token ids of the two answers; None: those of yes and no."""
    lower_case: bool = False
    """Every text is lowercased before the tokenizer's own normalization."""
    pad_token_id: int | None = None
    """From config.json: a decoder's classifier reads the last token that differs from it."""

    @property
    def prompt(self) -> str:
        """The text that every pair gets, empty without one."""
        return "" if self.default_prompt is None else self.prompts[self.default_prompt]


def is_saved_cross_encoder(directory: str | Path) -> bool:
    """Whether Sentence Transformers saved the directory as a CrossEncoder."""
    folder = Path(directory)
    return (folder / "modules.json").is_file() and read_optional_json_object(
        folder / "config_sentence_transformers.json").get("model_type") == "CrossEncoder"


def read_cross_encoder(directory: str | Path,
                       config_directory: str | Path | None = None) -> CrossEncoderSettings | None:
    """The settings of a directory as a cross-encoder; None if it is neither a classifier, nor a causal language model,
    nor saved as a CrossEncoder.

    Args:
        config_directory: the directory of config.json, if it is another one (a PEFT adapter has none).
    Raises:
        CheckpointError: naming file, key and value, for what is not computed, and for broken files.
    """
    folder, base = Path(directory), Path(config_directory or directory)
    config = read_hf_config(base)
    head, saved = head_in_config(config), is_saved_cross_encoder(folder)
    if head is None and not saved:
        return None
    _check_labels(base / "config.json", config, head)
    pad = config.get("pad_token_id")
    pad_token_id = pad if head == "score" and isinstance(pad, int) else None
    tokenizer = read_optional_json_object(folder / "tokenizer_config.json")
    tokenizer_length = token_limit(tokenizer.get("model_max_length"))
    if not saved:
        assert head is not None
        return CrossEncoderSettings(is_saved=False, head=head, activation=_activation_of_config(base, config),
                                    max_length=tokenizer_length, pad_token_id=pad_token_id)
    own_file = folder / "config_sentence_transformers.json"
    values = read_optional_json_object(own_file)
    prompts, default = named_prompts(own_file, values)
    module = settings_file(folder)
    transformer_task = _task(*module)
    if transformer_task == "sequence-classification" and head != "score":
        raise CheckpointError(f"{base / 'config.json'}: architectures = {config.get('architectures')!r}: modules.json "
                              "makes a classifier of it, and there is none; save the trained classifier's config.json")
    token_ids = _answer_ids(folder, transformer_task)
    return CrossEncoderSettings(
        is_saved=True, head="score" if transformer_task == "sequence-classification" else "yes_no", token_ids=token_ids,
        activation=_activation(own_file, "activation_fn", values.get("activation_fn"))
        or _activation_of_config(base, config),
        prompts=prompts, default_prompt=default, message=_message_format(*module),
        lower_case=bool(module[1].get("do_lower_case")),
        chat_arguments=_chat_arguments(*module), pad_token_id=pad_token_id,
        max_length=_saved_length(*module) or tokenizer_length)


def _check_labels(file: Path, config: Mapping[str, Any], head: str | None) -> None:
    """Raises CheckpointError for a classifier with several outputs, or none."""
    if head != "score":
        return
    labels = config.get("id2label")
    declared = {"num_labels": config.get("num_labels"), "id2label": len(labels) if isinstance(labels, dict) else None}
    for key, count in declared.items():
        if count is not None and count != 1:
            raise CheckpointError(f"{file}: {key} = {config[key]!r}: a classifier of {count} outputs, and a reranker's "
                                  "score is one; take a model with num_labels = 1")


def _activation(file: Path, key: str, value: object) -> Activation | None:
    """The activation of a class name, which is never imported. Raises CheckpointError if it is not computed."""
    if value is None:
        return None
    if not isinstance(value, str) or value not in ACTIVATION_CLASSES:
        raise CheckpointError(f"{file}: {key} = {value!r} is not a supported activation for scores; write "
                              "torch.nn.modules.activation.Sigmoid or torch.nn.modules.linear.Identity")
    return ACTIVATION_CLASSES[value]


def _activation_of_config(base: Path, config: Mapping[str, Any]) -> Activation | None:
    """The activation in config.json: in the block that versions from 4.0 on write, else under the earlier key."""
    block = config.get("sentence_transformers")
    if block is not None and not isinstance(block, dict):
        raise CheckpointError(f"{base / 'config.json'}: sentence_transformers = {block!r}: must be an object; remove "
                              "it, or restore the file")
    CONFIG_BLOCK.check(base / "config.json", block or {})
    if block and "activation_fn" in block:
        return _activation(base / "config.json", "sentence_transformers.activation_fn", block["activation_fn"])
    key = "sbert_ce_default_activation_function"
    return _activation(base / "config.json", key, config.get(key))


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


def _answer_ids(folder: Path, transformer_task: str) -> tuple[int, int] | None:
    """Token ids of a LogitScore's two answers; None for a classifier, which has no such module.

    Raises:
        CheckpointError: modules other than Transformer and, for text generation, LogitScore.
    """
    file = folder / "modules.json"
    modules = read_modules(file)
    wanted = ["Transformer"] if transformer_task == "sequence-classification" else ["Transformer", "LogitScore"]
    if [module.kind for module in modules] != wanted or modules[0].path:
        raise CheckpointError(f"{file}: modules {[module.type for module in modules]} are not supported for a "
                              f"cross-encoder with transformer_task = {transformer_task!r}; {' and '.join(wanted)} of "
                              "Sentence Transformers are")
    if transformer_task == "sequence-classification":
        return None
    return _logit_score_ids(folder / modules[1].path / "config.json")


def _logit_score_ids(file: Path) -> tuple[int, int]:
    values = read_optional_json_object(file)
    LOGIT_SCORE.check(file, values)
    ids = values.get("true_token_id"), values.get("false_token_id")
    for key, token in zip(("true_token_id", "false_token_id"), ids, strict=True):
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise CheckpointError(f"{file}: {key} = {token!r}: a score is the difference of two tokens' logits; write "
                                  "the token's id")
    return ids  # type: ignore[return-value]


def _message_format(file: Path, values: Mapping[str, Any]) -> MessageFormat | None:
    """Format of the chat message that holds a pair; None: no chat template is applied."""
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
    if form not in MESSAGE_FORMATS:
        raise CheckpointError(f"{file}: modality_config: format = {form!r}: flat, structured and auto are possible")
    return form  # type: ignore[no-any-return]


def _chat_arguments(file: Path, values: Mapping[str, Any]) -> dict[str, bool]:
    """Variables of the chat template. Raises CheckpointError for another tokenizer argument that has an effect."""
    given = values.get("processing_kwargs") or {}
    parts = {part: given.get(part) or {} for part in ("chat_template", "text")} if isinstance(given, dict) else {}
    if not parts or not set(given) <= set(parts) or not all(isinstance(part, dict) for part in parts.values()):
        raise CheckpointError(f"{file}: processing_kwargs = {given!r}: only its parts chat_template and text are "
                              "supported; remove the others")
    variables = {}
    for key, value in parts["chat_template"].items():
        if key in _CHAT_FLAGS and isinstance(value, bool):
            variables[key] = value
        elif (key, value) != ("restore_suffix", True):
            raise CheckpointError(f"{file}: processing_kwargs.chat_template.{key} = {value!r} is not supported; write "
                                  "what it does into the chat template")
    harmless = (("padding", True), ("truncation", True), ("truncation", "longest_first"))
    for key, value in parts["text"].items():
        if key not in ("max_length", "logits_to_keep") and (key, value) not in harmless:
            raise CheckpointError(f"{file}: processing_kwargs.text.{key} = {value!r} is not supported; remove it")
    return variables


def _saved_length(file: Path, values: Mapping[str, Any]) -> int | None:
    """Longest pair in the module's settings: the tokenizer's argument, else the processor's, else max_seq_length."""
    processing = values.get("processing_kwargs") or {}
    # Of both names the library takes the older one.
    older = values.get("tokenizer_args")
    processor = older if older is not None else values.get("processor_kwargs") or {}
    for key in ("model_kwargs", "model_args", "config_kwargs", "config_args"):
        if values.get(key):
            raise CheckpointError(f"{file}: {key} = {values[key]!r} is not supported; write it into config.json")
    others = sorted(set(processor) - {"model_max_length"}) if isinstance(processor, dict) else ["processor_kwargs"]
    if others:
        raise CheckpointError(f"{file}: processor_kwargs.{others[0]} is not supported; write it into "
                              "tokenizer_config.json")
    if processor.get("model_max_length", 0) is None:
        raise CheckpointError(f"{file}: processor_kwargs.model_max_length = None stands before max_seq_length, and "
                              "means no limit; remove the key")
    lengths = (("processing_kwargs.text.max_length", (processing.get("text") or {}).get("max_length")),
               ("processor_kwargs.model_max_length", processor.get("model_max_length")),
               ("max_seq_length", values.get("max_seq_length")))
    for key, length in lengths:
        if length is not None:
            if not isinstance(length, int) or isinstance(length, bool) or length < 1:
                raise CheckpointError(f"{file}: {key} = {length!r} must be a number of tokens; correct it")
            return length
    return None
