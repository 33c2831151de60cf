"""Slices of the optimizer's state hold, bit for bit, what Megatron would have gathered, and go to every layout."""

import dataclasses
import itertools
import math

import pytest
import torch

from megatron_embed.config.optimizer import OptimizerConfig
from tests.checkpoint.moves import ALL_MODULES, LAYOUTS, Layout, save_toy
from tests.helpers.old_checkpoints import gathered_optimizer_state
from tests.helpers.optimizer_state import gradient_of
from tests.helpers.ranks import run_on_ranks
from tests.helpers.toys import layout, open_model, run_config, save_model

MORE = {**LAYOUTS, "DP3": Layout(ranks=3, parallel=layout()), "DP4": Layout(ranks=4, parallel=layout())}
VOCABULARY = 103
"""Tokens of the dense model, which tensor parallelism does not divide."""
LORA = {"rank": 4, "target_modules": list(ALL_MODULES)}


def test_boxes_are_the_elements_of_a_range():
    from megatron_embed.checkpoint.optimizer_slices import boxes

    for shape in ((5,), (3, 4), (1, 6), (6, 1), (2, 3, 4)):
        whole = torch.arange(math.prod(shape)).view(shape)
        for start, stop in itertools.combinations(range(whole.numel() + 1), 2):
            parts = [whole[tuple(slice(offset, offset + size) for offset, size in zip(*box, strict=True))].flatten()
                     for box in boxes(shape, start, stop)]
            assert torch.cat(parts).tolist() == list(range(start, stop))
            assert len(parts) <= 2 * len(shape) - 1 and all(map(len, parts))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    # Rows of 48, 80 and 96 elements: data-parallel ranks' shares, of multiples of 128, end within them.
    return {True: save_model(folder / "dense", "qwen3", hidden_size=48, intermediate_size=80,
                               vocab_size=VOCABULARY),
            False: save_toy(folder / "experts")}


def configured(path, name, *, distributed=True, **settings):
    config = run_config(path, parallel=MORE[name].parallel, **settings)
    return dataclasses.replace(config, optimizer=OptimizerConfig(distributed=distributed))


def open_optimizer(config):
    """(this rank's chunks, its optimizer)."""
    from megatron_embed.training.optimizer import build_optimizer, wrap_in_ddp

    opened = open_model(config)
    return opened.chunks, build_optimizer(config, wrap_in_ddp(opened.chunks, config, opened.topology), opened.topology)


def save(state, folder, strategy=None):
    import torch.distributed as dist

    from megatron_embed.platform.compat import dist_checkpointing

    (folder / "model").mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(state, str(folder / "model"), sharded_strategy=strategy)


def step_and_save(config, folder):
    """Two steps with known gradients, then the state as slices in folder/new and as Megatron gathers it in folder/old.
    Returns bytes of the tensors that this rank wrote as slices."""
    import torch.distributed as dist

    from megatron_embed.checkpoint.load import model_state
    from megatron_embed.checkpoint.optimizer_state import optimizer_to_save
    from megatron_embed.platform.compat import parallel_save

    chunks, optimizer = open_optimizer(config)
    for step in range(2):
        for chunk in chunks:
            for name, parameter in chunk.global_parameters().items():
                if parameter.requires_grad:
                    parameter.main_grad.copy_(gradient_of(name, parameter.shape, step))
        optimizer.step()
    model = model_state(chunks)
    save({"model": model, "optimizer": optimizer_to_save(optimizer, model)}, folder / "new", parallel_save())
    model = model_state(chunks)
    save({"model": model, "optimizer": gathered_optimizer_state(optimizer, model)}, folder / "old")
    dist.barrier()
    return sum(file.stat().st_size for file in (folder / "new" / "model").glob(f"__{dist.get_rank()}_*.distcp"))


def load_and_save(config, source, folder):
    """Other parameters and an optimizer without state take those of `source`; then `folder` as Megatron gathers it.
    Returns the steps of each group of parameters."""
    from megatron_embed.checkpoint.load import TENSORS, _load, _load_models, keys_of, model_state
    from megatron_embed.checkpoint.optimizer_state import OptimizerRestore

    chunks, optimizer = open_optimizer(config)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.add_(1.0)
    model = model_state(chunks)
    restore = OptimizerRestore(optimizer, model)
    loaded = _load({"model": model, TENSORS: restore.wanted(keys_of(source))}, source)
    _load_models(chunks, loaded["model"])
    restore.load(loaded[TENSORS], loaded["optimizer"])
    model = model_state(chunks)
    save({"model": model, "optimizer": gathered_optimizer_state(optimizer, model)}, folder)
    return [group["step"] for part in optimizer.chained_optimizers for group in part.optimizer.param_groups]


