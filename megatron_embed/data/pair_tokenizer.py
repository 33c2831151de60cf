"""Pairs of query and document to a reranker's token ids, as one text or a pair of texts, truncated to a length."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_embed.data.jsonl import shortened
from megatron_embed.data.load_tokenizer import add_lowercase, load_tokenizer
from megatron_embed.errors import CheckpointError, ConfigError, DataError

QWEN3_RERANKER_TEMPLATE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n"
    "<think>\n\n</think>\n\n")
"""The prompt that Qwen3-Reranker was trained with (its model card)."""
QWEN3_RERANKER_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
"""Its default instruction."""
PLACES = ("instruction", "query", "document")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A query with one document, which a reranker scores."""

    query: str
    document: str
    instruction: str | None = None
    """None: the default one."""
    source: str = ""
    """FILE:LINE, for messages; empty: not from a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedPairs:
    """Token ids of some pairs."""

    token_ids: list[list[int]]
    """Per pair, nothing padded."""
    token_types: list[list[int]] | None
    """Per pair, as long as its ids; None: the tokenizer has none."""
    num_truncated: int
    """Pairs that were truncated."""


@dataclass(frozen=True, kw_only=True)
class PairTemplate:
    """A reranker's prompt around a pair: text with the places `{instruction}`, `{query}` and `{document}`.

    Raises:
        ConfigError: beginning `reranker.template`, if query or document are missing or a place occurs twice.
    """

    text: str
    instruction: str = QWEN3_RERANKER_INSTRUCTION
    """The instruction of a pair without one of its own."""

    def __post_init__(self) -> None:
        for name in PLACES:
            count = self.text.count("{" + name + "}")
            if count > 1 or (count == 0 and name != "instruction"):
                raise ConfigError(f"reranker.template = {shortened(self.text)}: {{{name}}} occurs {count} times; "
                                  "write {query} and {document} once each, and {instruction} at most once",
                                  key="reranker.template")
        if self.text.index("{document}") < self.text.index("{query}"):
            raise ConfigError(f"reranker.template = {shortened(self.text)}: {{document}} comes before {{query}}; "
                              "exports and servers put the query first", key="reranker.template")

    def pieces(self) -> list[str]:
        """The text in order: literal, name of a place, literal, ... (an even index of the list is a literal)."""
        pieces, rest = [], self.text
        for _ in range(sum("{" + name + "}" in self.text for name in PLACES)):
            start, first = min((rest.index("{" + name + "}"), name) for name in PLACES if "{" + name + "}" in rest)
            pieces += [rest[:start], first]
            rest = rest[start + len(first) + 2:]
        return [*pieces, rest]

    def fill(self, pair: Pair) -> tuple[str, int, int]:
        """The whole text, and where in it the document begins and ends (characters)."""
        values = {"instruction": self.instruction if pair.instruction is None else pair.instruction,
                  "query": pair.query, "document": pair.document}
        text, start = "", 0
        for index, piece in enumerate(self.pieces()):
            if piece == "document" and index % 2:
                start = len(text)
            text += values[piece] if index % 2 else piece
        return text, start, start + len(pair.document)


@dataclass(frozen=True, kw_only=True)
class PairFormat:
    """A model's own settings, besides its tokenizer, that change the token ids of a pair."""

    prompt: str = ""
    """Before every query of a pair of texts."""
    token_types: int = 2
    """Token types that the model has embeddings of; 0: it takes none."""
    lower_case: bool = False
    """Lowercase every text, unless the tokenizer does so itself."""
    unread: int | None = None
    """A token that is left out at the end of every pair, since the model's stock class reads its score before it; None:
    the last token is read whatever it is."""
    own_truncation_side: bool = False
    """A pair of texts loses tokens at the end that the tokenizer's files name; False: at the right."""


_PLAIN = PairFormat()


