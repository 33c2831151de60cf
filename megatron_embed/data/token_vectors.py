"""Which tokens of a text give a vector in a multi-vector model, and queries expanded by mask tokens (ColBERT)."""

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import AddedToken

from megatron_embed.batch import JointOutputs
from megatron_embed.config.vector_format import JointFormat, VectorFormat
from megatron_embed.data.jsonl import shortened
from megatron_embed.data.tokenized import TokenizedRows
from megatron_embed.errors import CheckpointError
from megatron_embed.names import Role


def keep_prompts_whole(tokenizer: Any, prompts: Iterable[str]) -> bool:
    """Make a token that a prompt begins with, or is, one piece of the tokenizer's; whether that changed it.

    A tokenizer would split [unused0] of its vocabulary into pieces, where ColBERT inserts the token itself.
    """
    known, split = tokenizer.get_vocab(), list[AddedToken]()
    for prompt in prompts:
        beginnings = (prompt, *prompt.split(None, 1)[:1])
        token = next((text for text in beginnings if text.strip() and text in known), None)
        if token is not None and tokenizer.tokenize(token) != [token]:
            split.append(AddedToken(token, normalized=False, special=True))
    if split:
        tokenizer.add_tokens(split, special_tokens=True)
    return bool(split)


class JointTokens:
    """Which tokens of a text give what in a joint model: as in BGE-M3 all but the first give a vector and, unless they
    are special ones, a weight."""

    def __init__(self, tokenizer: Any, settings: JointFormat, model_dir: str) -> None:
        """Raises CheckpointError: texts do not begin with a special token of the tokenizer's."""
        special = (tokenizer.cls_token_id, tokenizer.bos_token_id, tokenizer.sep_token_id, tokenizer.eos_token_id,
                   tokenizer.pad_token_id, tokenizer.unk_token_id)
        first = tokenizer("a")["input_ids"][:1]
        if not first or first[0] not in special[:2]:
            raise CheckpointError(f"{model_dir}: its tokenizer puts no CLS or BOS token before a text, whose place the "
                                  "text's own vector takes in a joint model; take another model")
        self._outputs = JointOutputs(dense_rows=settings.dense_rows, unweighted=frozenset(special) - {None})

    def of(self, rows: Sequence[list[int]], num_truncated: int) -> TokenizedRows:
        """The texts with what they give; a text of no token but the first has no tokens."""
        kept = [[index > 0 for index in range(len(ids))] for ids in rows]
        return TokenizedRows(token_ids=[ids if len(ids) > 1 else [] for ids in rows], num_truncated=num_truncated,
                             kept=kept, joint=self._outputs)


class TokenVectors:
    """A VectorFormat in the ids of a tokenizer."""

    def __init__(self, tokenizer: Any, settings: VectorFormat, model_dir: str) -> None:
        """Raises CheckpointError: the expansion's token is none of the tokenizer's."""
        self._settings = settings
        unknown = tokenizer.unk_token_id
        ids = {tokenizer.convert_tokens_to_ids(word) for word in settings.skiplist_words
               if word in tokenizer.get_vocab() or word == tokenizer.unk_token}
        self._skipped = frozenset(ids - {None})
        self._token = -1
        if (expansion := settings.expansion) is None:
            return
        if expansion.token is None:
            token = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else tokenizer.eos_token_id
        else:
            token = tokenizer.convert_tokens_to_ids(expansion.token)
            token = None if token == unknown and expansion.token != tokenizer.unk_token else token
        if token is None:
            named = "mask or EOS token" if expansion.token is None else shortened(expansion.token)
            raise CheckpointError(f"{model_dir}: its tokenizer has no {named} to expand queries with; set "
                                  "embedding.query_expansion to 0, or take a model whose tokenizer has one")
        self._token = token

    def cut_length(self, max_length: int, *, raised: bool) -> int:
        """Tokens that a query is cut to before its expansion, given the maximum length that is set for queries;
        `raised`: at least those of the expansion."""
        expansion = self._settings.expansion
        if expansion is None or not (expansion.truncates or raised):
            return max_length
        return expansion.length if expansion.truncates else max(max_length, expansion.length)

    def skips_letters(self, role: Role) -> bool:
        """Whether the role's skip list holds letters or digits."""
        return role in self._settings.skiplist_tasks and any(
            character.isalnum() for word in self._settings.skiplist_words for character in word)

    def longest(self, role: Role, cut_length: int) -> int:
        """Tokens of the role's longest text, those of the expansion included."""
        expansion = self._settings.expansion if role == "query" else None
        return cut_length if expansion is None else max(cut_length, expansion.length)

    def of(self, rows: Sequence[list[int]], role: Role, num_truncated: int) -> TokenizedRows:
        """The texts with what they give vectors for; a text without any vector has no tokens either."""
        expansion = self._settings.expansion if role == "query" else None
        token_ids, lengths = list(rows), None
        if expansion is not None:
            token_ids = [ids + [self._token] * (expansion.length - len(ids)) if ids else ids for ids in rows]
            lengths = None if expansion.attend else [len(ids) for ids in rows]
        if role in self._settings.skiplist_tasks and self._skipped:
            kept = [[token not in self._skipped for token in ids] for ids in token_ids]
        else:
            kept = [[True] * len(ids) for ids in token_ids]
        token_ids = [ids if any(mask) else [] for ids, mask in zip(token_ids, kept, strict=True)]
        return TokenizedRows(token_ids=token_ids, num_truncated=num_truncated, kept=kept, key_lengths=lengths)
