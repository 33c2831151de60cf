"""A text put into the tokenizer's chat template, as Sentence Transformers does for a model of chats."""

from collections.abc import Mapping
from typing import Any

from megatron_embed.errors import CheckpointError
from megatron_embed.names import MessageFormat

_STRUCTURED_SIGNS = ("content[0]", ".type", "'type'", '"type"', "item.type", "message.content[")
"""What a template has in it that takes a message's content as a list of parts, by Sentence Transformers."""


class ChatTemplate:
    """What stands around a text: the template, filled with one message of the user and, for a prompt, the system's.

    Args:
        tokenizer: a loaded one, with a chat template.
        model_dir: its directory, for messages.
        content: a message's content: the text, or a list of one part that holds it; auto: as the template looks.
        variables: for the template, beside the messages.
        tell_role: whether the template learns, as `task`, whether the text is a query or a document.
    Raises:
        CheckpointError: there is no template, or it takes no such message.
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
        if content == "auto":
            structured = not isinstance(template, str) or any(sign in template for sign in _STRUCTURED_SIGNS)
            content = "structured" if structured else "flat"
        self._structured = content == "structured"
        self._suffixes: dict[tuple[str, str], list[int]] = {}

    def fill(self, prompt: str, text: str, role: str) -> str:
        """The template with the text in it. Raises CheckpointError if the template does not take these messages."""
        messages = [{"role": "system", "content": self._content(prompt)}] if prompt else []
        messages.append({"role": "user", "content": self._content(text)})
        variables = {**({"task": role} if self._tell_role else {}), **self._variables}
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **variables))
        except Exception as error:  # a template may raise anything
            first_line = str(error).strip().partition("\n")[0]
            what = "a message of the system, which the prompt is, and one of the user" if prompt else "a user's message"
            raise CheckpointError(f"{self._model_dir}: its chat template does not take {what} ({first_line}); mend "
                                  "chat_template.jinja, or remove the modality message from sentence_bert_config.json "
                                  "if the model was trained without it") from error

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
