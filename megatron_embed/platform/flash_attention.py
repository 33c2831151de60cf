"""torch's variable-length flash attention kernels, called as the operators that they are.

`torch.nn.attention.varlen.varlen_attn` is not used: its arguments differ between torch 2.10, 2.11 and 2.12 (no
`enable_gqa` before 2.12), it has no dropout, and since 2.14 it takes cuDNN's kernel instead where queries and keys have
equal heads. The operators have had the same arguments since torch 2.6, take fewer key/value heads without a flag, and
choose the deterministic backward where `torch.use_deterministic_algorithms` asks for it. Where torch can put
FlashAttention 3 in their place, `choose_version` does.
"""

import functools
import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor

logger = logging.getLogger(__name__)

FORWARD_ARGUMENTS = ("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal",
                     "return_debug_mask")
"""Positional arguments of `aten::_flash_attention_forward`, in order."""
BACKWARD_ARGUMENTS = ("grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q",
                      "max_k", "dropout_p", "is_causal")
"""Those of `aten::_flash_attention_backward`, before the forward's two results about random numbers (named rng_state
and unused since torch 2.7, philox_seed and philox_offset before)."""
KEYWORDS = ("scale", "window_size_left", "window_size_right")
"""Keyword-only arguments that both are given."""
FORWARD_RESULTS, BACKWARD_RESULTS = 5, 3
HEAD_DIM_UNIT, MAX_HEAD_DIM = 8, 256
"""The size of a head is a multiple of the one and at most the other (`mha_varlen_fwd` in torch's flash_api.cpp)."""
CAUSAL, ALL_TOKENS = (-1, 0), (-1, -1)
"""Windows of a `FlashCall` without a bound."""
FLASH_3, FLASH_3_MODULE = "FA3", "flash_attn_interface"
"""torch's name of FlashAttention 3, and the module of FlashAttention 3's package that torch loads for it."""


@dataclass(frozen=True, kw_only=True)
class FlashCall:
    """One call of the kernels: successive sequences, or parts of them, with the keys that they may see.

    The kernels align the queries and keys of a sequence at their last ones, the lower right corner of the mask.
    """

    queries: tuple[int, int]
    """[first, stop) of the query tensor's tokens."""
    keys: tuple[int, int]
    """[first, stop) of the key tensor's tokens."""
    cu_queries: Tensor
    """[sequences + 1] int32 on the device: bounds of each sequence's queries, from 0."""
    cu_keys: Tensor
    """[sequences + 1] int32 on the device: bounds of each sequence's keys, from 0."""
    longest_queries: int
    longest_keys: int
    window: tuple[int, int]
    """(keys before, keys after) the aligned one that a query sees besides it; -1: all."""


@dataclass(frozen=True, kw_only=True)
class FlashState:
    """What the backward kernel needs of the forward's results, besides the output."""

    logsumexp: Tensor
    rng: tuple[Tensor, Tensor]
    """The random generator's seed and offset, by which the backward pass drops what the forward pass dropped."""


def flash_forward(query: Tensor, key: Tensor, value: Tensor, call: FlashCall, *, scale: float,
                  dropout: float) -> tuple[Tensor, FlashState]:
    """Attention of one call.

    Args:
        query: [tokens, heads, head_dim] float16 or bfloat16 on a GPU, see HEAD_DIM_UNIT.
        key: [keys, groups, head_dim], as `value`; heads is a multiple of groups.
        dropout: rate of attention weights; draws from the device's current random generator if not 0.
    Returns:
        [queries of the call, heads, head_dim] of the query's dtype, and what the backward pass needs.
    """
    output, logsumexp, *rng, _ = forward_operator()(
        query[slice(*call.queries)], key[slice(*call.keys)], value[slice(*call.keys)], call.cu_queries, call.cu_keys,
        call.longest_queries, call.longest_keys, dropout, call.window == CAUSAL, False, **_options(call, scale))
    # Without dropout a kernel may leave these undefined; the backward's schema asks for tensors.
    seed, offset = (query.new_empty(0) if tensor is None else tensor for tensor in rng)
    return output, FlashState(logsumexp=logsumexp, rng=(seed, offset))


