"""Every transform in both directions, and its shards against the whole parameter split as the model splits it."""

from dataclasses import replace

import pytest
import torch

from megatron_embed.convert.hf_directory import HFDirectory, hf_weight_shards
from megatron_embed.convert.tables.lookup import rules_for
from megatron_embed.convert.tables.transforms import (
    Context,
    FuseGateUp,
    FuseQKV,
    PadVocabulary,
    Rename,
    UnstackGateUp,
    UnstackQKV,
    expand_braces,
)
from megatron_embed.errors import CheckpointError
from megatron_embed.models.families import model_shape
from tests.helpers.toys import save_toy


def slices_of(tensors):
    """The function that reads slices of a dictionary of tensors."""
    return lambda name, dim, start, stop: tensors[name].narrow(dim, start, stop - start).contiguous()


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """4 query heads of 8 in 2 groups, hidden 24, MLP 40, vocabulary 103."""
    return model_shape(save_toy(tmp_path_factory.mktemp("qwen3"), "Qwen3Model"))


CASES = [
    Rename("a", "x", "hidden_size"),
    Rename("a", "x", "ffn_hidden_size hidden_size", shard_dim=0),
    Rename("a", "x", "hidden_size query_size", shard_dim=1),
    FuseQKV("layers.*.a", "l.*.{q,k,v}_proj", "hidden_size"),
    FuseQKV("layers.*.a", "l.*.{q,k,v}_bias", ""),
    FuseGateUp("layers.*.a", "l.*.{gate,up}", "ffn_hidden_size hidden_size"),
    UnstackQKV("layers.*.a", "l.*.qkv", "hidden_size"),
    UnstackGateUp("layers.*.a", "l.*.gate_up", "ffn_hidden_size hidden_size"),
    PadVocabulary("a", "x"),
]


def split_as_the_model_does(rule, whole, rank, size, shape):
    """Independent of the code under test: Megatron's own description of each layout."""
    if isinstance(rule, FuseGateUp):
        gate, up = whole.chunk(2)
        return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
    if isinstance(rule, FuseQKV):
        groups = whole.view(shape.num_query_groups, -1, *whole.shape[1:])
        return groups.chunk(size)[rank].flatten(0, 1)
    if isinstance(rule, PadVocabulary):
        return whole.chunk(size)[rank]
    return whole if rule.shard_dim is None else whole.chunk(size, rule.shard_dim)[rank]


def back_to_hf(rule, whole, context):
    """The Hugging Face tensors of a whole parameter, as `row_ranges` says."""
    tensors = {name: torch.full(context.sizes(words), torch.nan)
               for name, words in zip(rule.hf_names(context), rule.hf_shapes(), strict=True)}
    for rows in rule.row_ranges(replace(context, padded_vocab_size=None)):
        target = tensors[rule.hf_names(context)[rows.part]]
        target[rows.hf_start:rows.hf_start + rows.rows] = whole[rows.our_start:rows.our_start + rows.rows]
    return tensors


def random_tensors(rule, context):
    return {name: torch.randn(context.sizes(words))
            for name, words in zip(rule.hf_names(context), rule.hf_shapes(), strict=True)}


@pytest.mark.parametrize("rule", CASES, ids=lambda rule: f"{type(rule).__name__}-{rule.hf_shapes()[0].strip()}")
def test_round_trip_is_bit_equal_and_shards_are_the_models(rule, shape):
    context = Context(shape=shape, layer=5, padded_vocab_size=120)
    tensors = random_tensors(rule, context)
    whole = rule.to_ours(slices_of(tensors), context)
    assert whole.shape == rule.ours_shape(context)
    back = back_to_hf(rule, whole, context)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in back)
    for rank in range(2):
        assert torch.equal(rule.shard(slices_of(tensors), context, rank, 2),
                           split_as_the_model_does(rule, whole, rank, 2, shape))


