"""Transformer Engine's attention is asked for the same numbers as our own: through a stand-in for it, on the CPU."""

import dataclasses

import pytest
import torch

from megatron_embed.errors import ConfigError
from megatron_embed.models import encoder
from megatron_embed.models.attention import PackedAttention, PackedSequences
from megatron_embed.models.encoder import attention_kernel
from megatron_embed.models.segments import attention_window, context_chunks, group_segments
from megatron_embed.models.te_attention import TransformerEngineAttention
from megatron_embed.platform.compat import AttnMaskType, TransformerConfig
from tests.helpers import te_stand_in
from tests.helpers.ranks import run_on_ranks
from tests.helpers.toys import layout, open_model, pack_all, random_texts, run_config, save_model

HEADS, HEAD_DIM = 4, 8
LENGTHS = (5, 1, 17, 9, 5, 30)


def outcome(module, packed, tensors, weights):
    """The output, and gradients of a weighted sum of it."""
    output = module(*(tensor[:, None] for tensor in tensors), None, packed_seq_params=packed)
    return [output, *torch.autograd.grad((output[:, 0] * weights).sum(), tensors)]


@pytest.mark.parametrize("sliding_window", [None, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_values_and_gradients_equal_our_attention(groups, causal, sliding_window):
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    real, tokens, window = sum(LENGTHS), sum(LENGTHS) + 7, attention_window(sliding_window, causal)
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS,
                               num_query_groups=groups, kv_channels=HEAD_DIM, attention_dropout=0.0)
    mask = AttnMaskType.causal if causal else AttnMaskType.no_mask
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(tokens, count, HEAD_DIM, generator=generator, dtype=torch.float64, requires_grad=True)
               for count in (HEADS, groups, groups)]
    weights = torch.randn(tokens, HEADS * HEAD_DIM, generator=generator, dtype=torch.float64)
    packed = PackedSequences(cu_seqlens=bounds, max_seqlen=max(LENGTHS), num_tokens=real, window=window)
    with te_stand_in.installed():
        outputs = outcome(TransformerEngineAttention(config, 1, mask, "self", window=window), packed, tensors, weights)
    packed.index_groups(group_segments(bounds, context_chunks(tokens, 0, 1), causal, torch.device("cpu"), window),
                        tokens, keys_are_local=True)
    expected = outcome(PackedAttention(config, 1, mask, "self", window=window), packed, tensors, weights)
    assert not outputs[0][real:].any()
    for ours, theirs in zip(expected, outputs, strict=True):
        assert ours.abs().max() > 0.1
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_model(folder / kind, kind) for kind in ("bert", "qwen3")}


def by_kernel(config, kernels):
    """On every rank, by kernel: (embeddings, gradients by name, names of the tensors that a checkpoint holds)."""
    with te_stand_in.installed():
        return [_embedded(config, kernel) for kernel in kernels]


def _embedded(config, kernel):
    from megatron_embed.checkpoint.load import model_state
    from megatron_embed.models.encoder import to_device

    original, encoder.attention_kernel = encoder.attention_kernel, lambda config, shape: kernel
    try:
        opened = open_model(config)
    finally:
        encoder.attention_kernel = original
    (model,) = opened.chunks
    wanted = TransformerEngineAttention if kernel == "te" else PackedAttention
    assert all(isinstance(layer.self_attention.core_attention, wanted) for layer in model.decoder.layers)
    micro = to_device(pack_all(random_texts(LENGTHS), config, tokens=80), opened.topology, "mean", kernel=kernel,
                      causal=model.causal, shape=model.shape)
    embeddings = model(micro)
    (embeddings[:, 0] - embeddings[:, 1] * torch.arange(len(LENGTHS))).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return embeddings.detach(), gradients, sorted(model_state([model])["chunk0"])


@pytest.mark.parametrize("kind, ranks, sizes", [("bert", 1, layout()), ("qwen3", 2, layout(2))], ids=["bert", "qwen3"])
def test_a_model_gives_the_same_vectors_and_gradients(models, kind, ranks, sizes):
    for ours, theirs in run_on_ranks(by_kernel, ranks, run_config(models[kind], parallel=sizes), ["sdpa", "te"]):
        torch.testing.assert_close(theirs[0], ours[0], rtol=0, atol=1e-6)
        assert theirs[1].keys() == ours[1].keys()
        assert theirs[2] == ours[2]
        for name, gradient in ours[1].items():
            torch.testing.assert_close(theirs[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
        assert sum(bool(gradient.any()) for gradient in ours[1].values()) > 10


def asked_for(**settings):
    config = run_config("model", **{"dtype": "bfloat16", **settings})
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention="te"))


@pytest.mark.parametrize("has_cuda, has_te, settings, words", [
    (False, True, {}, "'te' needs a GPU and model.dtype = bfloat16; use 'auto'"),
    (True, True, {"dtype": "float32"}, "'te' needs a GPU and model.dtype = bfloat16"),
    (True, False, {}, r"'te': Transformer Engine is not installed; pip install 'megatron_embed\[gpu\]'"),
    (True, True, {"parallel": {"context_parallel_size": 2}}, "does not go with parallel.context_parallel_size = 2"),
    (True, True, {"training": {"attention_dropout": 0.1}}, "does not go with training.attention_dropout = 0.1")])
def test_it_is_refused_where_it_cannot_run(monkeypatch, has_cuda, has_te, settings, words):
    monkeypatch.setattr(encoder, "HAS_CUDA", has_cuda)
    monkeypatch.setattr(encoder, "HAS_TRANSFORMER_ENGINE", has_te)
    with pytest.raises(ConfigError, match=words):
        attention_kernel(asked_for(**settings))


def test_it_is_taken_only_if_asked_for(monkeypatch):
    monkeypatch.setattr(encoder, "HAS_CUDA", True)
    monkeypatch.setattr(encoder, "HAS_TRANSFORMER_ENGINE", True)
    assert attention_kernel(asked_for()) == "te"
    assert attention_kernel(run_config("model", dtype="bfloat16")) == "flash"