def flash_backward(gradient: Tensor, tensors: tuple[Tensor, Tensor, Tensor, Tensor], state: FlashState,
                   call: FlashCall, *, scale: float, dropout: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the call's queries, keys and values, of their shapes.

    Args:
        gradient: that of `output`, whole, as the following.
        tensors: (query, key, value, output); the queries' part of `output` is what `flash_forward` returned.
    """
    query, key, value, output = tensors
    queries, keys = slice(*call.queries), slice(*call.keys)
    gradients: tuple[Tensor, Tensor, Tensor] = backward_operator()(
        gradient[queries], query[queries], key[keys], value[keys], output[queries], state.logsumexp, call.cu_queries,
        call.cu_keys, call.longest_queries, call.longest_keys, dropout, call.window == CAUSAL, *state.rng,
        **_options(call, scale))
    return gradients


def _options(call: FlashCall, scale: float) -> dict[str, Any]:
    return {"scale": scale, "window_size_left": call.window[0], "window_size_right": call.window[1]}


def forward_operator() -> Any:
    """torch's operator; raises AttributeError if there is none."""
    return torch.ops.aten._flash_attention_forward.default


def backward_operator() -> Any:
    """torch's operator; raises AttributeError if there is none."""
    return torch.ops.aten._flash_attention_backward.default


@functools.cache
def why_no_flash() -> str | None:
    """A clause that says why this torch's flash operators cannot be used; None if they can."""
    parts = (("_flash_attention_forward", forward_operator, FORWARD_ARGUMENTS, 0, FORWARD_RESULTS),
             ("_flash_attention_backward", backward_operator, BACKWARD_ARGUMENTS, 2, BACKWARD_RESULTS))
    for name, operator, arguments, more, results in parts:
        try:
            schema = operator()._schema
        except AttributeError:
            return f"torch {torch.__version__} has no operator aten::{name}"
        if not takes(schema, arguments, more=more, results=results):
            return f"torch {torch.__version__} has other arguments or results in {schema}"
    return None


def takes(schema: Any, arguments: tuple[str, ...], *, more: int, results: int) -> bool:
    """Whether an operator of `schema` can be called with `arguments` and `more` of other names in this order, and with
    KEYWORDS, and returns `results` tensors; what else it has must have defaults."""
    positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    named = {argument.name: argument for argument in schema.arguments if argument.kwarg_only}
    others_have_defaults = all(argument.has_default_value() for name, argument in named.items()
                               if name not in KEYWORDS)
    return (tuple(positional[:len(arguments)]) == arguments and len(positional) == len(arguments) + more
            and named.keys() >= set(KEYWORDS) and others_have_defaults and len(schema.returns) == results)


def choose_version(*, dropout: float) -> str:
    """Put FlashAttention 3 behind torch's operators, for the whole process, or take it away again if there is dropout,
    which it has not. Says which version serves, once, in the log. Returns that sentence."""
    reason = why_no_flash_3(dropout=dropout)
    registry: Any = torch.nn.attention
    if reason is None and registry.current_flash_attention_impl() != FLASH_3:
        reason = _try_flash_3(registry)
    elif reason is not None and _is_flash_3_active():
        registry.restore_flash_attention_impl()
    sentence = ("flash attention is FlashAttention 3" if reason is None else
                f"flash attention is torch's own FlashAttention 2, not 3: {reason}")
    _log_once(sentence)
    return sentence


def why_no_flash_3(*, dropout: float) -> str | None:
    """A clause that says why FlashAttention 3 cannot be used on this GPU; None if it can be tried."""
    if dropout:
        return f"it has no dropout (training.attention_dropout = {dropout})"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return "it is for GPUs of compute capability 9 (H100, H200)"
    if not _has_registry() or FLASH_3 not in torch.nn.attention.list_flash_attention_impls():
        return f"torch {torch.__version__} has no activate_flash_attention_impl('{FLASH_3}')"
    if importlib.util.find_spec(FLASH_3_MODULE) is None:
        return f"{FLASH_3_MODULE} is not installed"
    return None


def _try_flash_3(registry: Any) -> str | None:
    """Activate it and compare a small call with FlashAttention 2's. Returns a clause if it is not active after all: its
    package may be built for another torch, and has been called by no test of ours on a GPU."""
    expected = _small_call()
    try:
        registry.activate_flash_attention_impl(FLASH_3)
        computed = _small_call()
    except (ImportError, OSError, RuntimeError, TypeError) as error:
        reason = f"torch cannot call it: {error}"
    else:
        if all(float((ours - right).norm() / right.norm()) < 2**-6
               for ours, right in zip(computed, expected, strict=True)):
            return None
        reason = "it computes something else"
    if _is_flash_3_active():
        registry.restore_flash_attention_impl()
    return reason


def _small_call() -> list[Tensor]:
    """Output and gradients of two causal sequences with fewer queries than keys, on the GPU, in float32."""
    query, key, value = (
        (torch.arange(tokens * heads * 64, device="cuda") * 0.7).sin().view(tokens, heads, 64).bfloat16()
        for tokens, heads in ((40, 2), (70, 1), (70, 1)))
    bounds = torch.tensor(((0, 10, 40), (0, 30, 70)), dtype=torch.int32, device="cuda")
    call = FlashCall(queries=(0, 40), keys=(0, 70), cu_queries=bounds[0], cu_keys=bounds[1], longest_queries=30,
                     longest_keys=40, window=CAUSAL)
    output, state = flash_forward(query, key, value, call, scale=0.125, dropout=0.0)
    gradients = flash_backward(query, (query, key, value, output), state, call, scale=0.125, dropout=0.0)
    return [tensor.float() for tensor in (output, *gradients)]


def _has_registry() -> bool:
    return "activate_flash_attention_impl" in vars(torch.nn.attention)


def _is_flash_3_active() -> bool:
    return _has_registry() and torch.nn.attention.current_flash_attention_impl() == FLASH_3


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)
