"""tools/check_commit_subjects.py: which subjects pass."""

import importlib.util
import subprocess
import sys

import pytest

from tests.helpers.toys import REPOSITORY

TOOL = REPOSITORY / "tools" / "check_commit_subjects.py"
spec = importlib.util.spec_from_file_location("check_commit_subjects", TOOL)
subjects = importlib.util.module_from_spec(spec)
spec.loader.exec_module(subjects)


@pytest.mark.parametrize("subject", [
    "losses: gather documents over the data-parallel group only", "cli, run: pass the key with the error",
    "tests/helpers: embed texts once", "docs: " + "x" * 66, "Merge branch 'main' of somewhere",
    'Revert "losses: gather documents once"', "fixup! losses: gather documents once",
])
def test_subject_passes(subject):
    assert subjects.problem(subject) is None


@pytest.mark.parametrize(("subject", "reason"), [
    ("docs: " + "x" * 67, "73 characters"), ("gather documents once", "scope: imperative"),
    ("losses: gathered documents", "not with 'gathered'"), ("losses: gathering documents", "not with 'gathering'"),
    ("losses: gathers documents", "not with 'gathers'"), ("tests: the status file is here", "not with 'the'"),
])
def test_subject_is_refused(subject, reason):
    assert reason in subjects.problem(subject)


def test_hook_reads_the_first_line_that_is_no_comment(tmp_path):
    hook = [str(REPOSITORY / "tools" / "git_hooks" / "commit-msg")]
    (tmp_path / "good").write_text("# a comment\n\nlosses: gather documents once\n\nWhy.\n")
    (tmp_path / "bad").write_text("Gathered the documents\n")
    assert subprocess.run([*hook, tmp_path / "good"], check=False).returncode == 0
    ended = subprocess.run([*hook, tmp_path / "bad"], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "commit message 'Gathered the documents': must be `scope: imperative`" in ended.stderr


def test_history_of_this_repository_passes():
    assert subprocess.run([sys.executable, TOOL], check=False).returncode == 0