def test_qkv_rows_go_group_by_group(shape):
    rule = CASES[4]
    q, k, v = torch.arange(32.0), 100 + torch.arange(16.0), 200 + torch.arange(16.0)
    fused = rule.to_ours(slices_of({"l.0.q_bias": q, "l.0.k_bias": k, "l.0.v_bias": v}), Context(shape=shape, layer=0))
    first_group, second_group = fused.chunk(2)
    assert torch.equal(first_group, torch.cat([q[:16], k[:8], v[:8]]))
    assert torch.equal(second_group, torch.cat([q[16:], k[8:], v[8:]]))


def test_vocabulary_padding_is_zero_and_cut_on_the_way_out(shape):
    rule, context = PadVocabulary("a", "x"), Context(shape=shape, padded_vocab_size=256)
    tensor = torch.randn(103, 24)
    shards = [rule.shard(slices_of({"x": tensor}), context, rank, 4) for rank in range(4)]
    whole = torch.cat(shards)
    assert whole.shape == (256, 24)
    assert torch.equal(whole[:103], tensor)
    assert not whole[103:].any()
    assert [len(shard) for shard in shards] == [64] * 4
    assert torch.equal(back_to_hf(rule, whole, Context(shape=shape))["x"], tensor)


def test_sizes_that_do_not_divide_are_refused_with_their_key(shape):
    context = Context(shape=shape, layer=0, padded_vocab_size=104)
    for rule, match in ((CASES[3], "num_key_value_heads = 2 cannot be split over .*tensor_model_parallel_size = 4"),
                        (CASES[2], r"num_attention_heads \* head_dim = 32 .* = 3"),
                        (CASES[-1], "padded_vocab_size = 104 .* = 3")):
        with pytest.raises(CheckpointError, match=match):
            rule.shard(slices_of(random_tensors(rule, context)), context, 0, 4 if rule is CASES[3] else 3)


def test_expand_braces():
    assert expand_braces("a.b") == ("a.b",)
    assert expand_braces("a.{q,k}_proj.{w,b}") == ("a.q_proj.w", "a.q_proj.b", "a.k_proj.w", "a.k_proj.b")


@pytest.mark.parametrize("kind", ["BertModel", "XLMRobertaModel", "Qwen2Model", "Qwen3Model", "Qwen3MoeModel",
                                  "MixtralModel"])
def test_a_rank_reads_only_its_share_of_the_files(kind, tmp_path, monkeypatch):
    source = HFDirectory(save_toy(tmp_path, kind))
    family = rules_for(source.shape.family)
    rows = list(family.applied_rules(source.shape))
    names = [context.name(rule.ours) for rule, context in rows]
    whole = dict(hf_weight_shards(source, names=names, tp_rank=0, tp_size=1, padded_vocab_size=104))
    assert list(whole) == names

    read_bytes = []
    plain_fill = type(source._files["model.safetensors"])._read_into

    def counting_fill(file, target, offset):
        read_bytes.append(len(target))
        plain_fill(file, target, offset)

    monkeypatch.setattr(type(source._files["model.safetensors"]), "_read_into", counting_fill)
    for rank in range(2):
        read_bytes.clear()
        shards = dict(hf_weight_shards(source, names=names, tp_rank=rank, tp_size=2, padded_vocab_size=104,
                                       etp_rank=rank, etp_size=2))
        padding_bytes = (104 - source.shape.vocab_size) * source.shape.hidden_size * 4 if rank == 1 else 0
        assert sum(read_bytes) == sum(shard.nbytes for shard in shards.values()) - padding_bytes
        for (rule, _), name in zip(rows, names, strict=True):
            bare = replace(rule, ours=name)
            expected = split_as_the_model_does(bare, whole[name], rank, 2, source.shape)
            assert torch.equal(shards[name], expected), name
    source.close()


def test_a_parameter_outside_the_table_is_refused(tmp_path):
    name = "decoder.layers.1.mlp.linear_fc9.weight"
    with HFDirectory(save_toy(tmp_path, "Qwen3Model")) as source, \
            pytest.raises(CheckpointError, match=f"{name}: no rule of the qwen3 weight table"):
        list(hf_weight_shards(source, names=[name], tp_rank=0, tp_size=1, padded_vocab_size=103))


def test_an_unknown_family_is_refused():
    with pytest.raises(CheckpointError, match="'gpt9' has no weight table; known: bert, roberta, xlm-roberta, "):
        rules_for("gpt9")
