"""Texts to token ids: the prompt of a role, with its instruction, before the text, truncated to the role's length."""

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_embed.config.vector_format import JointFormat, VectorFormat
from megatron_embed.data.chat import ChatTemplate
from megatron_embed.data.jsonl import shortened
from megatron_embed.data.load_tokenizer import add_lowercase, load_tokenizer
from megatron_embed.data.token_cache import Prompted, TokenCache, TokenizedText, tokenizer_digest
from megatron_embed.data.token_vectors import JointTokens, TokenVectors, keep_prompts_whole
from megatron_embed.data.tokenized import TokenizedRows
from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.names import MessageFormat, Role, TruncationSide

_PLACEHOLDER = "{instruction}"


@dataclass(frozen=True, kw_only=True)
class TextFormat:
    """Settings in a model directory, besides its tokenizer, that change the token ids of a text."""

    lower_case: bool = False
    """Lowercase every text, unless the tokenizer does so itself."""
    truncation_side: TruncationSide | None = "right"
    """The end at which a text that is too long loses tokens. left: its beginning, the prompt included; None: the
    tokenizer's own."""
    chat_content: MessageFormat | None = None
    """How the tokenizer's chat template takes a message's content: every text is put into it; None: no template."""
    chat_variables: Mapping[str, Any] = field(default_factory=dict)
    """Variables for that template besides the messages."""
    tell_role: bool = True
    """Whether that template gets the text's role, as `task`."""
    vectors: VectorFormat | None = None
    """The tokens of a multi-vector model that give vectors, and how queries are expanded; None: a text gives one."""
    joint: JointFormat | None = None
    """The rows that a joint model gives for a text; None: it is none."""
    raises_query_length: bool = True
    """Whether a longest query below the expansion's length is raised to it; else it is cut first."""
    token_types: bool = False
    """Whether the model has embeddings of token types, of which a text gets the first here."""
    pools_prompts: bool = True
    """False: the model's pooling leaves out the tokens of a prompt, which is not computed: prompts are refused."""


def fill_template(prompt: str, instruction: str | None) -> str:
    """The prompt with the instruction in its place, if there is one."""
    return prompt if instruction is None else prompt.replace(_PLACEHOLDER, instruction)


def _refuse_token_types(tokenizer: Any, model_dir: str) -> None:
    """Raises CheckpointError for a tokenizer that gives the tokens of a text another type than 0, and says that the
    model is to get the types."""
    types = tokenizer(["a b"], verbose=False).get("token_type_ids", [[]])[0]
    if any(types):
        raise CheckpointError(f"{model_dir}/tokenizer.json: post_processor gives a text the token type {max(types)}, "
                              "and only 0 is supported; write 0 there, or take token_type_ids out of "
                              "model_input_names in tokenizer_config.json, if the model was trained so")


_PLAIN = TextFormat()


