"""A cross-encoder's chat template converted to a PairTemplate: text with the places {query} and {document}.

CrossEncoder hands a pair over as two messages of the roles `query` and `document`, with a prompt before them as
`system`. The template is rendered with markers, which show where each message ends up, and then with other texts, which
show that it does nothing else to them. A template that cannot be converted is refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_embed.data.chat import takes_structured_content, where_templates_are, why_no_template
from megatron_embed.data.jsonl import shortened
from megatron_embed.data.pair_tokenizer import PLACES, Pair, PairTemplate
from megatron_embed.data.template_limits import try_template
from megatron_embed.errors import CheckpointError, ConfigError

_MARKERS = {"instruction": "7f3aINSTRUCTION9c", "query": "7f3aQUERY9c", "document": "7f3aDOCUMENT9c"}
_PROBES = (("alpha", "bravo"), ("charlie", "bravo"), ("alpha", "foxtrot"), ("", ""), ("  space ", "\n lines \n\n"),
           ("Upper lower", "<b>&amp; \"quotes\" 'single' \\n"), ("{{ query }} {query}", "{% document %} {document}"),
           ("多长？\U0001fa90", "É\u0301 ß"), ("long " * 3000, "longer\r\n" * 3000))
_INSTRUCTIONS = ("judge", " a Longer\ninstruction with {query} ", "é \"quoted\"")


class UnfitTemplateError(CheckpointError):
    """A chat template that does not render a pair: CrossEncoder refuses it, too."""


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template."""
    return tokenizer.chat_template is not None


def pair_template_from_chat(tokenizer: Any, *, message_format: str, arguments: Mapping[str, bool], prompt: str,
                            directory: str) -> PairTemplate:
    """The tokenizer's chat template as a PairTemplate.

    Args:
        tokenizer: one with a chat template.
        message_format: flat, structured, or auto: as the template's text suggests.
        arguments: further variables of the template.
        prompt: the system's message before every pair; empty: there is none.
        directory: of the model, for messages.
    Raises:
        UnfitTemplateError: it does not render query and document, or is none of several with names.
        CheckpointError: it does more to them than to put each into its place.
    """
    if why := why_no_template(tokenizer, directory):
        raise UnfitTemplateError(f"{why}; CrossEncoder cannot choose one either")
    if message_format == "auto":
        _refuse_unknown_format(tokenizer.chat_template, directory)
    structured = message_format == "structured" or (
        message_format == "auto" and takes_structured_content(tokenizer.chat_template))
    chat = _Chat(tokenizer, structured, arguments)
    try_template([lambda text, system=system: chat.render(text, text, system) for system in (None, "0")], directory)
    try:
        plain = chat.render(_MARKERS["query"], _MARKERS["document"], None)
        varied = [chat.render(query, document, None) for query, document in _PROBES[:3]]
    except Exception as error:  # Jinja's own, or what the template raises by itself
        raise _unfit(directory, f"it fails ({shortened(str(error))})") from error
    lost = [role for role, text in zip(("query", "document"), varied[1:], strict=True) if text == varied[0]]
    if lost:
        raise _unfit(directory, f"the {' and the '.join(lost)} does not appear in what it renders")
    try:
        return _checked(chat, plain, prompt, directory)
    except CheckpointError:
        raise
    except Exception as error:
        raise _unfit(directory, f"it fails for some texts ({shortened(str(error))})") from error


def _refuse_unknown_format(template: object, directory: str) -> None:
    """Raises CheckpointError where CrossEncoder does not see that a template takes plain text: it looks into no
    template of several."""
    if isinstance(template, dict) and not takes_structured_content(template["default"]):
        raise CheckpointError(f"{where_templates_are(directory)} gives the tokenizer chat templates by name "
                              f"({', '.join(template)}); of several templates CrossEncoder does not see that default "
                              "takes text, and gives it lists of parts; put the one that is meant alone into "
                              "chat_template.jinja, and remove the others")


class _Chat:
    """Renders pairs as CrossEncoder does."""

    def __init__(self, tokenizer: Any, structured: bool, arguments: Mapping[str, bool]) -> None:
        self._tokenizer, self._structured, self._arguments = tokenizer, structured, arguments

    def render(self, query: str, document: str, system: str | None) -> str:
        """The text that is tokenized."""
        given = [("query", query), ("document", document)]
        messages = [{"role": role, "content": [{"type": "text", "text": text}] if self._structured else text}
                    for role, text in ([("system", system), *given] if system is not None else given)]
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **self._arguments))


def _checked(chat: _Chat, plain: str, prompt: str, directory: str) -> PairTemplate:
    """The template that gives the texts of all probes, with its default instruction or the prompt."""
    bare = _template(plain, "", directory)
    with_system = chat.render(_MARKERS["query"], _MARKERS["document"], _MARKERS["instruction"])
    template = bare
    if with_system != plain:
        default = _default_instruction(plain, with_system)
        if default is not None or prompt:
            template = _template(with_system, prompt or default or "", directory)
    _require(template, chat, [(query, document, None) for query, document in _PROBES], prompt or None, directory)
    if template is not bare:
        query, document = _PROBES[4]
        _require(template, chat, [(query, document, text) for text in _INSTRUCTIONS], None, directory)
    return template


def _template(rendered: str, instruction: str, directory: str) -> PairTemplate:
    """The template of a text with markers."""
    for name in PLACES:
        if "{" + name + "}" in rendered:
            raise _refused(directory, f"its text holds {{{name}}} itself")
    text = rendered
    for name, marker in _MARKERS.items():
        text = text.replace(marker, "{" + name + "}")
    try:
        return PairTemplate(text=text, instruction=instruction)
    except ConfigError as error:
        raise _refused(directory, str(error).partition(": ")[2].partition(";")[0]) from error


def _default_instruction(plain: str, with_system: str) -> str | None:
    """The text in the instruction's place if none is given; None: the renderings differ elsewhere, too."""
    before, marker, after = with_system.partition(_MARKERS["instruction"])
    fits = plain.startswith(before) and plain.endswith(after) and len(plain) >= len(before) + len(after)
    if not marker or not fits:
        return None
    default = plain[len(before):len(plain) - len(after)]
    return None if any(marker in default for marker in _MARKERS.values()) else default


def _require(template: PairTemplate, chat: _Chat, probes: Sequence[tuple[str, str, str | None]], system: str | None,
             directory: str) -> None:
    for query, document, instruction in probes:
        filled = template.fill(Pair(query=query, document=document, instruction=instruction))[0]
        if filled != chat.render(query, document, system if instruction is None else instruction):
            raise _refused(directory, f"it does more to {shortened(query)} and {shortened(document)} than to put "
                                      "them into their places")


def _unfit(directory: str, why: str) -> UnfitTemplateError:
    return UnfitTemplateError(f"{directory}: its chat template does not render the roles query and document ({why}), "
                              "so CrossEncoder cannot use it either; put a chat_template.jinja there that renders both")


def _refused(directory: str, why: str) -> CheckpointError:
    return CheckpointError(f"{directory}: its chat template cannot be used for a reranker here: {why}; put a "
                           "chat_template.jinja there that is plain text around the query, then the document")
