"""Settings of a reranker that was not trained here, read from its directory as CrossEncoder reads them."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_embed.data.chat_template import UnfitTemplateError, has_chat_template, pair_template_from_chat
from megatron_embed.data.load_tokenizer import load_tokenizer
from megatron_embed.data.pair_tokenizer import QWEN3_RERANKER_INSTRUCTION, QWEN3_RERANKER_TEMPLATE, PairTemplate
from megatron_embed.errors import CheckpointError
from megatron_embed.loading.model_directory import ModelDirectory
from megatron_embed.models.cross_encoder_settings import CrossEncoderSettings, read_cross_encoder
from megatron_embed.models.heads import is_encoder
from megatron_embed.models.reranker_settings import RerankerSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Inherited:
    """Settings of a model directory as a reranker."""

    settings: RerankerSettings
    says: frozenset[str]
    """Names of the fields that are the directory's own; the others are defaults: of a causal language model, which is
    not a reranker yet, the prompt, and the length where none but that of its positions is written down."""
    foreign_pad: int | None = None
    """The pad token of another library's model, whose classifier reads the last token that is another one. -1: the
    last token. None: the model is ours."""


ALL = frozenset(field.name for field in dataclasses.fields(RerankerSettings))


def inherited(model: ModelDirectory, *, reading: bool, own_template: bool = True) -> Inherited | None:
    """The settings of the directory; None: it is neither a reranker nor a causal language model.

    Args:
        reading: it is to be used as it is; else it is to be trained, and may lack a prompt.
        own_template: its own template counts; else it is not looked at.
    Raises:
        CheckpointError: it says what is not computed, or CrossEncoder could not use it either.
    """
    if model.reranker is not None:
        return Inherited(settings=model.reranker, says=ALL)
    own = model.peft is not None and (model.peft / "modules.json").is_file()
    files = read_cross_encoder(model.peft if own and model.peft is not None else model.hf, model.hf)
    if files is None:
        return None
    tokenizer = load_tokenizer(str(model.hf), None)
    trained, says = files.is_saved or files.head == "score", ALL
    template = None
    if own_template:
        template = _template(files, tokenizer, model, must_fit=trained or (reading and model.shape.family != "qwen3"))
    if isinstance(template, UnfitTemplateError) or (template is None and not trained and not reading):
        if reading:
            logger.warning("%s; Qwen3-Reranker's prompt takes its place", template)
        template = PairTemplate(text=QWEN3_RERANKER_TEMPLATE)
        says -= {"template", "instruction"}
    if not trained and not reading:
        says -= {"head", "true_token", "false_token"}
    if files.activation is None:
        says -= {"activation"}
    limit = model.shape.longest_text
    if not trained or files.max_length is None or files.max_length >= limit:
        says -= {"max_length"}
    true, false = _answers(files, tokenizer, model) if files.is_saved or reading else ("yes", "no")
    return Inherited(
        settings=RerankerSettings(
            head=files.head, template=None if template is None else template.text,
            instruction=QWEN3_RERANKER_INSTRUCTION if template is None else template.instruction,
            true_token=true, false_token=false, activation=files.activation or "sigmoid",
            max_length=min(files.max_length or limit, limit), prompts=files.prompts,
            default_prompt=files.default_prompt, lower_case=files.lower_case),
        says=says, foreign_pad=-1 if files.pad_token_id is None else files.pad_token_id)


def _template(files: CrossEncoderSettings, tokenizer: Any, model: ModelDirectory, *,
              must_fit: bool) -> PairTemplate | UnfitTemplateError | None:
    """The directory's own; None: query and document are a pair of texts. `must_fit`: else the error is given back."""
    if files.message is None:
        return None
    if not has_chat_template(tokenizer):
        if files.is_saved:
            raise CheckpointError(f"{model.hf}: sentence_bert_config.json names the modality message, and the "
                                  "tokenizer has no chat template; put the model's chat_template.jinja there")
        return None
    if is_encoder(model.shape):
        raise CheckpointError(f"{model.hf}: its tokenizer has a chat template, by which CrossEncoder would ask a "
                              f"{model.shape.family} model; remove the template, so that query and document are a pair "
                              "of texts")
    try:
        template = pair_template_from_chat(tokenizer, message_format=files.message, arguments=files.chat_arguments,
                                           prompt=files.prompt, directory=str(model.hf))
    except UnfitTemplateError as error:
        if must_fit:
            raise
        return error
    if tokenizer.truncation_side == "left":
        raise CheckpointError(f"{Path(model.hf) / 'tokenizer_config.json'}: truncation_side = 'left' cuts the chat "
                              "template at its beginning; set it to right")
    return template


def _answers(files: CrossEncoderSettings, tokenizer: Any, model: ModelDirectory) -> tuple[str, str]:
    """The words of a yes_no head, each of which the tokenizer reads as the token that is meant."""
    if files.head != "yes_no":
        return "yes", "no"
    words = []
    for index, word in enumerate(("yes", "no")):
        token = tokenizer.convert_tokens_to_ids(word) if files.token_ids is None else files.token_ids[index]
        unknown = files.token_ids is None and token in (None, tokenizer.unk_token_id)
        words.append(word if unknown else _word_of(tokenizer, int(token), model))
    return words[0], words[1]


def _word_of(tokenizer: Any, token: int, model: ModelDirectory) -> str:
    if token >= len(tokenizer):
        raise CheckpointError(f"{model.hf}: its LogitScore reads the logit of token {token}, and the tokenizer ends at "
                              f"{len(tokenizer) - 1}; correct its config.json")
    for word in (tokenizer.decode([token]), tokenizer.convert_ids_to_tokens(token)):
        if tokenizer(word, add_special_tokens=False).input_ids == [token]:
            return str(word)
    raise CheckpointError(f"{model.hf}: its score is the logit of token {token} "
                          f"({tokenizer.convert_ids_to_tokens(token)!r}), which no text of one token stands for in its "
                          "tokenizer; a reranker's answers must be single tokens")
