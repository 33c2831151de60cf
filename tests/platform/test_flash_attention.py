"""Our call of torch's flash operators: it fits every torch from 2.6 to 2.14, and a torch that it does not fit is said.

Schemas are those of torchgen/packaged/ATen/native/native_functions.yaml in the wheels of 2.6.0, 2.7.0, 2.8.0, 2.9.0,
2.10.0, 2.11.0, 2.12.0 and 2.14.1; 2.13.0 is the installed one's own. They changed twice: 2.7 renamed two results, 2.12
added two optional arguments.
"""

import dataclasses
import itertools
import logging
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_embed.errors import ConfigError
from megatron_embed.models import encoder
from megatron_embed.models.attention import PackedAttention, PackedSequences
from megatron_embed.models.flash_chunks import FlashSettings, flash_attention, flash_calls
from megatron_embed.platform import doctor
from megatron_embed.platform import flash_attention as operators
from megatron_embed.platform.compat import AttnMaskType, TransformerConfig
from tests.helpers.toys import run_config

FORWARD = ("_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, "
           "SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, "
           "SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None, "
           "Tensor? alibi_slopes=None{more}) -> (Tensor output, Tensor softmax_logsumexp, Tensor {random}, "
           "Tensor debug_attn_mask)")
BACKWARD = ("_flash_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
            "Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, "
            "bool is_causal, Tensor {random}, *, float? scale=None, SymInt? window_size_left=None, "
            "SymInt? window_size_right=None) -> (Tensor, Tensor, Tensor)")
SEED, STATE = "philox_seed, Tensor philox_offset", "rng_state, Tensor unused"
PAGED = ", Tensor? block_table=None, int? num_splits=None"
SCHEMAS = {"2.6.0": (SEED, ""), "2.7.0": (STATE, ""), "2.8.0": (STATE, ""), "2.9.0": (STATE, ""),
           "2.10.0": (STATE, ""), "2.11.0": (STATE, ""), "2.12.0": (STATE, PAGED), "2.14.1": (STATE, PAGED)}
"""torch's version -> names of two results, arguments that 2.12 added."""
HEADS, GROUPS, HEAD_DIM = 4, 2, 8
BOUNDS = (0, 5, 6, 19)


def schemas(version):
    random, more = SCHEMAS[version]
    return FORWARD.format(random=random, more=more), BACKWARD.format(random=random)


def shares(query, key, bounds, left, right):
    """Softmax weights [heads, queries, keys] of every sequence, back to back."""
    for start, end in itertools.pairwise(bounds):
        part = slice(start, end)
        scores = torch.einsum("qhd,khd->hqk", query[part], key[part]) / math.sqrt(HEAD_DIM)
        ahead = torch.arange(end - start)[None] - torch.arange(end - start)[:, None]
        hidden = (ahead > right if right >= 0 else ahead > end) | (ahead < -left if left >= 0 else ahead < -end)
        yield part, scores.masked_fill(hidden, float("-inf")).softmax(-1)


def attend(query, key, value, bounds, left, right):
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    return torch.cat([torch.einsum("hqk,khd->qhd", weights, value[part])
                      for part, weights in shares(query, key, bounds, left, right)])


def install(version):
    """Operators of a torch of this version, with the recorded schemas, which torch's own code then binds calls to.

    Their dropout scales, so that a rate that one of the two does not get is seen.
    """
    library = torch.library.Library(f"recorded_{version.replace('.', '_')}", "DEF")

    def forward(query, key, value, cu_q, cu_k, max_q, max_k, dropout, is_causal, debug, *, scale=None,
                window_size_left=None, window_size_right=None, **others):
        assert (debug, scale) == (False, pytest.approx(1 / math.sqrt(HEAD_DIM))), others
        assert not any(others.values()) and cu_q.dtype == torch.int32 and max_q == 13
        assert is_causal == ((window_size_left, window_size_right) == (-1, 0))
        output = (1 - dropout) * attend(query, key, value, cu_q.tolist(), window_size_left, window_size_right)
        return (output, query.new_ones(query.shape[1], len(query)), torch.full((2,), 7), torch.full((), 8),
                query.new_empty(0))

    def backward(gradient, query, key, value, out, logsumexp, cu_q, cu_k, max_q, max_k, dropout, is_causal, state,
                 unused, *, scale=None, window_size_left=None, window_size_right=None):
        assert logsumexp.shape == (HEADS, len(query)) and state.eq(7).all() and unused == 8
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
            again = (1 - dropout) * attend(*inputs, cu_q.tolist(), window_size_left, window_size_right)
        assert torch.equal(again, out)
        return torch.autograd.grad(again, inputs, gradient)

    for schema, function in zip(schemas(version), (forward, backward), strict=True):
        library.define(schema)
        library.impl(schema.partition("(")[0], function, "CPU")
    return library, getattr(torch.ops, library.ns)