class PairTokenizer:
    """Pairs to the ids that Transformers and CrossEncoder give them.

    With a template: the ids of the filled text without further special tokens, as a chat template is tokenized; tokens
    are taken from the end of the document until the pair fits. Without: the tokenizer's ids of two texts (with special
    tokens and token types), the longer of which is truncated, as CrossEncoder does (`truncation="longest_first"`).

    Args:
        model_dir: directory with tokenizer files; never a hub name.
        template: the prompt around a pair; None: the model reads pairs of texts.
        max_length: tokens of a pair, everything included.
        length_key: the setting or option that the length came from, for messages.
        vocab_size: rows of the model's word embeddings; None: ids are not compared with it.
        pair_format: the model's own settings besides its tokenizer.

    Attributes:
        unread: as in `pair_format`; may be set later.
        pad_token_id: an id that may fill padding.
        can_pad: whether the tokenizer names a token for that.

    Raises:
        CheckpointError: no usable tokenizer, one with more tokens than the model, or one that does not say where in
            the text its tokens are.
    """

    def __init__(self, model_dir: str, *, template: PairTemplate | None, max_length: int,
                 length_key: str = "reranker.max_length", vocab_size: int | None = None,
                 pair_format: PairFormat = _PLAIN) -> None:
        self._tokenizer: Any = load_tokenizer(model_dir, vocab_size)
        if not self._tokenizer.is_fast:
            raise CheckpointError(f"{model_dir}: its tokenizer is a slow one, which does not say where the document's "
                                  "tokens are; save it once with Transformers as tokenizer.json")
        if not pair_format.own_truncation_side:
            self._tokenizer.truncation_side = "right"
        if pair_format.lower_case:
            add_lowercase(self._tokenizer)
        # A fast tokenizer is written to by every call (truncation settings) and fails if two threads do so at once.
        self._lock = threading.Lock()
        self.template = template
        self._model_dir = model_dir
        self.max_length = max_length
        self._length_key = length_key
        self._format = pair_format
        self.unread = pair_format.unread
        pad = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id)
        self.can_pad = any(i is not None and i >= 0 for i in pad)
        self.pad_token_id: int = next((i for i in pad if i is not None and i >= 0), 0)
        self._frame = self._count_frame()

    def tokenize(self, pairs: Sequence[Pair]) -> TokenizedPairs:
        """Token ids of each pair, at most `max_length`.

        Raises:
            DataError: beginning with the pair's source, if no token is left of its document, which has some.
        """
        if not pairs:
            return TokenizedPairs(token_ids=[], token_types=None, num_truncated=0)
        rows = self._rows(pairs)
        return rows if self.unread is None else _without_last(rows, self.unread)

    def count_tokens(self, pairs: Sequence[Pair]) -> list[int]:
        """Length of each pair in tokens before truncation, prompt and special tokens included; as in `tokenize`."""
        if not pairs:
            return []
        with self._lock:
            if self.template is None:
                encoded = self._tokenizer([self._format.prompt + pair.query for pair in pairs],
                                          [pair.document for pair in pairs], truncation=False, verbose=False)
            else:
                encoded = self._tokenizer([self.template.fill(pair)[0] for pair in pairs], add_special_tokens=False,
                                          truncation=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]

    def check_query_length(self, pairs: Sequence[Pair], *, strict: bool = False) -> None:
        """Raises what `tokenize` would, at little cost: a query that is short in bytes has few tokens.

        `strict`: also for a pair of texts, both of which are truncated then.
        """
        long = [pair for pair in pairs if self._frame + len(pair.query.encode())
                + len((pair.instruction or "").encode()) >= self.max_length]
        if self.template is not None:
            self.tokenize(long)
        elif strict and long:
            with self._lock:
                alone = self._tokenizer([self._format.prompt + pair.query for pair in long], [""] * len(long),
                                        padding=False, truncation=False, verbose=False)
            for pair, ids in zip(long, alone["input_ids"], strict=True):
                if len(ids) >= self.max_length:
                    raise self._query_too_long(pair, len(ids))

    def last_token(self) -> int:
        """The token that ends a pair with a short document, even if `unread` leaves it out."""
        rows = self._rows([Pair(query="a", document="b")])
        return rows.token_ids[0][-1]

    def with_directory(self, model_dir: str) -> "PairTokenizer":
        """The same with another directory's tokenizer."""
        return PairTokenizer(model_dir, template=self.template, max_length=self.max_length, length_key=self._length_key,
                             pair_format=replace(self._format, unread=self.unread, own_truncation_side=False))

    def token_of(self, word: str, key: str) -> int:
        """The id of a word that is a single token.

        Raises:
            ConfigError: beginning with `key`, if it is several, or none.
        """
        with self._lock:
            ids = self._tokenizer(word, add_special_tokens=False).input_ids
        unknown = self._tokenizer.unk_token_id
        if len(ids) != 1 or (ids[0] == unknown and word != self._tokenizer.unk_token):
            raise ConfigError(f"{key} = {word!r}: is {len(ids)} tokens ({ids}) in this tokenizer, and must be a single "
                              "known one; choose another word", key=key)
        return int(ids[0])

    def _count_frame(self) -> int:
        """Tokens that every pair has besides query and document, about (words at the seams may differ by one)."""
        empty = Pair(query="", document="")
        with self._lock:
            if self.template is None:
                return len(self._tokenizer(self._format.prompt, "").input_ids)
            return len(self._tokenizer(self.template.fill(empty)[0], add_special_tokens=False).input_ids) + 2

    def _rows(self, pairs: Sequence[Pair]) -> TokenizedPairs:
        """With every token, read or not."""
        return self._with_template(pairs, self.template) if self.template is not None else self._as_pairs(pairs)

    def _with_template(self, pairs: Sequence[Pair], template: PairTemplate) -> TokenizedPairs:
        filled = [template.fill(pair) for pair in pairs]
        with self._lock:
            encoded = self._tokenizer([text for text, _, _ in filled], add_special_tokens=False, padding=False,
                                      truncation=False, return_offsets_mapping=True, return_attention_mask=False,
                                      return_token_type_ids=False, verbose=False)
        rows, truncated = [], 0
        for pair, ids, offsets, (_, start, end) in zip(pairs, encoded["input_ids"], encoded["offset_mapping"], filled,
                                                       strict=True):
            surplus = len(ids) - self.max_length
            if surplus > 0:
                # A token that reaches over an end of the document belongs to what surrounds it, and stays.
                inside = [position for position, (first, last) in enumerate(offsets)
                          if first >= start and last <= end and last > first]
                if surplus >= len(inside):
                    raise self._query_too_long(pair, len(ids) - len(inside))
                dropped = set(inside[-surplus:])
                ids = [token for position, token in enumerate(ids) if position not in dropped]
                truncated += 1
            rows.append(ids)
        return TokenizedPairs(token_ids=rows, token_types=None, num_truncated=truncated)

    def _as_pairs(self, pairs: Sequence[Pair]) -> TokenizedPairs:
        queries, documents = [self._format.prompt + pair.query for pair in pairs], [pair.document for pair in pairs]
        with self._lock:
            whole = self._tokenizer(queries, documents, padding=False, truncation=False, verbose=False)
            truncated = sum(len(ids) > self.max_length for ids in whole["input_ids"])
            if truncated:
                if self.max_length <= self._tokenizer.num_special_tokens_to_add(pair=True):
                    raise ConfigError(f"{self._length_key} = {self.max_length} tokens: the tokenizer's special tokens "
                                      "alone take as many; raise it", key=self._length_key)
                whole = self._tokenizer(queries, documents, padding=False, truncation="longest_first",
                                        max_length=self.max_length, verbose=False)
        types = list(whole["token_type_ids"]) if self._format.token_types and "token_type_ids" in whole else None
        largest = max((max(row, default=0) for row in types or ()), default=0)
        if types is not None and largest >= self._format.token_types:
            raise CheckpointError(f"{self._model_dir}: its tokenizer gives a pair the token type {largest}, but the "
                                  f"model ends at type {self._format.token_types - 1} (config.json: type_vocab_size = "
                                  f"{self._format.token_types}); copy the model's own tokenizer there, or take "
                                  "token_type_ids out of model_input_names in tokenizer_config.json")
        return TokenizedPairs(token_ids=list(whole["input_ids"]), num_truncated=truncated, token_types=types)

    def _query_too_long(self, pair: Pair, used: int) -> Exception:
        prefix = f"{pair.source}: " if pair.source else ""
        return DataError(f"{prefix}the query {shortened(pair.query)} with the prompt around it takes {used} of "
                         f"{self._length_key} = {self.max_length} tokens, which leaves none for the document; raise "
                         "it, or use a shorter query")


def _without_last(rows: TokenizedPairs, token: int) -> TokenizedPairs:
    """The same without that token at the ends. A causal model gives the same output before it."""
    kept = []
    for ids in rows.token_ids:
        end = next((length for length in range(len(ids), 0, -1) if ids[length - 1] != token), min(1, len(ids)))
        kept.append(ids[:end])
    return TokenizedPairs(token_ids=kept, token_types=None, num_truncated=rows.num_truncated)
