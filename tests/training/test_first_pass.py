"""Larger micro-batches of the first pass: how many, of which size, and when there are none."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch

from megatron_embed.config.load import load_config
from megatron_embed.data.bins import bin_sizes
from megatron_embed.errors import ConfigError
from megatron_embed.planning.memory import activation_bytes, auto_first_pass, first_pass_bytes, grid_of
from megatron_embed.planning.shapes import shape_of
from megatron_embed.training.first_pass import FirstPass, build_first_pass
from tests.helpers.ranks import run_on_ranks
from tests.helpers.step_reference import ROWS, objective_settings
from tests.helpers.toys import REPOSITORY, layout, pack_all, random_texts, run_config, save_model

LARGE = str(REPOSITORY / "configs" / "qwen3_8b_embed_tp2_8xh100.yaml")


@pytest.mark.parametrize("first_pass, counts", [
    (FirstPass(micro_batches=4), {1: 1, 4: 1, 5: 2, 17: 5}),
    (FirstPass(micro_batches=3, multiple=2), {2: 2, 4: 2, 6: 2, 8: 4, 14: 6}),  # an interleaved pipeline of two stages
    (FirstPass(micro_batches=4, fewest=8), {4: 4, 12: 8, 32: 8, 64: 16}),       # a pipeline stays filled
])
def test_number_of_micro_batches(first_pass, counts):
    assert {count: first_pass.count(count) for count in counts} == counts


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("budget", [64, None])
def test_neighbours_become_one(budget, uniform):
    lengths = [[30, 30], [20, 8], [64], [5], [33]]
    micro_batches = [dataclasses.replace(
        pack_all(random_texts(texts, seed=index), run_config("model")), rows=torch.arange(len(texts)) + 10 * index)
        for index, texts in enumerate(lengths)]
    first = FirstPass(micro_batches=2, alignment=4, budget=budget, uniform_size=uniform)(micro_batches)
    assert [micro.rows.tolist() for micro in first] == [[0, 1], [10, 11, 20], [30, 40]]
    assert [micro.num_tokens for micro in first] == [60, 92, 38]
    assert torch.equal(first[0].token_ids[:60], micro_batches[0].token_ids[:60])
    assert torch.equal(first[1].token_ids[28:92], micro_batches[2].token_ids[:64])
    sizes = [micro.token_ids.numel() for micro in first]
    assert sizes == ([96] * 3 if budget and uniform else [64, 96, 48] if budget else [92] * 3 if uniform
                     else [60, 92, 40])
    assert set(sizes) <= set(bin_sizes(128, 4)) or budget is None


def first_pass_of(config, device="cuda"):
    """The first pass on a device of this type, of a data-parallel world of the size that the layout asks for."""
    sizes = config.parallel
    topology = SimpleNamespace(device=torch.device(device), world_size=8, pp_size=sizes.pipeline_model_parallel_size,
                               num_model_chunks=sizes.virtual_pipeline_model_parallel_size or 1)
    return build_first_pass(config, shape_of(config.model.path), topology)


def test_auto_is_four_on_gpus_and_off_elsewhere(caplog):
    config = load_config(LARGE, [])
    assert first_pass_of(config) == FirstPass(micro_batches=4, alignment=2, budget=13312)
    assert first_pass_of(config, "cpu") is None
    assert first_pass_of(load_config(LARGE, ["objective.negatives=micro_batch"])) is None
    pipeline = load_config(LARGE, ["parallel.pipeline_model_parallel_size=2",
                                   "parallel.virtual_pipeline_model_parallel_size=2"])
    assert first_pass_of(pipeline) == FirstPass(micro_batches=4, alignment=2, budget=13312, fewest=32, multiple=2,
                                                uniform_size=True)
    with caplog.at_level(logging.INFO):
        assert first_pass_of(config) and not caplog.records
        for dropout in (["training.hidden_dropout=0.1"], ["training.attention_dropout=0.1"],
                        ["lora.rank=4", "lora.dropout=0.1"]):
            assert first_pass_of(load_config(LARGE, dropout)) is None
    assert len(caplog.records) == 3 and all("dropout is on" in record.message for record in caplog.records)


def test_a_number_is_obeyed_on_any_device():
    config = load_config(LARGE, ["training.first_pass_micro_batches=3", "parallel.pipeline_model_parallel_size=2"])
    assert first_pass_of(config, "cpu") == first_pass_of(config) == FirstPass(
        micro_batches=3, alignment=2, budget=13312, uniform_size=True)
    assert first_pass_of(load_config(LARGE, ["training.first_pass_micro_batches=1"])) is None


def test_auto_needs_no_more_memory_than_the_second_pass():
    """Recomputation leaves little for activations, and experts copy tokens."""
    counts = set()
    for name in ("qwen3_8b_embed_tp2_8xh100", "qwen3_30b_a3b_embed_pp2_ep8_16xh100"):
        for recompute in ("none", "full"):
            for stages in (2, 16):
                config = load_config(str(REPOSITORY / "configs" / f"{name}.yaml"), [
                    f"training.recompute={recompute}", f"parallel.pipeline_model_parallel_size={stages}"])
                shape, grid = shape_of(config.model.path), grid_of(config, 128)
                count = auto_first_pass(config, shape, grid)
                least = min(activation_bytes(config, shape, grid, stage) for stage in range(stages))
                assert first_pass_bytes(config, shape, grid, count) <= least
                assert count == 4 or first_pass_bytes(config, shape, grid, count + 1) > least
                counts.add(count)
    assert 4 in counts and len(counts) > 1


@pytest.mark.parametrize("settings, words", [
    ({"training": {"first_pass_micro_batches": 0}}, "must be >= 1 or auto"),
    ({"training": {"first_pass_micro_batches": 2, "hidden_dropout": 0.1}}, "drop the same"),
    ({"training": {"first_pass_micro_batches": 2}, "lora": {"rank": 4, "dropout": 0.1}}, "drop the same"),
    ({"training": {"first_pass_micro_batches": 2}, "objective": {"negatives": "micro_batch"}}, "has no effect"),
])
def test_refusals(settings, words):
    with pytest.raises(ConfigError, match=f"training.first_pass_micro_batches = .*{words}") as raised:
        run_config("model", **settings)
    assert raised.value.key == "training.first_pass_micro_batches"


def embeddings_of_passes(config):
    """(embeddings of the first pass, of the second pass, by row; runs of the model in each and in an evaluation; values
    of an evaluation in micro-batches of the first pass, and of the second)."""
    import megatron_embed.training.grad_cache as grad_cache
    from tests.helpers.step_reference import build

    built, batch = build(config)
    seen, original, first = [], grad_cache.embed, []
    built.chunks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))

    def recorded(*arguments, **before):
        first.append((original(*arguments, **before), len(seen)))
        return first[0][0]

    grad_cache.embed = recorded
    try:
        built.gradients(batch)
    finally:
        grad_cache.embed = original
    (embeddings, runs), rows = first[0], torch.cat([micro.valid_rows for micro in batch.micro_batches])
    second = torch.cat(seen[runs:])[rows.argsort()]
    counts, evaluated = [runs, len(seen) - runs], []
    for gradients in (built.gradients, dataclasses.replace(built.gradients, first_pass=None)):
        seen.clear()
        evaluated.append(gradients.evaluate(batch).values)
        counts.append(len(seen))
    return embeddings, second, counts, evaluated


def test_both_passes_give_the_same_embeddings(tmp_path):
    model = save_model(tmp_path / "qwen3", "qwen3", tokenizer=True)
    config = run_config(model, parallel=layout(), objective=objective_settings(),
                        training={"global_batch_size": ROWS, "micro_batch_size": 2, "first_pass_micro_batches": 4})
    ((first, second, counts, evaluated),) = run_on_ranks(embeddings_of_passes, 1, config)
    assert counts == [2, 6, 2, 6]
    torch.testing.assert_close(*evaluated, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)
    assert first.std(dim=0).min() > 0
