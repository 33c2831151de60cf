"""A Hugging Face directory of a reranker made into one that CrossEncoder and the servers load without flags.

Two kinds. `*ForSequenceClassification` with one output: for vLLM, SGLang and Infinity as well. `*ForCausalLM`: for
Sentence Transformers, which takes the difference of two logits (LogitScore). A decoder's prompt is laid down as a chat
template with the roles `query` and `document` (and `system`: the instruction), because that is how both of them hand a
pair over; plain ChatML would render it to nothing.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_embed.config.json_file import read_json_object, read_optional_json_object
from megatron_embed.convert.checkpoint_directory import drop_standard_modules, write_json
from megatron_embed.convert.head_tensors import architecture
from megatron_embed.export.sentence_transformers import complete_tokenizer, library_versions, load_export_tokenizer
from megatron_embed.models.reranker_settings import RerankerSettings

_CHAT_TEMPLATE = "chat_template.jinja"
_LOGIT_SCORE = "1_LogitScore"
_ACTIVATIONS = {"sigmoid": "torch.nn.modules.activation.Sigmoid", "identity": "torch.nn.modules.linear.Identity"}
_MODULES = {"Transformer": "sentence_transformers.base.modules.transformer.Transformer",
            "LogitScore": "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"}


def export_cross_encoder(directory: str | Path, settings: RerankerSettings, *, family: str, encoder: bool,
                         classification: bool, pieces: Sequence[str] | None,
                         token_ids: tuple[int, int] | None) -> None:
    """Add to a Hugging Face directory, in place, what makes it a cross-encoder.

    Args:
        directory: holds config.json, weights and tokenizer; its former module files are replaced.
        settings: how the reranker is asked.
        family: `model_type` of config.json.
        encoder: the family is one of encoders.
        classification: *ForSequenceClassification; else *ForCausalLM.
        pieces: the prompt: literal, place, literal, ... (data.pairs.PairTemplate.pieces); None: query and document are
            a pair of texts, whatever chat template the tokenizer has.
        token_ids: of yes and no; needed for *ForCausalLM.
    Raises:
        CheckpointError: the tokenizer cannot be loaded, or the family has no such class.
    """
    directory = Path(directory)
    complete_tokenizer(directory, needs_eos=False)
    drop_standard_modules(directory)
    _write_config(directory, family, classification, settings.activation, prompted=pieces is not None)
    if pieces is not None:
        (directory / _CHAT_TEMPLATE).write_text(chat_template(pieces, settings.instruction), encoding="utf-8")
        _drop_other_templates(directory)
    _write_modules(directory, token_ids, settings.max_length, classification=classification, chat=pieces is not None,
                   lower_case=settings.lower_case)
    write_json(directory / "config_sentence_transformers.json", {
        "__version__": library_versions(), "model_type": "CrossEncoder",
        "activation_fn": _ACTIVATIONS[settings.activation], "prompts": settings.prompts,
        "default_prompt_name": settings.default_prompt if settings.template is None else None})


def _write_modules(directory: Path, token_ids: tuple[int, int] | None, max_length: int, *, classification: bool,
                   chat: bool, lower_case: bool) -> None:
    """modules.json and the settings of each module. `chat`: pairs go through the tokenizer's chat template."""
    output = "scores" if classification else "causal_logits"
    modality: dict[str, Any] = {"method": "forward", "method_output_name": "logits"}
    modalities = {"text": modality}
    if chat:
        modalities["message"] = {**modality, "format": "flat"}
    write_json(directory / "sentence_bert_config.json", {
        "transformer_task": "sequence-classification" if classification else "text-generation",
        "modality_config": modalities, "module_output_name": output, "max_seq_length": max_length,
        **({"do_lower_case": True} if lower_case else {})})
    modules = [("", "Transformer")]
    if not classification:
        assert token_ids is not None
        modules.append((_LOGIT_SCORE, "LogitScore"))
        (directory / _LOGIT_SCORE).mkdir()
        write_json(directory / _LOGIT_SCORE / "config.json", {
            "true_token_id": token_ids[0], "false_token_id": token_ids[1], "module_input_name": output})
    write_json(directory / "modules.json", [
        {"idx": index, "name": str(index), "path": path, "type": _MODULES[kind]}
        for index, (path, kind) in enumerate(modules)])


def chat_template(pieces: Sequence[str], instruction: str) -> str:
    """A Jinja template that renders messages of the roles query and document (and system) to the prompt, exactly.

    One expression, so that no rule about white space and line ends of the engine changes a character.
    """
    values = {"query": _content("query"), "document": _content("document"),
              "instruction": f'({_content("system")} if {_OF_ROLE % "system"} else {_literal(instruction)})'}
    parts = [values[piece] if index % 2 else _literal(piece) for index, piece in enumerate(pieces)]
    return "{{ " + " ~ ".join(part for part in parts if part != _literal("")) + " }}"


_OF_ROLE = "(messages | selectattr('role', 'equalto', '%s') | list)"


def _content(role: str) -> str:
    return f"({_OF_ROLE % role} | first).content"


def _literal(text: str) -> str:
    """A Jinja string; JSON's escapes are among its own, and braces are no delimiters inside of it."""
    return json.dumps(text, ensure_ascii=False)


def _write_config(directory: Path, family: str, classification: bool, activation: str, *, prompted: bool) -> None:
    """Class, one output, and what servers look for, into config.json."""
    config = read_json_object(directory / "config.json")
    for key in ("sbert_ce_default_activation_function", "sentence_transformers"):
        config.pop(key, None)  # the activation that the model came with
    config["architectures"] = [architecture(family, "ForSequenceClassification" if classification else "ForCausalLM")]
    if classification:
        tokenizer = load_export_tokenizer(directory)
        # One label: Infinity serves a model of fewer than two as a reranker. The pad id: Transformers finds a decoder's
        # last token by it, and refuses batches without.
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": tokenizer.pad_token_id,
                   "sentence_transformers": {"activation_fn": _ACTIVATIONS[activation],
                                             "version": library_versions()["sentence_transformers"]}}
        config["num_labels"] = 1
        config.pop("use_sep_token", None)
        if prompted:  # vLLM tokenizes query and document as one text, else as a pair
            config["use_sep_token"] = False
    write_json(directory / "config.json", config)


def _drop_other_templates(directory: Path) -> None:
    """No other template may win over the one just written."""
    shutil.rmtree(directory / "additional_chat_templates", ignore_errors=True)
    (directory / "chat_template.json").unlink(missing_ok=True)
    file = directory / "tokenizer_config.json"
    values = read_optional_json_object(file)
    if values.pop("chat_template", None) is not None:
        write_json(file, values)