@pytest.mark.parametrize("causal, window, dropout", [(True, None, 0.0), (False, None, 0.25), (True, (3, 0), 0.0)],
                         ids=["causal", "all, dropout", "window"])
@pytest.mark.parametrize("version", SCHEMAS)
def test_call_fits_the_operators_of_every_torch(monkeypatch, version, causal, window, dropout):
    library, recorded = install(version)
    monkeypatch.setattr(operators, "forward_operator", lambda: recorded._flash_attention_forward.default)
    monkeypatch.setattr(operators, "backward_operator", lambda: recorded._flash_attention_backward.default)
    assert operators.why_no_flash.__wrapped__() is None
    torch.manual_seed(1)
    inputs = [torch.randn(BOUNDS[-1], heads, HEAD_DIM, dtype=torch.float64, requires_grad=True)
              for heads in (HEADS, GROUPS, GROUPS)]
    calls = flash_calls(torch.tensor(BOUNDS, dtype=torch.int32), ((0, 19),), causal, window)
    output = flash_attention(*inputs, calls, FlashSettings(scale=1 / math.sqrt(HEAD_DIM), dropout=dropout,
                                                           cp_group=None))
    weights = torch.randn_like(output)
    expected = (1 - dropout) * attend(*inputs, BOUNDS, *(window or ((-1, 0) if causal else (-1, -1))))
    torch.testing.assert_close(output, expected)
    ours, right = (torch.autograd.grad(result, inputs, weights) for result in (output, expected))
    torch.testing.assert_close(ours, right)
    assert all(gradient.any() for gradient in ours)
    library._destroy()


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("groups, causal", [(HEADS, False), (GROUPS, True)], ids=["encoder", "decoder"])
def test_kernel_is_flash_whatever_the_heads(groups, causal):
    """torch 2.14's varlen_attn would take cuDNN's for an encoder of more than 128 tokens. On meta tensors, so the
    installed torch binds the call."""
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * 64, num_attention_heads=HEADS,
                               num_query_groups=groups, kv_channels=64, attention_dropout=0.0)
    module = PackedAttention(config, 1, AttnMaskType.causal if causal else AttnMaskType.no_mask, "self")
    query, key, value = (torch.empty(310, 1, heads, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
                         for heads in (HEADS, groups, groups))
    bounds = torch.tensor((0, 200, 300), dtype=torch.int32)
    (call,) = flash_calls(bounds, ((0, 310),), causal)
    call = dataclasses.replace(call, cu_queries=call.cu_queries.to("meta"), cu_keys=call.cu_keys.to("meta"))
    packed = PackedSequences(cu_seqlens=bounds.to("meta"), max_seqlen=200, num_tokens=300, calls=(call,))
    with Recorded() as recorded:
        output = module(query, key, value, None, packed_seq_params=packed)
        output.sum().backward()
    assert output.shape == (310, 1, HEADS * 64) and key.grad.shape == key.shape
    kernels = [name for name in recorded.names if "attention" in name or "attn" in name]
    assert kernels == ["aten._flash_attention_forward.default", "aten._flash_attention_backward.default"]


def missing_operator():
    raise AttributeError("_flash_attention_backward")


@pytest.fixture(params=["missing", "renamed argument", "new argument", "fewer results"])
def unfit(request, monkeypatch):
    """A torch whose backward operator is not the one we call. Returns words of the reason."""
    schema = {"renamed argument": BACKWARD.replace("grad_out", "dout"),
              "new argument": BACKWARD.replace("float dropout_p", "float softcap, float dropout_p"),
              "fewer results": BACKWARD.replace("(Tensor, Tensor, Tensor)", "(Tensor, Tensor)"),
              "missing": BACKWARD}[request.param].format(random=STATE)
    library = torch.library.Library("unfit", "DEF")
    library.define(schema)
    operator = missing_operator if request.param == "missing" else (
        lambda: torch.ops.unfit._flash_attention_backward.default)
    monkeypatch.setattr(operators, "backward_operator", operator)
    operators.why_no_flash.cache_clear()
    encoder._say_once.cache_clear()
    monkeypatch.setattr(encoder, "HAS_CUDA", True)
    yield ("has no operator aten::_flash_attention_backward" if request.param == "missing"
           else "has other arguments or results in unfit::_flash_attention_backward")
    library._destroy()
    operators.why_no_flash.cache_clear()


def test_another_torch_is_said_and_done_without(unfit, caplog):
    config = run_config("model", dtype="bfloat16")
    with caplog.at_level(logging.WARNING):
        assert [encoder.attention_kernel(config) for _ in range(2)] == ["sdpa", "sdpa"]
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"model.attention = auto is sdpa: torch {torch.__version__} ") and unfit in message
    asked = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="flash"))
    with pytest.raises(ConfigError) as refused:
        encoder.attention_kernel(asked)
    assert refused.value.key == "model.attention"
    assert unfit in str(refused.value) and "use 'auto' or 'sdpa'" in str(refused.value)
    check = doctor._flash()
    assert (check.value, check.remedy) == ("none", "") and unfit in check.note


