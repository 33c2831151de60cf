"""Files to which a run appends lines: cut where a run resumes, kept where a new one starts."""

import json

import pytest

from megatron_embed.training import run_files
from megatron_embed.training.run_files import cut_after, move_aside


def lines_of(steps):
    return "".join(json.dumps({"step": step, "pad": "x" * (step % 7)}) + "\n" for step in steps)


@pytest.mark.parametrize("block", [5, 64, 1 << 16])
@pytest.mark.parametrize("tail", ["", '{"step": 3, "lo', "no JSON\n", "[1]\n"])
def test_lines_after_a_step_are_cut(tmp_path, monkeypatch, block, tail):
    monkeypatch.setattr(run_files, "_BLOCK", block)
    path = tmp_path / "metrics.jsonl"
    for kept in (0, 2, 4, 9):
        path.write_text(lines_of([0, 1, 2, 2, 3, 4, 4, 5, 6]) + tail)
        cut_after(path, kept)
        assert path.read_text() == lines_of([step for step in (0, 1, 2, 2, 3, 4, 4, 5, 6) if step <= kept])


def test_earlier_files_are_kept(tmp_path):
    for number in range(3):
        (tmp_path / "audit.jsonl").write_text(str(number))
        move_aside(tmp_path / "audit.jsonl")
    assert [(tmp_path / f"audit.{number}.jsonl").read_text() for number in (1, 2, 3)] == ["0", "1", "2"]
