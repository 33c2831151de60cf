"""tools/check_commit_subjects.py: which subjects pass."""

import importlib.util
import os
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


def commit(repository, subject, date):
    environment = os.environ | {f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER")
                                for what, value in (("NAME", "a"), ("EMAIL", "a@b"), ("DATE", date))}
    subprocess.run(["git", "-C", repository, "commit", "-q", "--allow-empty", "-m", subject], env=environment,
                   check=True)


def test_commits_from_the_given_date_on_are_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subjects, "REPOSITORY", tmp_path)
    monkeypatch.setattr(sys, "argv", ["check_commit_subjects.py"])
    assert subjects.main() == 0  # no repository
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    commit(tmp_path, "what was before", "2026-11-28T12:00:00Z")
    commit(tmp_path, "losses: gather documents once", "2026-11-29T12:00:00Z")
    assert subjects.main() == 0
    commit(tmp_path, "losses: gathered documents", "2026-11-30T12:00:00Z")
    assert subjects.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "'losses: gathered documents': must begin with an imperative" in line
