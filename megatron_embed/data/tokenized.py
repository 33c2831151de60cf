"""Token ids of texts, as a tokenizer gives them to packing."""

from dataclasses import dataclass

from megatron_embed.batch import JointOutputs


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedRows:
    """Token ids of some texts of one role."""

    token_ids: list[list[int]]
    """Per text: prompt and special tokens included, nothing padded."""
    num_truncated: int
    """Texts that were truncated to the maximum length."""
    kept: list[list[bool]] | None = None
    """Whether each token of each text gives a vector, in a multi-vector model; None: a text gives one vector."""
    joint: JointOutputs | None = None
    """Rows that each text of a joint model gives besides; None: there are none."""
    key_lengths: list[int] | None = None
    """Per text, its first tokens that attention sees; None: all of every text."""