def stored(folder):
    """Whole tensors by key."""
    from megatron_embed.platform.compat import dist_checkpointing

    return {key: value for key, value in dist_checkpointing.load_plain_tensors(str(folder / "model")).items()
            if isinstance(value, torch.Tensor)}


def cut_rows(folder):
    """Keys of tensors of which some parts are not whole rows."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    stored = FileSystemReader(folder / "model").read_metadata().state_dict_metadata  # bytes among them, with 0.19
    return {key for key, value in stored.items() if isinstance(value, TensorStorageMetadata)
            and any(chunk.sizes[-1] < value.size[-1] for chunk in value.chunks)}


def differing(one, other):
    """Keys whose tensors differ in a bit, or that only one of two checkpoints has. Left out: the row that tensor
    parallelism adds to the dense model's word embeddings."""
    first, second = (
        {key: value[:VOCABULARY] if len(value) == VOCABULARY + 1 else value
         for key, value in run_on_ranks(stored, 1, folder)[0].items()} for folder in (one, other))
    assert any("exp_avg_sq" in key for key in first) and any(value.abs().sum() > 0 for value in first.values())
    return {key for key in first.keys() | second.keys()
            if key not in first or key not in second or not torch.equal(first[key], second[key])}


def check_move(paths, folder, source, target, *, dense=False, **settings):
    """Saved at `source` as slices and as gathered, resumed at `target` from both: all the same bits."""
    ranks, others = MORE[source].ranks, MORE[target].ranks
    written = run_on_ranks(step_and_save, ranks, configured(paths[dense], source, **settings), folder)
    assert differing(folder / "new", folder / "old") == set()
    for name in ("new", "old"):
        steps = run_on_ranks(load_and_save, others, configured(paths[dense], target, **settings), folder / name,
                             folder / f"from_{name}")
        assert {step for of_rank in steps for step in of_rank} == {2}
        assert differing(folder / "old", folder / f"from_{name}") == set()
    return written


@pytest.mark.parametrize("source, target, settings", [
    pytest.param("DP3", "TP2", {"dense": True, "dtype": "bfloat16"}, id="dense"),
    pytest.param("TP2 EP2", "DP2", {"lora": LORA}, id="adapters", marks=pytest.mark.slow)])
def test_state_goes_to_another_layout_bit_for_bit(paths, tmp_path, source, target, settings):
    written = check_move(paths, tmp_path, source, target, **settings)
    assert source != "DP3" or len({key for key in cut_rows(tmp_path / "new") if key.endswith(".weight")}) >= 3
    largest = max(value.nbytes for value in run_on_ranks(stored, 1, tmp_path / "new")[0].values())
    assert max(written) - min(written) <= 1.1 * largest, "some ranks write more than others"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("source, target", [
    ("DP4", "TP2 EP2"), ("TP2 EP2", "DP3"), ("DP3", "PP2 VPP2"), ("PP2 VPP2", "DP2 PP2 EP2"), ("EP4", "TP2 ETP2"),
    ("TP2 ETP2", "CP2"), ("CP2", "EP4"), ("DP2 PP2 EP2", "1"), ("1", "DP4")])
def test_state_goes_to_every_layout_bit_for_bit(paths, tmp_path, source, target, dtype):
    check_move(paths, tmp_path, source, target, dtype=dtype)


@pytest.mark.parametrize("before, after, dtype", [
    pytest.param(True, False, "bfloat16", marks=pytest.mark.slow), pytest.param(
        False, True, "bfloat16", marks=pytest.mark.slow), (False, True, "float32"),
    pytest.param(True, False, "float32", marks=pytest.mark.slow)])
def test_state_goes_to_the_other_kind_of_optimizer(paths, tmp_path, before, after, dtype):
    first = configured(paths[True], "DP2", distributed=before, dtype=dtype)
    second = configured(paths[True], "TP2", distributed=after, dtype=dtype)
    run_on_ranks(step_and_save, 2, first, tmp_path)
    run_on_ranks(load_and_save, 2, second, tmp_path / "new", tmp_path / "other")
    run_on_ranks(load_and_save, 2, first, tmp_path / "other", tmp_path / "back")
    assert differing(tmp_path / "old", tmp_path / "back") == set()
    keys = {key for key in run_on_ranks(stored, 1, tmp_path / "other")[0] if ".state." in key}
    kinds = {key.split(".")[2] for key in keys}
    main = {True: {"param"}, False: {"fp32_param"} if dtype == "bfloat16" else set()}[after]
    assert kinds == {"exp_avg", "exp_avg_sq"} | main
