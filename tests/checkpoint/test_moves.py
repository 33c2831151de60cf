"""Mixtures of experts go on under another layout, also where that gives the experts an optimizer or takes it away.

Here the losses of a few moves; tools/resume_layouts.py has all of them.
"""

import itertools
import shutil

import pytest

from megatron_embed.checkpoint.optimizer_state import CHAINED
from tests.checkpoint.moves import ALL_MODULES, BOUND, EXPERTS_ALONE, LAYOUTS, STOP, Kind, Moves
from tests.helpers import old_checkpoints
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import curve, go_back, train


@pytest.fixture(scope="module")
def moves(tmp_path_factory):
    """`Moves` by kind, each made once."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = Moves(tmp_path_factory.mktemp("moves") / "runs", kind)
        return made[kind]

    return of


def stored_keys(directory):
    from megatron_embed.checkpoint.load import keys_of

    return list(keys_of(directory / f"step_{STOP:06d}"))


def train_as_before(values):
    """A run that writes the keys that Megatron writes by itself."""
    with old_checkpoints.written_as_before(numbered=True):
        train(values)


def written_as_before(moves, folder, name):
    """A run that stopped under a layout, with `chained_N.` before the keys of its optimizer."""
    run_on_ranks(train_as_before, LAYOUTS[name].ranks, moves.values(folder / "whole", name))
    return go_back(folder / "whole", folder / "old", STOP)


@pytest.mark.parametrize("kind, source, target", [
    (Kind(), "1", "EP2"), pytest.param(Kind(), "EP2", "PP2", marks=pytest.mark.slow),
    pytest.param(Kind(distributed=False, adapters=ALL_MODULES), "1", "EP2", marks=pytest.mark.slow)])
def test_experts_go_on_at_other_layouts(moves, kind, source, target):
    assert moves(kind).difference(source, target) < BOUND


def test_keys_have_no_number_of_an_optimizer_and_both_spellings_are_read(moves, tmp_path):
    runs = moves(Kind())
    keys = stored_keys(runs.uninterrupted("EP2"))
    assert set(keys) == set(stored_keys(runs.uninterrupted("1")))
    old = written_as_before(runs, tmp_path, "EP2")
    numbers = {match.group() for match in map(CHAINED.match, stored_keys(old)) if match}
    assert numbers == {"chained_0.", "chained_1."}
    assert {CHAINED.sub("", key) for key in stored_keys(old)} == set(keys)
    assert runs.going_on(old, "1") < BOUND


def test_a_checkpoint_without_a_kind_of_parameters_is_refused():
    from megatron_embed.checkpoint.optimizer_state import _matching_group
    from megatron_embed.errors import CheckpointError

    dense = {"wd_mult": 1.0, "lr_mult": 1.0, "is_decoupled_lr": False, "is_expert_parallel": False}
    experts = dense | {"is_expert_parallel": True}
    assert _matching_group([dense], experts) is dense
    assert _matching_group([dense, experts], experts) is experts
    with pytest.raises(CheckpointError, match=r"no group of parameters with wd_mult 0\.0, .*another model"):
        _matching_group([dense], experts | {"wd_mult": 0.0})


@pytest.mark.slow
@pytest.mark.parametrize("kind", [
    Kind(), Kind(distributed=False), Kind(adapters=ALL_MODULES), Kind(distributed=False, adapters=ALL_MODULES),
    Kind(adapters=EXPERTS_ALONE), Kind(distributed=False, adapters=EXPERTS_ALONE)], ids=str)
def test_experts_go_on_at_every_layout(moves, kind):
    differences = {pair: moves(kind).difference(*pair) for pair in itertools.permutations(LAYOUTS, 2)}
    assert {pair: difference for pair, difference in differences.items() if difference >= BOUND} == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EP2", "TP2", "PP2 VPP2", "DP2 PP2 EP2"])
@pytest.mark.parametrize("distributed", [True, False])
def test_experts_go_on_bit_for_bit_at_the_same_layout(moves, tmp_path, name, distributed):
    runs = moves(Kind(distributed=distributed))
    directory = go_back(runs.uninterrupted(name), tmp_path / "run", STOP)
    run_on_ranks(train, LAYOUTS[name].ranks, runs.values(directory, name))
    assert curve(directory) == curve(runs.uninterrupted(name))
    shutil.rmtree(directory)
    old = written_as_before(runs, tmp_path, name)
    run_on_ranks(train, LAYOUTS[name].ranks, runs.values(old, name))
    assert curve(old) == curve(runs.uninterrupted(name))
