"""The best checkpoint is named and kept, whatever becomes of the others."""

import os

import pytest

from megatron_embed.checkpoint.best import BestCheckpoint
from megatron_embed.checkpoint.files import INFO_FILE, remove_old
from megatron_embed.errors import CheckpointError
from tests.ranks import run_on_ranks


def save(folder, step):
    """What a save leaves, as far as names go."""
    (folder / f"step_{step:06d}").mkdir()
    (folder / f"step_{step:06d}" / INFO_FILE).write_text("{}")


def follow(folder, values, first_step=0, metric="ndcg@10", keep=1):
    """A run whose evaluation after each step gives these values; gives the steps that were the best so far."""
    best, found = BestCheckpoint(str(folder), metric, first_step), []
    for step, value in enumerate(values, first_step + 1):
        improved = best.improves({metric: value, "map": 1.0})
        if improved or step % 2 == 0:
            save(folder, step)
            remove_old(folder, keep)
            best.mark(step, keep)
        if improved:
            found.append(step)
    return found, sorted(path.name for path in folder.iterdir()), os.readlink(folder / "best")


def test_best_is_kept_beside_the_newest(tmp_path):
    found, names, target = run_on_ranks(follow, 1, tmp_path, [0.1, 0.3, 0.3, 0.2, 0.25, 0.1])[0]
    assert found == [1, 2]  # equal is not better
    assert names == ["best", "step_000002", "step_000006"] and target == "step_000002"


def test_a_resumed_run_knows_the_best_so_far(tmp_path):
    run_on_ranks(follow, 1, tmp_path, [0.1, 0.3])
    found, names, target = run_on_ranks(follow, 1, tmp_path, [0.2, 0.2, 0.31, 0.1], first_step=2)[0]
    assert found == [5] and target == "step_000005"
    assert names == ["best", "step_000005", "step_000006"]
    # By another metric, or on a way that begins before it, the old value says nothing.
    assert run_on_ranks(follow, 1, tmp_path, [0.05], first_step=6, metric="map")[0][0] == [7]


def test_a_run_that_goes_back_forgets_what_came_later(tmp_path):
    run_on_ranks(follow, 1, tmp_path, [0.1, 0.9])
    os.rename(tmp_path / "step_000002", tmp_path / "elsewhere")
    assert run_on_ranks(follow, 1, tmp_path, [0.5], first_step=1)[0][0] == [2]


def test_a_broken_value_is_refused(tmp_path):
    run_on_ranks(follow, 1, tmp_path, [0.1])
    (tmp_path / "best" / "best.json").write_text('{"step": ')
    with pytest.raises(CheckpointError, match=r"best.json: not readable .*; remove .*best, and the best is sought"):
        BestCheckpoint(str(tmp_path), "ndcg@10", 1)
