"""The shape of a model: everything that determines the modules and tensor shapes of a backbone.

Imports neither torch nor Megatron.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_embed.errors import CheckpointError
from megatron_embed.names import Pooling

FamilyName = Literal["bert", "roberta", "xlm-roberta", "modernbert", "qwen2", "qwen3", "qwen3_moe", "llama", "mistral",
                     "mixtral", "t5", "t5-gated", "gemma2", "gemma3_text", "phi3", "glm", "glm4", "nomic_bert",
                     "internlm2", "internlm3", "deberta-v2"]
HiddenActivation = Literal["gelu", "gelu_tanh", "relu", "silu"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of rotary frequencies, under Transformers' names."""

    kind: Literal["linear", "llama3", "yarn", "dynamic", "longrope"]
    """dynamic and longrope: as for texts of the original length, within which they depend on no text's length."""
    factor: float
    """Divides all frequencies (linear) or the low ones (llama3, yarn); without effect under dynamic and longrope."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    """llama3: wavelengths above this / low_freq_factor are scaled, those below this / high_freq_factor are not. yarn:
    the same with the rotations over this length, beta_slow and beta_fast. longrope: the longest text."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """yarn: the bounds of the dimensions between are rounded outwards."""
    attention_factor: float = 1.0
    """yarn and longrope: multiplies cosines and sines."""
    short_factors: tuple[float, ...] = ()
    """longrope: divides each frequency."""


@dataclass(frozen=True, kw_only=True)
class RelativePositions:
    """Buckets of the distance between two tokens, each with a number per head that is added to the attention score."""

    num_buckets: int
    max_distance: int
    """Distance from which on all tokens share a bucket."""


@dataclass(frozen=True, kw_only=True)
class DisentangledPositions:
    """Embeddings of the distance between two tokens, 2 * span of them, whose products with queries and keys are added
    to the attention scores."""

    span: int
    """Distances on either side, or buckets of them."""
    max_distance: int
    """Distance that falls into the last bucket."""
    has_buckets: bool
    """Distances beyond half of the span share buckets, logarithmically more of them."""


@dataclass(frozen=True, kw_only=True)
class ClassifierShape:
    """What an encoder's *ForSequenceClassification does with a text's pooled state before its last linear layer: a
    square linear layer, an activation, and perhaps a LayerNorm."""

    pooling: Pooling = "cls"
    activation: Literal["tanh"] | HiddenActivation = "tanh"
    dense_bias: bool = True
    norm: bool = False
    """A LayerNorm follows, with a bias if those of the layers have one."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Everything that determines the modules and tensor shapes of a backbone.

    Names follow Megatron's TransformerConfig.
    """

    family: FamilyName
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads."""
    head_dim: int
    """Width of one attention head; need not be hidden_size / num_attention_heads."""
    ffn_hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    """Rows of learned positions, `position_offset` included; else the longest text in tokens."""
    norm: Literal["LayerNorm", "RMSNorm"]
    norm_eps: float
    norm_bias: bool = True
    """Whether a LayerNorm has a bias."""
    zero_centered_norm: bool = False
    """Norms multiply by 1 + weight."""
    sublayer_norms: bool = False
    """Norms follow attention and MLP before the residual is added, besides those before them."""
    embedding_norm: bool = False
    """A LayerNorm follows the sum of the embeddings."""
    first_attention_norm: bool = True
    """Whether the first layer has a norm before its attention."""
    embedding_scale: float | None = None
    """Factor of the word embeddings, rounded to their dtype; None: 1."""
    attention_scale: float | None = None
    """Factor of the products of queries and keys; None: 1 / sqrt(head_dim)."""
    attention_softcap: float | None = None
    """Bound c of these products, which become c * tanh(product / c); None: none."""
    logit_softcap: float | None = None
    """The same of the logits of a language-model head."""
    activation: HiddenActivation
    gated: bool
    """The MLP multiplies a gate into the activation (SwiGLU); fc1 holds [gate; up]."""
    add_bias_linear: bool
    add_qkv_bias: bool
    qk_layernorm: bool
    post_norm: bool
    """Original Transformer order: the norm comes after the residual sum, without a final norm."""
    bidirectional: bool
    rotary_base: float | None
    """None: learned absolute positions, unless there are `relative_positions` or `disentangled_positions`."""
    relative_positions: RelativePositions | None = None
    """A bias of the attention scores in place of positions of tokens."""
    disentangled_positions: DisentangledPositions | None = None
    """Embeddings of relative positions in place of positions of tokens."""
    rotary_dim: int | None = None
    """Dimensions of a head, the first ones, that are rotated; None: all."""
    interleaved_rotary: bool = False
    """Dimensions 2i and 2i + 1 are rotated together, not i and i + half."""
    rope_scaling: RopeScaling | None = None
    local_rotary_base: float | None = None
    """Rotary base of the layers with an attention window; None: that of all layers."""
    local_rope_scaling: RopeScaling | None = None
    """Scaling of those layers, if they have a base of their own."""
    position_offset: int = 0
    """Position id of a text's first token: RoBERTa's padding_idx + 1."""
    sliding_window: int | None = None
    """Tokens that a causal token sees, itself included (bidirectional: on each side, besides itself); None: all."""
    full_attention_layers: tuple[int, ...] = ()
    """Layers, counted from 0, that attend to whole texts although there is a sliding_window."""
    type_vocab_size: int
    """Token types; 0: none."""
    tie_word_embeddings: bool
    vocabulary_bias: bool = True
    """Whether a masked-language-model head has a bias for every token."""
    initializer_range: float
    num_experts: int = 0
    """Experts of every layer's MLP; 0: dense."""
    experts_per_token: int = 0
    normalize_expert_weights: bool = True
    """Whether the chosen experts' weights sum to 1."""
    classifier: ClassifierShape | None = None
    """An encoder's, which reads query and document as a pair of texts. None: a decoder, whose classifier is one linear
    layer on the last token."""

    def __post_init__(self) -> None:
        for key in ("hidden_size", "num_layers", "num_attention_heads", "num_query_groups", "head_dim",
                    "ffn_hidden_size", "vocab_size", "max_position_embeddings"):
            value = getattr(self, key)
            if type(value) is not int or value < 1:
                raise CheckpointError(f"{key} = {value!r} must be a positive integer")
        if self.num_layers * max(1, self.num_experts) > MOST_MLPS:
            raise CheckpointError(f"{self.num_layers} layers of {self.num_experts} experts are more than {MOST_MLPS:,} "
                                  "MLPs, which no model has")
        if self.num_experts and not self.experts_per_token <= self.num_experts:
            raise CheckpointError(f"num_experts_per_tok = {self.experts_per_token} is more than the {self.num_experts} "
                                  "experts")
        rotated = (self.rotary_dim or self.head_dim) // 2
        if self.rotary_base is not None and (self.rotary_dim or self.head_dim) % 2:
            raise CheckpointError(f"head_dim = {self.head_dim} must be even, since its halves are rotated")
        for scaling in self.rope_scalings:
            if len(scaling.short_factors) not in (0, rotated):
                raise CheckpointError(f"rope_scaling: short_factor has {len(scaling.short_factors)} numbers, but a "
                                      f"head has {rotated} rotary frequencies")
        if self.position_offset >= self.max_position_embeddings:
            raise CheckpointError(f"max_position_embeddings = {self.max_position_embeddings} leaves no position after "
                                  f"pad_token_id = {self.position_offset - 1}")
        if self.num_attention_heads % self.num_query_groups:
            raise CheckpointError(f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                                  f"num_key_value_heads = {self.num_query_groups}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise CheckpointError(f"sliding_window = {self.sliding_window!r} must be a positive integer or null")

    def is_local(self, layer: int) -> bool:
        """Whether the layer, counted from 0, has an attention window."""
        return self.sliding_window is not None and layer not in self.full_attention_layers

    @property
    def local_layers(self) -> int:
        """Number of layers with an attention window."""
        return sum(self.is_local(layer) for layer in range(self.num_layers))

    @property
    def rope_scalings(self) -> tuple[RopeScaling, ...]:
        """Scalings of rotary frequencies, of all layers or of either kind."""
        return tuple(scaling for scaling in (self.rope_scaling, self.local_rope_scaling) if scaling is not None)

    @property
    def learned_positions(self) -> bool:
        """Whether every position has an embedding."""
        return self.rotary_base is None and not self.has_position_bias

    @property
    def has_position_bias(self) -> bool:
        """Whether positions are added to the attention scores, by a module that every pipeline stage has."""
        return self.relative_positions is not None or self.disentangled_positions is not None

    @property
    def longest_text(self) -> int:
        """Tokens of the longest text that has positions, of those whose rotary frequencies are known."""
        known = [scaling.original_max_position_embeddings for scaling in self.rope_scalings
                 if scaling.kind == "longrope"]
        return min([self.max_position_embeddings - self.position_offset, *known])


MOST_MLPS = 2**17
"""Layers times experts; the largest open models have 23 thousand."""


def layers_by_stage(num_layers: int, stages: int) -> list[int]:
    """Layers of each pipeline stage, virtual stages included. If they do not divide evenly, the last stages take one
    more: the first stage holds the embeddings and, under 1F1B, the most micro-batches."""
    least, rest = divmod(num_layers, stages)
    return [least + (stage >= stages - rest) for stage in range(stages)]
