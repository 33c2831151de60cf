"""A text put into the tokenizer's chat template, as Sentence Transformers does for a chat model."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_embed.data.template_limits import refuse_long, try_template
from megatron_embed.data.vocabulary import TEMPLATES_FOLDER
from megatron_embed.errors import CheckpointError, first_line
from megatron_embed.names import MessageFormat

_STRUCTURED_SIGNS = ("content[0]", ".type", "'type'", '"type"', "item.type", "message.content[")
"""By one of these Sentence Transformers tells a template that takes a message's content as a list of parts."""


def takes_structured_content(template: object) -> bool:
    """Whether a tokenizer's chat template takes a message's content as a list of parts, not as text."""
    return not isinstance(template, str) or not template or any(sign in template for sign in _STRUCTURED_SIGNS)


def why_no_template(tokenizer: Any, directory: str) -> str | None:
    """Why a tokenizer with chat templates of several names has none that is taken; None if it has one.

    Args:
        directory: of the model.
    """
    templates = tokenizer.chat_template
    if not isinstance(templates, dict) or "default" in templates:
        return None
    return (f"{where_templates_are(directory)} gives the tokenizer chat templates by name ({', '.join(templates)}), "
            "and none of them is called default, so none is taken; put the one that is meant alone into "
            "chat_template.jinja, and remove the others")


def where_templates_are(directory: str) -> str:
    """The folder, or the file and key, that chat templates with names come from."""
    folder = Path(directory) / TEMPLATES_FOLDER
    return str(folder) if any(folder.glob("*.jinja")) else f"{Path(directory) / 'tokenizer_config.json'}: chat_template"


class ChatTemplate:
    """A tokenizer's chat template, filled with a text as the user's message and its prompt as the system's.

    Args:
        tokenizer: a loaded one, with a chat template.
        model_dir: its directory, for messages.
        content: flat: a message's content is the text; structured: a list of one part that holds it; auto: whichever
            the template takes.
        variables: for the template, beside the messages.
        tell_role: whether the template gets, as `task`, whether the text is a query or a document.
    Raises:
        CheckpointError: the tokenizer has none, several of which none is meant, or one that takes too much time or
            memory.
    """

    def __init__(self, tokenizer: Any, model_dir: str, *, content: MessageFormat,
                 variables: Mapping[str, Any], tell_role: bool) -> None:
        self._tokenizer, self._model_dir, self._variables = tokenizer, model_dir, variables
        self._tell_role = tell_role and "task" not in variables
        template = tokenizer.chat_template
        if not template:
            raise CheckpointError(f"{model_dir}: sentence_bert_config.json has the modality message, and its tokenizer "
                                  "has no chat template; fetch chat_template.jinja, or remove the modality if the "
                                  "model was trained without it")
        if why := why_no_template(tokenizer, model_dir):
            raise CheckpointError(why)
        if content == "auto":
            content = "structured" if takes_structured_content(template) else "flat"
        self._structured = content == "structured"
        self._suffixes: dict[tuple[str, str], list[int]] = {}
        # Every message that it is given is a user's text, with a prompt before it or without.
        try_template([functools.partial(self._rendered, prompt, role=role) for prompt in ("", "0")
                      for role in (("query", "document") if self._tell_role else ("",))], model_dir)

    def fill(self, prompt: str, text: str, role: str) -> str:
        """The template with the text in it. Raises CheckpointError if the template does not take these messages."""
        try:
            rendered = self._rendered(prompt, text, role=role)
        except Exception as error:  # a template may raise anything
            what = "a message of the system, which the prompt is, and one of the user" if prompt else "a user's message"
            raise CheckpointError(f"{self._model_dir}: its chat template does not take {what} "
                                  f"({first_line(error)}); correct chat_template.jinja, or remove the modality "
                                  "message from sentence_bert_config.json if the model was trained without it"
                                  )  from error
        return refuse_long(rendered, len(prompt) + len(text), self._model_dir)

    def _rendered(self, prompt: str, text: str, *, role: str) -> str:
        messages = [{"role": "system", "content": self._content(prompt)}] if prompt else []
        messages.append({"role": "user", "content": self._content(text)})
        variables = {**({"task": role} if self._tell_role else {}), **self._variables}
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **variables))

    def suffix(self, prompt: str, role: str) -> list[int]:
        """Tokens that the template puts behind every text; empty if it puts none, or forgets the text."""
        if (prompt, role) not in self._suffixes:
            # As Sentence Transformers finds them: the common end of two different texts.
            first, second = (self._ids(self.fill(prompt, text, role)) for text in ("0", "1 2 3 4"))
            count = 0
            for one, other in zip(reversed(first), reversed(second), strict=False):
                if one != other:
                    break
                count += 1
            self._suffixes[prompt, role] = first[len(first) - count:] if count < min(len(first), len(second)) else []
        return self._suffixes[prompt, role]

    def _content(self, text: str) -> object:
        return [{"type": "text", "text": text}] if self._structured else text

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
