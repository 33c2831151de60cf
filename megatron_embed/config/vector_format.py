"""Which tokens of a text give a vector in a multi-vector model, and how its queries are expanded."""

import string
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from megatron_embed.config.objective import SCORE_WEIGHTS
from megatron_embed.names import Role

if TYPE_CHECKING:
    from megatron_embed.config.schema import EmbeddingConfig

PUNCTUATION = tuple(string.punctuation)
"""Tokens that give documents no vectors in ColBERT."""


@dataclass(frozen=True, kw_only=True)
class QueryExpansion:
    """Tokens appended to short queries, whose vectors count as well (Khattab and Zaharia 2020, arXiv:2004.12832)."""

    length: int
    """Tokens that every query has at least."""
    truncates: bool = True
    """Longer queries are cut to `length`, Sentence Transformers' strategy `fixed`; else they stay, `min`."""
    attend: bool = False
    """Whether attention sees the appended tokens; if not, they see the query, and neither it nor each other."""
    token: str | None = None
    """The appended token; None: the tokenizer's mask, else its EOS."""


@dataclass(frozen=True, kw_only=True)
class VectorFormat:
    """Which tokens give vectors, in the words of Sentence Transformers' MultiVectorMask."""

    skiplist_words: tuple[str, ...] = ()
    """Tokens that give none, by their text."""
    skiplist_tasks: tuple[Role, ...] = ("document",)
    """Roles in which they give none."""
    expansion: QueryExpansion | None = None
    """None: queries are not expanded."""
    prefix_tokens: bool = field(default=False, compare=False)
    """A prompt that begins with a token of the vocabulary, such as [unused0], keeps it whole, as ColBERT inserts one;
    then the tokenizer's files say so."""


@dataclass(frozen=True, kw_only=True)
class JointFormat:
    """The rows that a joint model gives for a text: its own vector, filled up with zeros, in the first ones; then for
    each token but the first a vector, a weight, and the id that the weight belongs to."""

    hidden_size: int
    """Numbers of a text's own vector."""
    token_dim: int
    """Numbers of a token's."""
    score_weights: tuple[float, ...] = SCORE_WEIGHTS
    """Weights of the scores in their sum, in the order of JOINT_SCORES."""

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self.token_dim + 2

    @property
    def dense_rows(self) -> int:
        """Rows before those of the tokens."""
        return -(-self.hidden_size // self.width)


def format_of_run(embedding: "EmbeddingConfig", own: VectorFormat | None) -> VectorFormat | None:
    """The format of a run whose settings are complete (`with_format`); None: a text gives one vector.

    Args:
        own: the model directory's; None: it gives one vector.
    """
    if embedding.head != "multi_vector":
        return None
    known, length = own or VectorFormat(), embedding.query_expansion
    expansion = known.expansion or QueryExpansion(length=1)
    wanted = replace(expansion, length=length, attend=bool(embedding.attend_to_expansion)) if length else None
    return replace(known, prefix_tokens=True, skiplist_words=embedding.skiplist_words or (), expansion=wanted)


def why_query_length_is_idle(max_length: int, vectors: VectorFormat | None) -> str | None:
    """Why a maximum length of queries has no effect beside their expansion; None: it has one, or equals it.

    Args:
        vectors: of a run (`format_of_run`).
    """
    expansion = None if vectors is None else vectors.expansion
    if expansion is None or max_length == expansion.length or (
            max_length > expansion.length and not expansion.truncates):
        return None
    brings = "brings every query to" if expansion.truncates else "gives every query at least"
    return (f"data.query_max_length = {max_length}: has no effect, since embedding.query_expansion = "
            f"{expansion.length} {brings} {expansion.length} tokens; change that, or remove this")


def with_format(embedding: "EmbeddingConfig", own: VectorFormat | None, *, sparse: bool = False) -> "EmbeddingConfig":
    """The settings with those of the model directory where they are null, else those of a new model.

    `sparse`: the directory's model is a sparse one.
    """
    if embedding.head == "joint":
        return embedding
    if embedding.head == "sparse" or (embedding.head is None and sparse):
        return replace(embedding, head="sparse")
    if embedding.head == "dense" or (embedding.head is None and own is None):
        return replace(embedding, head="dense")
    words = embedding.skiplist_words
    if words is None:
        words = PUNCTUATION if own is None else own.skiplist_words
    expansion = None if own is None else own.expansion
    length, attend = embedding.query_expansion, embedding.attend_to_expansion
    if length is None:
        length = 0 if expansion is None else expansion.length
    if attend is None and length:
        attend = expansion is not None and expansion.attend
    return replace(embedding, head="multi_vector", skiplist_words=words, query_expansion=length,
                   attend_to_expansion=attend)
