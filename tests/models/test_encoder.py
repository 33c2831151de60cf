"""Token states and embeddings against Transformers and Sentence Transformers, over layouts; packing; padding; dtype."""

import dataclasses
import logging

import pytest
import torch
import transformers
from sentence_transformers.sentence_transformer.modules import Pooling

from megatron_embed.errors import ConfigError
from megatron_embed.models import encoder
from megatron_embed.models.encoder import attention_kernel
from megatron_embed.planning.shapes import shape_of
from tests.helpers.families import token_states, whole_bin
from tests.helpers.ranks import run_on_ranks
from tests.helpers.toys import layout, open_model, random_texts, run_config, save_model

LENGTHS = (5, 17, 3, 40, 41, 2, 16, 61, 17)
TOKENS = 208
"""Bin size for all layouts: 202 real tokens and padding."""
LAYOUTS = {"one": layout(), "tp2": layout(2, sp=False), "tp2_sp": layout(2), "pp2": layout(pp=2), "cp2": layout(cp=2),
           "tp2_cp2": layout(2, cp=2)}
KINDS = ("bert", "qwen3_tied", "qwen3_untied")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"bert": save_model(folder / "bert", "bert"),
            "qwen3_tied": save_model(folder / "tied", "qwen3", tie_word_embeddings=True),
            "qwen3_untied": save_model(folder / "untied", "qwen3", tie_word_embeddings=False)}


def world_size(sizes):
    return (sizes["tensor_model_parallel_size"] * sizes["pipeline_model_parallel_size"]
            * sizes["context_parallel_size"])


def reference_states(directory, ids, *, bidirectional=False, dtype=torch.float64):
    """Last hidden states of each sequence alone, [tokens, hidden] each, by Transformers."""
    model = transformers.AutoModel.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()
    states = []
    for sequence in ids:
        mask = torch.zeros(1, 1, len(sequence), len(sequence), dtype=dtype) if bidirectional else None
        with torch.no_grad():
            states.append(model(torch.tensor([sequence]), attention_mask=mask).last_hidden_state[0])
    return states


@pytest.mark.parametrize("kind, name", [
    # The untied model differs in what is read, not in what is computed.
    pytest.param(kind, name, marks=pytest.mark.slow if kind == "qwen3_untied" and name not in ("one", "tp2") else ())
    for kind in KINDS for name in LAYOUTS])
def test_token_states_equal_transformers(models, kind, name):
    ids = random_texts(LENGTHS)
    config = run_config(models[kind], parallel=LAYOUTS[name])
    parts = run_on_ranks(token_states, world_size(LAYOUTS[name]), config, ids, TOKENS)
    expected = torch.cat(reference_states(models[kind], ids)).float()
    assert expected.std() > 0.5
    states = whole_bin(parts, config, TOKENS)
    assert not states.isnan().any()
    torch.testing.assert_close(states[: len(expected)], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["one", "tp2_sp", "cp2"])
def test_bidirectional_decoder_equals_transformers_with_everything_visible(models, name):
    ids = random_texts(LENGTHS)
    config = run_config(models["qwen3_tied"], parallel=LAYOUTS[name], bidirectional=True)
    states = whole_bin(run_on_ranks(token_states, world_size(LAYOUTS[name]), config, ids, TOKENS), config, TOKENS)
    expected = torch.cat(reference_states(models["qwen3_tied"], ids, bidirectional=True)).float()
    causal = torch.cat(reference_states(models["qwen3_tied"], ids)).float()
    assert (expected - causal).abs().max() > 0.1
    torch.testing.assert_close(states[: len(expected)], expected, rtol=0, atol=1e-5)


