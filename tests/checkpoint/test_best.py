"""The best checkpoint is named and kept, whatever becomes of the others."""

import dataclasses
import os

import pytest

from megatron_embed.checkpoint.best import BestCheckpoint
from megatron_embed.checkpoint.files import INFO_FILE, remove_old
from megatron_embed.config.evaluation import CheckpointConfig, EvaluationConfig, EvaluationSet
from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.run.run_directory import best_checkpoint
from tests.helpers.ranks import run_on_ranks
from tests.helpers.toys import run_config


def save(folder, step):
    """Make the files of a save, empty."""
    (folder / f"step_{step:06d}").mkdir()
    (folder / f"step_{step:06d}" / INFO_FILE).write_text("{}")


def follow(folder, values, first_step=0, metric="ndcg@10", keep=1, patience=None):
    """(steps that were the best so far, files, target of `best`) of a run whose evaluations give these values."""
    best, best_steps = BestCheckpoint(str(folder), metric, first_step, patience=patience), []
    for step, value in enumerate(values, first_step + 1):
        improved = best.improves(step, {metric: value, "map": 1.0})
        if improved or step % 2 == 0:
            save(folder, step)
            remove_old(folder, keep)
            best.mark(step, keep)
        if improved:
            best_steps.append(step)
        if best.is_over:
            best_steps.append("over")
            break
    return best_steps, sorted(path.name for path in folder.glob("[!e]*")), os.readlink(folder / "best")


def test_best_is_kept_beside_the_newest(tmp_path):
    improved, names, target = run_on_ranks(follow, 1, tmp_path, [0.1, 0.3, 0.3, 0.2, 0.25, 0.1])[0]
    assert improved == [1, 2]  # equal is not better
    assert names == ["best", "step_000002", "step_000006"] and target == "step_000002"


def test_a_resumed_run_knows_the_best_so_far(tmp_path):
    run_on_ranks(follow, 1, tmp_path, [0.1, 0.3])
    improved, names, target = run_on_ranks(follow, 1, tmp_path, [0.2, 0.2, 0.31, 0.1], first_step=2)[0]
    assert improved == [5] and target == "step_000005"
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
    with pytest.raises(CheckpointError, match=r"best.json: not readable .*; remove .*best, and the best is searched"):
        BestCheckpoint(str(tmp_path), "ndcg@10", 1)


@pytest.mark.parametrize("metric, first", [("loss", 2), ("loss@64", 2), ("negative_similarity", 2), ("margin", 1),
                                           ("few/ndcg@10", 1)])
def test_of_losses_the_smallest_is_the_best(tmp_path, metric, first):
    improved, _, target = run_on_ranks(follow, 1, tmp_path, [0.5, 0.3, 0.4, 0.3, float("nan")], metric=metric)[0]
    assert improved == ([1, 2] if first == 2 else [1]) and target == f"step_{first:06d}"


def test_a_run_ends_after_as_many_evaluations_without_gain(tmp_path):
    """All ranks decide alike, whatever value each of them has."""
    results = run_on_ranks(follow_one_of_two, 2, tmp_path, [0.1, 0.3, 0.3, 0.2, 0.4, 0.1, float("nan"), 0.4, 0.9], 3)
    assert results == [[1, 2, 5, "over"]] * 2
    assert sorted(path.name for path in tmp_path.iterdir())[-1] == "step_000008"


def follow_one_of_two(folder, values, patience):
    import torch.distributed as dist

    best, improvements = BestCheckpoint(str(folder), "ndcg@10", 0, patience=patience), []
    for step, value in enumerate(values, 1):
        improved = best.improves(step, {"ndcg@10": value if dist.get_rank() == 0 else -value})
        if dist.get_rank() == 0:
            save(folder, step)
        best.mark(step, 0)
        improvements += [step] if improved else []
        if best.is_over:
            return [*improvements, "over"]
    return improvements


@pytest.mark.parametrize("interrupted", [2, 3, 4])
def test_patience_survives_an_interruption(tmp_path, interrupted):
    """Wherever the run resumes, even before what it had evaluated already, it ends with the same step."""
    values = [0.1, 0.3, 0.2, 0.25, 0.1, 0.9]
    run_on_ranks(follow, 1, tmp_path, values[:interrupted], patience=3, keep=0)
    for first in (interrupted, 2):
        left = values[first:]
        assert run_on_ranks(over_after_each, 1, tmp_path, left, first)[0] == [False] * (4 - first) + [True], first


def over_after_each(folder, values, first_step):
    best, over = BestCheckpoint(str(folder), "ndcg@10", first_step, patience=3), []
    for step, value in enumerate(values, first_step + 1):
        best.improves(step, {"ndcg@10": value})
        over.append(best.is_over)
        if best.is_over:
            assert BestCheckpoint(str(folder), "ndcg@10", step, patience=3).is_over  # a second start
            assert not BestCheckpoint(str(folder), "ndcg@10", step, patience=4).is_over
            assert not BestCheckpoint(str(folder), "map", step, patience=3).is_over
            break
    return over


def test_a_metric_that_nothing_contributed_to_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"best_metric = 'margin': nothing contributed .* after 1 steps; choose one "
                                          r"of loss"):
        BestCheckpoint(str(tmp_path), "margin", 0).improves(1, {"loss": 1.0})


def test_no_best_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no evaluation of the run .* by ndcg@10; set it to last"):
        assert BestCheckpoint(str(tmp_path), "ndcg@10", 4).checkpoint


@pytest.mark.parametrize("evaluation, checkpoint, kept", [
    ({}, {}, None), ({"patience": 2}, {}, "loss"), ({"best_metric": "eval/loss"}, {}, "loss"),
    ({}, {"export": "best", "export_at_end": "export"}, "loss"),
    ({"sts": (EvaluationSet(path="pairs"),)}, {}, "spearman")])
def test_the_best_of_held_out_rows_alone_is_kept_where_it_is_asked_for(tmp_path, evaluation, checkpoint, kept):
    """Their loss falls at nearly every evaluation, and each gain is a save."""
    config = dataclasses.replace(
        run_config("m", data={"validation_fraction": 0.1}), evaluation=EvaluationConfig(**evaluation),
        checkpoint=CheckpointConfig(directory=str(tmp_path), **checkpoint))
    best = best_checkpoint(config, 0)
    assert (None if best is None else best._metric) == kept


def test_milestones_are_kept(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step)
        remove_old(tmp_path, 2, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{step:06d}" for step in (3, 6, 7)]


def test_milestones_need_a_limit():
    with pytest.raises(ConfigError, match=r"keep_every_steps = 3: has no effect with checkpoint\.keep = 0"):
        CheckpointConfig(keep=0, keep_every_steps=3)
