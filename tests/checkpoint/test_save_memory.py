"""A save takes as much host memory as a rank's own share of the state, not more."""

import contextlib
import dataclasses
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_embed.config.optimizer import OptimizerConfig
from megatron_embed.planning.memory import grid_of, worst_stage
from megatron_embed.planning.shapes import shape_of
from tests.helpers import te_stand_in
from tests.helpers.ranks import run_on_ranks, shutdown_ranks
from tests.helpers.saves import growth_of_saves, open_saver, written
from tests.helpers.toys import run_config, save_model

SMALL = {"hidden_size": 128, "intermediate_size": 512}
LARGE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 4000}
"""47 million parameters."""


class Allocated(TorchDispatchMode):
    """Bytes of the tensors that operations make: at most at once."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((arguments, keywords))
                 if isinstance(leaf, torch.Tensor)}
        result = function(*arguments, **(keywords or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in given | self.seen.keys():
                storage = leaf.untyped_storage()
                self.seen[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata)
        return result

    def _freed(self, key):
        self.now -= self.seen.pop(key)


def bytes_allocated(config, folder, background):
    """(bytes that a save allocated at most, bytes that this rank wrote)."""
    with te_stand_in.fused_adam() if config.optimizer.precision_aware else contextlib.nullcontext():
        saver = open_saver(config, folder, background)
        saver.save(1)  # creates moments in 8 bits, which a step would have created
        saver.finish()
        with Allocated() as allocated:
            saver.save(2)
            saver.finish()
    return allocated.peak, written(folder, 2)


@pytest.mark.parametrize("optimizer", [{}, {"name": "adamw_8bit"}, {"precision_aware": True},
                                       {"name": "muon", "distributed": False}],
                         ids=["adamw", "adamw_8bit", "precision_aware", "muon"])
@pytest.mark.parametrize("background", [False, True], ids=["at_once", "behind_the_steps"])
def test_a_save_allocates_a_ranks_share_at_most(tmp_path, background, optimizer):
    model = save_model(tmp_path / "qwen3", "qwen3", **SMALL)
    config = dataclasses.replace(run_config(model, dtype="bfloat16" if "precision_aware" in optimizer else "float32"),
                                 optimizer=OptimizerConfig(**{"distributed": True} | optimizer))
    planned = worst_stage(config, shape_of(model), grid_of(config, 2))[1].save
    for allocated, share in run_on_ranks(bytes_allocated, 2, config, tmp_path / "run", background):
        assert share == pytest.approx(planned, rel=0.1), "`plan` says otherwise"
        assert (0.8 if background else 0.2) * share < allocated < 1.1 * share


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True], ids=["at_once", "behind_the_steps"])
def test_resident_memory_grows_by_a_ranks_share_at_most(tmp_path, background):
    model = save_model(tmp_path / "qwen3", "qwen3", **LARGE)
    shutdown_ranks()  # new processes, whose allocators hold nothing
    by_rank = run_on_ranks(growth_of_saves, 4, run_config(model), tmp_path / "run", background, timeout_seconds=600)
    total = sum(share for _, (_, share, _), *_ in by_rank)
    for (before, _, _), (grown, _, _), *_ in by_rank:
        assert grown < 1.2 * total / 4 < before