def embeddings(config, ids, bins, poolings=None):
    """Embeddings of the sequences packed into `bins` (lists of text ids), by (pooling, normalized).

    None before the last stage.
    """
    from megatron_embed.models.encoder import to_device
    from megatron_embed.models.passes import embed
    from megatron_embed.parallel.topology import token_alignment

    opened = open_model(config)
    chunks, topology = opened.chunks, opened.topology
    alignment = token_alignment(config.parallel)
    longest = max(sum(len(ids[text_id]) for text_id in text_ids) for text_ids in bins)
    tokens = -(-longest // alignment) * alignment if topology.pp_size > 1 else None
    batches = [pack_bin(ids, text_ids, tokens, alignment) for text_ids in bins]
    results = {}
    for pooling in poolings or [config.embedding.pooling]:
        on_device = [to_device(batch, topology, pooling, kernel="sdpa", causal=chunks[0].causal) for batch in batches]
        for normalize in (True, False):
            for chunk in chunks:
                chunk.eval()
                chunk.normalize = normalize
            results[pooling, normalize] = embed(chunks, on_device, topology)
    return results if topology.is_last_stage else None


def pack_bin(ids, text_ids, tokens, alignment):
    from megatron_embed.data.packing import pack

    return pack([ids[text_id] for text_id in text_ids], text_ids, tokens=tokens,
                alignment=alignment, pad_token_id=0)


def pooled(states, pooling, *, normalize):
    """Sentence Transformers' own pooling over right-padded states."""
    lengths = torch.tensor([len(state) for state in states])
    padded = torch.nn.utils.rnn.pad_sequence(states, batch_first=True, padding_value=9.0)
    mask = (torch.arange(padded.shape[1]) < lengths[:, None]).to(torch.int64)
    module = Pooling(padded.shape[2], pooling_mode=pooling)
    rows = module({"token_embeddings": padded, "attention_mask": mask})["sentence_embedding"].float()
    return torch.nn.functional.normalize(rows, dim=-1) if normalize else rows


BINS = [[3, 0, 8], [1, 2, 4, 5], [7, 6]]
POOLINGS = ("mean", "cls", "lasttoken", "weightedmean")


@pytest.mark.parametrize("kind, name", [
    pytest.param(kind, name, marks=pytest.mark.slow if kind == "bert" and name not in ("one", "tp2_cp2") else ())
    for kind in ("bert", "qwen3_untied") for name in LAYOUTS])
def test_pooling_equals_sentence_transformers(models, kind, name):
    ids = random_texts(LENGTHS)
    states = reference_states(models[kind], ids)
    config = run_config(models[kind], parallel=LAYOUTS[name])
    results = run_on_ranks(embeddings, world_size(LAYOUTS[name]), config, ids, BINS, POOLINGS)
    last_stage = [result for result in results if result is not None]
    assert len(last_stage) == len(results) // LAYOUTS[name]["pipeline_model_parallel_size"]
    for result in last_stage:
        assert len(result) == 2 * len(POOLINGS)
        for (pooling, normalize), rows in result.items():
            expected = pooled(states, pooling, normalize=normalize)
            torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_one_by_one(models, kind):
    ids = random_texts(LENGTHS)
    config = run_config(models[kind], pooling="lasttoken")
    (packed,) = run_on_ranks(embeddings, 1, config, ids, [list(range(len(ids)))])
    (alone,) = run_on_ranks(embeddings, 1, config, ids, [[text_id] for text_id in range(len(ids))])
    torch.testing.assert_close(packed["lasttoken", True], alone["lasttoken", True], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "qwen3_tied"])
def test_padding_at_the_end_of_the_bin_changes_nothing(models, kind):
    ids = random_texts(LENGTHS)
    config = run_config(models[kind])
    total = sum(LENGTHS)
    tight, padded = (run_on_ranks(token_states, 1, config, ids, tokens)[0][2] for tokens in (total, total + 100))
    torch.testing.assert_close(padded[:total], tight, rtol=0, atol=1e-6)
    assert padded[total:].isfinite().all()


def test_embeddings_are_normalized_in_float32(models):
    config = run_config(models["qwen3_tied"], dtype="bfloat16")
    ids = random_texts(LENGTHS)
    rows = run_on_ranks(embeddings, 1, config, ids, BINS)[0]["mean", True]
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(ids)), rtol=0, atol=1e-6)
    assert (rows != rows.bfloat16().float()).any()
    full = pooled(reference_states(models["qwen3_tied"], ids), "mean", normalize=True)
    assert (rows * full).sum(dim=1).min() > 0.999


def weights_of_vocabulary_that_does_not_divide(config):
    opened = open_model(config)
    return opened.chunks[0].embedding.word_embeddings.weight.detach().clone()


