"""A tokenizer's own chat template, as a cross-encoder uses it, put as the text with places that rerankers are asked by.

CrossEncoder hands a pair over as two messages of the roles `query` and `document`, with a prompt before them as
`system`. What the template makes of marks shows where each of them stands; what it makes of other texts shows that it
does nothing else to them. A template that cannot be put so is refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_embed.data.jsonl import shortened
from megatron_embed.data.pair_tokenizer import PLACES, Pair, PairTemplate
from megatron_embed.errors import CheckpointError, ConfigError

_STRUCTURED = ("content[0]", ".type", "'type'", '"type"', "item.type", "message.content[")
"""In a template that takes content as a list of parts, by which Sentence Transformers tells it."""
_MARKS = {"instruction": "7f3aINSTRUCTION9c", "query": "7f3aQUERY9c", "document": "7f3aDOCUMENT9c"}
_PROBES = (("alpha", "bravo"), ("charlie", "bravo"), ("alpha", "foxtrot"), ("", ""), ("  space ", "\n lines \n\n"),
           ("Upper lower", "<b>&amp; \"quotes\" 'single' \\n"), ("{{ query }} {query}", "{% document %} {document}"),
           ("多长？\U0001fa90", "É\u0301 ß"), ("long " * 3000, "longer\r\n" * 3000))
_INSTRUCTIONS = ("judge", " a Longer\ninstruction with {query} ", "é \"quoted\"")


class UnfitTemplateError(CheckpointError):
    """A chat template that carries no pair: CrossEncoder refuses it, too."""


def has_chat_template(tokenizer: Any) -> bool:
    """Whether pairs can go through a chat template at all."""
    return tokenizer.chat_template is not None


def template_of_chat(tokenizer: Any, *, message_format: str, arguments: Mapping[str, bool], prompt: str,
                     place: str) -> PairTemplate:
    """The tokenizer's chat template as text with places.

    Args:
        tokenizer: that has one.
        message_format: flat, structured, or auto: as the template's text suggests.
        arguments: further variables of the template.
        prompt: of every pair, as the system's message; empty: there is none.
        place: the directory, for messages.
    Raises:
        UnfitTemplateError: it does not carry query and document.
        CheckpointError: it does more to them than to put each into its place.
    """
    structured = message_format == "structured" or (message_format == "auto" and _is_structured(tokenizer))
    chat = _Chat(tokenizer, structured, arguments)
    try:
        plain = chat.render(_MARKS["query"], _MARKS["document"], None)
        varied = [chat.render(query, document, None) for query, document in _PROBES[:3]]
    except Exception as error:  # Jinja's own, or what the template raises by itself
        raise _unfit(place, f"it fails ({shortened(str(error))})") from error
    lost = [role for role, text in zip(("query", "document"), varied[1:], strict=True) if text == varied[0]]
    if lost:
        raise _unfit(place, f"the {' and the '.join(lost)} does not appear in what it renders")
    try:
        return _checked(chat, plain, prompt, place)
    except CheckpointError:
        raise
    except Exception as error:
        raise _unfit(place, f"it fails for some texts ({shortened(str(error))})") from error


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


def _is_structured(tokenizer: Any) -> bool:
    template = tokenizer.chat_template
    return not isinstance(template, str) or not template or any(part in template for part in _STRUCTURED)


def _checked(chat: _Chat, plain: str, prompt: str, place: str) -> PairTemplate:
    """The template that gives the texts of all probes, with its default instruction or the prompt."""
    bare = _template(plain, "", place)
    led = chat.render(_MARKS["query"], _MARKS["document"], _MARKS["instruction"])
    found = bare
    if led != plain:
        default = _default_instruction(plain, led)
        if default is not None or prompt:
            found = _template(led, prompt or default or "", place)
    _require(found, chat, [(query, document, None) for query, document in _PROBES], prompt or None, place)
    if found is not bare:
        query, document = _PROBES[4]
        _require(found, chat, [(query, document, text) for text in _INSTRUCTIONS], None, place)
    return found


def _template(rendered: str, instruction: str, place: str) -> PairTemplate:
    """A text with marks as one with places."""
    for name in PLACES:
        if "{" + name + "}" in rendered:
            raise _refused(place, f"its text holds {{{name}}} itself")
    text = rendered
    for name, mark in _MARKS.items():
        text = text.replace(mark, "{" + name + "}")
    try:
        return PairTemplate(text=text, instruction=instruction)
    except ConfigError as error:
        raise _refused(place, str(error).partition(": ")[2].partition(";")[0]) from error


def _default_instruction(plain: str, led: str) -> str | None:
    """What stands in the instruction's place where none is given; None: more than that place is different."""
    before, mark, after = led.partition(_MARKS["instruction"])
    fits = plain.startswith(before) and plain.endswith(after) and len(plain) >= len(before) + len(after)
    if not mark or not fits:
        return None
    default = plain[len(before):len(plain) - len(after)]
    return None if any(mark in default for mark in _MARKS.values()) else default


def _require(template: PairTemplate, chat: _Chat, probes: Sequence[tuple[str, str, str | None]], system: str | None,
             place: str) -> None:
    for query, document, instruction in probes:
        filled = template.fill(Pair(query=query, document=document, instruction=instruction))[0]
        if filled != chat.render(query, document, system if instruction is None else instruction):
            raise _refused(place, f"it does more to {shortened(query)} and {shortened(document)} than to put them into "
                                  "their places")


def _unfit(place: str, why: str) -> UnfitTemplateError:
    return UnfitTemplateError(f"{place}: its chat template carries no pair of the roles query and document ({why}), so "
                              "CrossEncoder cannot use it either; put a chat_template.jinja there that renders both")


def _refused(place: str, why: str) -> CheckpointError:
    return CheckpointError(f"{place}: its chat template cannot be used for a reranker here: {why}; put a "
                           "chat_template.jinja there that is plain text around the query, then the document")