class RoleTokenizer:
    """Texts to the ids of `AutoTokenizer.from_pretrained(model_dir)(prompt + text)`, cut to the role's length.

    Truncation takes tokens from the end of the text only: the prompt and the special tokens on both sides stay.
    A directory may set this differently, see TextFormat.

    Args:
        model_dir: directory with tokenizer files; never a hub name.
        add_eos: append the tokenizer's EOS where it puts no token of its own after a text.
        query_prompt: exact prefix of a query; `{instruction}` in it is replaced per row.
        document_prompt: exact prefix of a document.
        query_max_length: tokens, prompt and special tokens included.
        document_max_length: tokens, prompt and special tokens included.
        length_keys: the settings or options that the two lengths came from, for messages.
        vocab_size: rows of the model's word embeddings; None: ids are not compared with it.
        instruction: for a text without one whose prompt has a place for it; None: that is an error.
        text_format: the model's own settings besides its tokenizer.

    Attributes:
        pad_token_id: an id that may fill padding: the tokenizer's pad, else its EOS, else 0.
        eos_token_id: the tokenizer's, None if it has none.
        joint: the rows of a text, of a joint model; None: another one.
        notices: what was logged of its texts, for a run to say it once.

    Raises:
        CheckpointError: the directory holds no usable tokenizer, one with more tokens than the model, or no EOS
            that could be added.
        ConfigError: a prompt leaves no tokens for text.
    """

    def __init__(self, model_dir: str, *, add_eos: bool, query_prompt: str = "", document_prompt: str = "",
                 query_max_length: int, document_max_length: int,
                 length_keys: tuple[str, str] = ("data.query_max_length", "data.document_max_length"),
                 vocab_size: int | None = None, instruction: str | None = None,
                 text_format: TextFormat = _PLAIN) -> None:
        self._instruction = instruction
        self._tokenizer = load_tokenizer(model_dir, vocab_size, added_may_exceed=True)
        if text_format.vectors is not None and text_format.vectors.prefix_tokens:
            keep_prompts_whole(self._tokenizer, (query_prompt, document_prompt))
        exceeds = vocab_size is not None and max(self._tokenizer.get_vocab().values(), default=0) >= vocab_size
        self._model_dir, self._vocab_size = model_dir, vocab_size if exceeds else None
        if text_format.token_types:
            _refuse_token_types(self._tokenizer, model_dir)
        if text_format.lower_case:
            add_lowercase(self._tokenizer)
        self._truncates_left = (text_format.truncation_side or self._tokenizer.truncation_side) == "left"
        self._chat = None if text_format.chat_content is None else ChatTemplate(
            self._tokenizer, model_dir, content=text_format.chat_content, variables=text_format.chat_variables,
            tell_role=text_format.tell_role)
        # A fast tokenizer is written to by every call (truncation settings) and fails if two threads do so at once.
        self._lock = threading.Lock()
        self._prompts: dict[Role, str] = {"query": query_prompt, "document": document_prompt}
        self._max_lengths: dict[Role, int] = {"query": query_max_length, "document": document_max_length}
        self._length_keys: dict[Role, str] = dict(zip(self._max_lengths, length_keys, strict=True))
        self._pools_prompts = text_format.pools_prompts
        self._checked: set[tuple[Role, str]] = set()
        self._cache: TokenCache | None = None
        self.notices: set[str] = set()
        self._token_vectors = None
        if text_format.vectors is not None:
            self._token_vectors = TokenVectors(self._tokenizer, text_format.vectors, model_dir)
            self._max_lengths["query"] = self._token_vectors.cut_length(
                query_max_length, raised=text_format.raises_query_length)
        self.joint = text_format.joint
        self._joint = None if text_format.joint is None else JointTokens(self._tokenizer, text_format.joint, model_dir)
        self.eos_token_id: int | None = self._tokenizer.eos_token_id
        pad = next((i for i in (self._tokenizer.pad_token_id, self.eos_token_id)
                    if i is not None and 0 <= i < (self._vocab_size or i + 1)), 0)
        self.pad_token_id: int = pad

        # The tokenizer adds no special tokens around a chat template.
        self._num_prefix, self._suffix = (0, []) if self._chat is not None else self._special_tokens(model_dir)
        self._eos = self._added_eos() if add_eos and not self._suffix and self._chat is None else []
        if _PLACEHOLDER in document_prompt:
            raise ConfigError(f"data.document_prompt = {document_prompt!r}: only data.query_prompt can hold "
                              f"{_PLACEHOLDER}; write the document's prompt out", key="data.document_prompt")
        for role, prompt in self._prompts.items():
            if _PLACEHOLDER not in prompt:
                self._check_prompt_length(role, prompt)

    def _added_eos(self) -> list[int]:
        """The EOS, as ids that are appended to every text."""
        if self.eos_token_id is None:
            raise CheckpointError(f"{self._model_dir}: its tokenizer names no eos_token, which last-token pooling "
                                  "needs; set it in tokenizer_config.json or choose another pooling, such as mean")
        self._require_rows([[self.eos_token_id]])
        return [self.eos_token_id]

    @property
    def needs_instructions(self) -> bool:
        """Whether every query needs an instruction of its own."""
        return _PLACEHOLDER in self._prompts["query"] and self._instruction is None

    def max_length(self, role: Role) -> int:
        """Tokens of the role's longest text, prompt, special and appended tokens included."""
        own, length = self._token_vectors, self._max_lengths[role]
        return length if own is None else own.longest(role, length)

    def skips_letters(self, role: Role) -> bool:
        """Whether a text with letters or digits may give no vector, since the skip list of a multi-vector model holds
        some."""
        return self._token_vectors is not None and self._token_vectors.skips_letters(role)

    def without_prompts(self) -> "RoleTokenizer":
        """The same tokenizer for texts without a prompt."""
        plain = copy.copy(self)
        plain._prompts = {"query": "", "document": ""}
        return plain

    def always_adds_tokens(self, role: Role, prompt: str | None = None) -> bool:
        """Whether special tokens, the EOS, the prompt or an instruction give every text of the role a token.

        `prompt`: of a data set, in place of the role's.
        """
        prompt = self._prompts[role] if prompt is None else prompt
        if _PLACEHOLDER in prompt:
            return True
        if self._token_vectors is not None:  # a prompt or special token of the skip list is none of a text's vectors
            return bool(self.tokenize([""], role, prompts=[prompt]).token_ids[0])
        if self._num_prefix or self._suffix or self._eos:
            return True
        if self._chat is not None:
            return bool(self._ids_of([prompt], [""], role)[0])
        return bool(prompt) and bool(self._ids([prompt], special=False)[0])

    def tokenize(self, texts: Sequence[str], role: Role, instructions: Sequence[str | None] | None = None,
                 prompts: Sequence[str | None] | None = None) -> TokenizedRows:
        """Token ids of each text with its role's prompt.

        Args:
            texts: any number of texts.
            role: whose prompt and maximum length apply.
            instructions: one per text; needed where the prompt has a place for it.
            prompts: one per text, in place of the role's; None: the role's.
        Raises:
            ConfigError: an instruction is missing, or one leaves no tokens for text.
        """
        if not texts:
            return TokenizedRows(token_ids=[], num_truncated=0)
        none = [None] * len(texts)
        filled = [self.fill_prompt(role, instruction, prompt)
                  for instruction, prompt in zip(instructions or none, prompts or none, strict=True)]
        for prefix in set(filled):
            self._check_prompt_length(role, prefix)
        prompted = [Prompted(role, prompt, text) for prompt, text in zip(filled, texts, strict=True)]
        rows = self.tokenize_prompted(prompted) if self._cache is None else self._looked_up(prompted, self._cache)
        token_ids, num_truncated = [row.ids for row in rows], sum(row.truncated for row in rows)
        if self._token_vectors is not None:
            return self._token_vectors.of(token_ids, role, num_truncated)
        if self._joint is not None:
            return self._joint.of(token_ids, num_truncated)
        return TokenizedRows(token_ids=token_ids, num_truncated=num_truncated)

    @property
    def largest_id(self) -> int:
        """The largest id of its vocabulary."""
        return max(self._tokenizer.get_vocab().values(), default=0)

    def with_cache(self, cache: TokenCache) -> "RoleTokenizer":
        """The same tokenizer, which looks for a text in the cache first."""
        cached = copy.copy(self)
        cached._cache = cache
        return cached

    def settings_of_ids(self) -> dict[str, object]:
        """All that decides the ids of a text with its prompt, as JSON takes it."""
        rendered = [] if self._chat is None else [self._chat.fill("a", "b", role) for role in self._prompts]
        return {"tokenizer": tokenizer_digest(self._tokenizer, rendered), "eos": self._eos,
                "truncation_side": self._truncates_left,
                **{self._length_keys[role]: length for role, length in self._max_lengths.items()}}

    def _looked_up(self, texts: Sequence[Prompted], cache: TokenCache) -> list[TokenizedText]:
        rows = cache.find(texts)
        missing = [text for text, row in zip(texts, rows, strict=True) if row is None]
        further = iter(self.tokenize_prompted(missing) if missing else ())
        return [next(further) if row is None else row for row in rows]

    def tokenize_prompted(self, texts: Sequence[Prompted]) -> list[TokenizedText]:
        """The same of texts of one role, at least one, that have their prompts; without the cache."""
        role = texts[0].role
        rows, limit = self._ids_of([text.prompt for text in texts], [text.text for text in texts],
                                   role), self._max_lengths[role] - len(self._eos)
        return [TokenizedText((self._truncate(ids, limit, text.prompt, role) if len(ids) > limit else ids) + self._eos,
                           len(ids) > limit) for ids, text in zip(rows, texts, strict=True)]

    def count_tokens(self, texts: Sequence[str], role: Role, instructions: Sequence[str | None] | None = None,
                     prompts: Sequence[str | None] | None = None) -> list[int]:
        """Tokens of each text before truncation, with prompt, special tokens and EOS; arguments as in `tokenize`."""
        none = [None] * len(texts)
        filled = [self.fill_prompt(role, instruction, prompt)
                  for instruction, prompt in zip(instructions or none, prompts or none, strict=True)]
        return [len(ids) + len(self._eos) for ids in self._ids_of(filled, texts, role)] if texts else []

    def takes_instructions(self, query_prompt: str | None) -> bool:
        """Whether this prompt of a data set (None: that of queries) has a place for an instruction."""
        return _PLACEHOLDER in (self._prompts["query"] if query_prompt is None else query_prompt)

    def check_prompts(self, instructions: dict[str | None, str], query_prompt: str | None = None,
                      document_prompt: str | None = None) -> None:
        """Refuse, before the first step, prompts and instructions of a data set that `tokenize` would refuse.

        Args:
            instructions: each distinct instruction (None: rows without one) and the source of a row that has it.
            query_prompt: in place of the prompt of queries; None: that prompt.
            document_prompt: in place of the prompt of documents; None: that prompt.
        Raises:
            ConfigError: naming that row.
        """
        for instruction, source in instructions.items():
            try:
                self._check_prompt_length("query", self.fill_prompt("query", instruction, query_prompt))
                self._check_prompt_length("document", self.fill_prompt("document", None, document_prompt))
            except ConfigError as error:
                raise ConfigError(f"{source}: {error}") from None

    def fill_prompt(self, role: Role, instruction: str | None = None, prompt: str | None = None) -> str:
        """The role's prompt, or `prompt` in its place, with the instruction, or the tokenizer's, in it.

        Raises:
            ConfigError: the prompt has a place for an instruction and there is none.
        """
        if prompt is None:
            prompt = self._prompts[role]
        if _PLACEHOLDER not in prompt:
            return prompt
        instruction = self._instruction if instruction is None else instruction
        if instruction is None:
            raise ConfigError(f"data.query_prompt = {shortened(prompt)} needs an instruction and the row has none; "
                              "give the row an 'instruction', or its data.train entry one for all of its rows, "
                              "or set embedding.instruction", key="data.query_prompt")
        return fill_template(prompt, instruction)

    def _check_prompt_length(self, role: Role, prompt: str) -> None:
        """Refuse a prompt that leaves no tokens for text, or may not be pooled; each prompt is tokenized once."""
        if (role, prompt) in self._checked:
            return
        if prompt and not self._pools_prompts:
            raise ConfigError(f"{self._model_dir}: include_prompt = false in its pooling is not supported together "
                              f"with a {role} prompt, {shortened(prompt)}; set it to true, or leave the prompt out")
        used = self._num_prefix + len(self._suffix) + len(self._eos)
        if self._chat is not None:
            used += len(self._ids_of([prompt], [""], role)[0])
        elif prompt:
            used += len(self._ids([prompt], special=False)[0])
        if used >= self._max_lengths[role]:
            key = self._length_keys[role]
            raise ConfigError(f"{key} = {self._max_lengths[role]} tokens: the prompt {shortened(prompt)} and the "
                              f"special tokens take {used} of them, which leaves none for text; raise it or use a "
                              f"shorter {role} prompt", key=key)
        self._checked.add((role, prompt))

    def _ids_of(self, prompts: Sequence[str], texts: Sequence[str], role: Role) -> list[list[int]]:
        """Ids of each prompt with its text before truncation, without an EOS that the tokenizer does not add."""
        if self._chat is None:
            return self._ids([prompt + text for prompt, text in zip(prompts, texts, strict=True)], special=True)
        filled = [self._chat.fill(prompt, text, role) for prompt, text in zip(prompts, texts, strict=True)]
        return self._ids(filled, special=False)

    def _truncate(self, ids: list[int], limit: int, prompt: str, role: Role) -> list[int]:
        """`limit` of the ids, without the end, or the beginning, of the text."""
        suffix = self._suffix if self._chat is None else self._chat.suffix(prompt, role)[-limit:]
        if self._chat is not None:  # as Sentence Transformers does: cut, then the template's end over the cut one
            kept = ids[-limit:] if self._truncates_left else ids[:limit]
            return kept[:limit - len(suffix)] + suffix
        if not self._truncates_left:
            return ids[:limit - len(suffix)] + suffix
        end = len(ids) - len(suffix)
        return ids[:self._num_prefix] + ids[end - (limit - self._num_prefix - len(suffix)):end] + suffix

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        with self._lock:
            # verbose=False: no warning about sequences that are longer than the model's; they are cut afterwards.
            encoded = self._tokenizer(texts, add_special_tokens=special, padding=False, truncation=False,
                                      return_attention_mask=False, return_token_type_ids=False, verbose=False)
        ids = list(encoded["input_ids"])
        self._require_rows(ids)
        return ids

    def _require_rows(self, rows: Sequence[Sequence[int]]) -> None:
        """Refuse ids that the model has no row for: a rank without it would look up zeros, another would fail."""
        if self._vocab_size is None:
            return
        largest = max((max(ids, default=0) for ids in rows), default=0)
        if largest >= self._vocab_size:
            token = self._tokenizer.convert_ids_to_tokens(largest)
            raise CheckpointError(f"{self._model_dir}: a text holds {shortened(token)}, to which its tokenizer gives "
                                  f"the id {largest}, but the model ends at id {self._vocab_size - 1} (config.json: "
                                  f"vocab_size = {self._vocab_size}); copy the model's own tokenizer there, or give "
                                  "the model more rows (Transformers: resize_token_embeddings)")

    def _special_tokens(self, model_dir: str) -> tuple[int, list[int]]:
        """The number of special tokens before a text, and the ids of those after it."""
        plain, full = self._ids(["a b"], special=False)[0], self._ids(["a b"], special=True)[0]
        for start in range(len(full) - len(plain) + 1):
            if plain and full[start:start + len(plain)] == plain:
                return start, full[start + len(plain):]
        raise CheckpointError(f"{model_dir}: its tokenizer gives {full} with and {plain} without special tokens for "
                              "'a b', which is not the text between fixed tokens; choose another tokenizer")