def test_vocabulary_is_padded_to_the_tensor_parallel_ranks(models):
    weight = transformers.AutoModel.from_pretrained(models["bert"]).embeddings.word_embeddings.weight
    assert len(weight) == 103
    parts = run_on_ranks(weights_of_vocabulary_that_does_not_divide, 2, run_config(models["bert"], parallel=layout(2)))
    assert torch.equal(torch.cat(parts)[:103], weight)
    assert torch.cat(parts).shape == (104, 32)


@pytest.mark.parametrize("dtype, attention, parallel, training, expected", [
    ("bfloat16", "auto", {}, {}, "sdpa"), ("float32", "auto", {}, {}, "sdpa"), ("bfloat16", "sdpa", {}, {}, "sdpa"),
    ("bfloat16", "auto", {"context_parallel_size": 2}, {}, "sdpa"),
    ("bfloat16", "auto", {}, {"attention_dropout": 0.1}, "sdpa")])
def test_attention_kernel_on_a_cpu(dtype, attention, parallel, training, expected):
    config = run_config("model", parallel=parallel, training=training, dtype=dtype)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention=attention))
    assert attention_kernel(config) == expected


def hiding_expansion(config):
    return dataclasses.replace(config, embedding=dataclasses.replace(
        config.embedding, head="multi_vector", pooling=None, query_expansion=32, attend_to_expansion=False))


def test_hidden_mask_tokens_are_for_sdpa(monkeypatch):
    monkeypatch.setattr(encoder, "HAS_CUDA", True)
    monkeypatch.setattr(encoder, "why_no_flash", lambda: None)
    config = run_config("model", dtype="bfloat16")
    assert attention_kernel(config) == "flash" and attention_kernel(hiding_expansion(config)) == "sdpa"


@pytest.mark.parametrize("attention, parallel, training, words", [
    ("flash", {}, {}, "a GPU and model.dtype = bfloat16"),
    ("te", {"context_parallel_size": 2}, {}, "context_parallel_size = 2"),
    ("te", {}, {"attention_dropout": 0.1}, "attention_dropout = 0.1"),
    ("flash", {}, {}, "attend_to_expansion = False"), ("te", {}, {}, "attend_to_expansion = False")])
def test_a_kernel_is_refused_where_it_cannot_run(monkeypatch, attention, parallel, training, words):
    monkeypatch.setattr(encoder, "HAS_CUDA", bool(parallel or training))
    monkeypatch.setattr(encoder, "HAS_TRANSFORMER_ENGINE", True)
    config = run_config("model", parallel=parallel, training=training, dtype="bfloat16")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention=attention))
    if "expansion" in words:
        config = hiding_expansion(config)
    with pytest.raises(ConfigError, match=words):
        attention_kernel(config)


@pytest.mark.parametrize("head_dim", [26, 264])
def test_heads_of_other_sizes_are_for_sdpa(monkeypatch, caplog, models, head_dim):
    """26: TinyBERT's."""
    monkeypatch.setattr(encoder, "HAS_CUDA", True)
    shape = dataclasses.replace(shape_of(models["bert"]), head_dim=head_dim)
    config = run_config("model", dtype="bfloat16")
    encoder._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert attention_kernel(config, shape) == "sdpa"
    assert caplog.messages[-1].endswith(f"heads of a multiple of 8 dimensions, at most 256, and the model's have "
                                        f"{head_dim}")
    for wanted in ("flash", "te"):
        asked = dataclasses.replace(config, model=dataclasses.replace(config.model, attention=wanted))
        with pytest.raises(ConfigError, match=f"'{wanted}': its kernels take heads .*{head_dim}; use 'auto' or 'sdpa'"):
            attention_kernel(asked, shape)
    assert attention_kernel(config, dataclasses.replace(shape, head_dim=256)) == "flash"


@pytest.mark.parametrize("attention", ["auto", "flash"])
@pytest.mark.parametrize("parallel, training", [
    ({}, {}), ({"context_parallel_size": 2}, {}), ({}, {"attention_dropout": 0.1}),
    ({"context_parallel_size": 2}, {"attention_dropout": 0.1})])
def test_flash_is_chosen_on_a_gpu_under_context_parallelism_and_dropout_too(monkeypatch, attention, parallel, training):
    monkeypatch.setattr(encoder, "HAS_CUDA", True)
    config = run_config("model", parallel=parallel, training=training, dtype="bfloat16")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention=attention))
    assert attention_kernel(config) == "flash"