def test_this_torch_fits():
    assert operators.why_no_flash() is None
    check = doctor._flash()
    assert check.value == "FlashAttention 2, by torch's own operators" and "H100" in check.note


class Registry:
    """torch.nn.attention's switch of flash kernels, and a Hopper GPU; `error`: raised where they are loaded."""

    def __init__(self, monkeypatch):
        self.active, self.calls, self.error = None, [], None
        for name, function in (("activate", self.activate), ("restore", self.restore)):
            monkeypatch.setattr(torch.nn.attention, f"{name}_flash_attention_impl", function)
        monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: self.active)
        monkeypatch.setattr(torch.nn.attention, "list_flash_attention_impls", lambda: ["FA3", "FA4"])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        monkeypatch.setattr(operators.importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(operators, "_small_call", self.call)
        self.results = {None: [torch.ones(2), torch.ones(3)], "FA3": [torch.ones(2), torch.full((3,), 1.001)]}

    def call(self):
        if isinstance(self.results[self.active], Exception):
            raise self.results[self.active]
        return self.results[self.active]

    def activate(self, name):
        self.calls.append(name)
        if self.error is not None:
            raise self.error
        self.active = name

    def restore(self):
        self.calls.append("restore")
        self.active = None


@pytest.fixture
def registry(monkeypatch):
    operators._log_once.cache_clear()
    return Registry(monkeypatch)


def test_flash_attention_3_serves_where_torch_has_it_and_there_is_no_dropout(registry, caplog):
    with caplog.at_level(logging.INFO):
        sentences = [operators.choose_version(dropout=rate) for rate in (0.0, 0.0, 0.1, 0.1, 0.0)]
    assert registry.calls == ["FA3", "restore", "FA3"]
    assert sentences[0] == sentences[1] == sentences[4] == "flash attention is FlashAttention 3"
    assert "no dropout (training.attention_dropout = 0.1)" in sentences[2]
    assert [record.getMessage() for record in caplog.records] == [sentences[0], sentences[2]]
    assert doctor._flash().value == "FlashAttention 3, by torch's own operators"


@pytest.mark.parametrize("lacks, words", [
    ("registry", "has no activate_flash_attention_impl"), ("kernel", "has no activate_flash_attention_impl"),
    ("package", "flash_attn_interface is not installed"), ("gpu", "compute capability 9"),
    ("loads", "cannot call it: undefined symbol"), ("arguments", "cannot call it: fwd() expected"),
    ("numbers", "computes something else")])
def test_flash_attention_2_serves_elsewhere_and_the_reason_is_said(registry, monkeypatch, lacks, words):
    if lacks == "registry":
        monkeypatch.delattr(torch.nn.attention, "activate_flash_attention_impl")
    if lacks == "kernel":
        monkeypatch.setattr(torch.nn.attention, "list_flash_attention_impls", lambda: ["FA4"])
    if lacks == "package":
        monkeypatch.setattr(operators.importlib.util, "find_spec", lambda name: None)
    if lacks == "gpu":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    registry.error = OSError("undefined symbol") if lacks == "loads" else None
    if lacks == "arguments":
        registry.results["FA3"] = TypeError("fwd() expected at most 33 arguments")
    if lacks == "numbers":
        registry.results["FA3"] = [torch.ones(2), torch.full((3,), 1.1)]
    sentence = operators.choose_version(dropout=0.0)
    assert sentence.startswith("flash attention is torch's own FlashAttention 2, not 3: ") and words in sentence
    assert registry.active is None
    assert registry.calls == {"loads": ["FA3"], "arguments": ["FA3", "restore"],
                              "numbers": ["FA3", "restore"]}.get(lacks, [])
