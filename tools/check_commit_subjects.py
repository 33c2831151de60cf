"""Checks the subjects of commits: `scope: imperative`, at most 72 characters. Merges, reverts and fixups are exempt.

    python tools/check_commit_subjects.py                 # the commits of HEAD since 2026-11-29, as `make lint` does
    python tools/check_commit_subjects.py --message FILE  # one message, as the hook tools/git_hooks/commit-msg does

Exit code 1 and one line per subject that breaks a rule. A shallow clone is checked as far as it goes; without git or a
repository there is nothing to check.
"""

import argparse
import datetime
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SINCE = datetime.datetime(2026, 11, 29, tzinfo=datetime.UTC)
"""Author date from which the rule holds; the history before it stays as it is."""
LONGEST = 72
EXEMPT = re.compile(r"Merge |Revert |(fixup|squash|amend)! ")
SUBJECT = re.compile(r"(?P<scope>[a-z0-9_.]+([/, -]+[a-z0-9_.]+)*): (?P<verb>[^\s,:]+)")
NOT_A_VERB = {"a", "an", "the", "this", "that", "these", "no", "not", "all", "every", "each", "some", "one", "two",
              "for", "of", "in", "on", "with", "without", "to", "and", "what", "where", "when", "how", "it", "its"}
NO_PARTICIPLE = {"embed", "need", "seed", "feed", "speed", "shed", "shred", "bring", "ring", "string", "spring"}


def problem(subject: str) -> str | None:
    """What is wrong with a subject; None: nothing."""
    if EXEMPT.match(subject):
        return None
    if len(subject) > LONGEST:
        return f"{len(subject)} characters, at most {LONGEST} are allowed"
    match = SUBJECT.match(subject)
    if match is None:
        return "must be `scope: imperative`, such as `losses: gather documents once`"
    verb = match["verb"].lower()
    is_participle = verb.endswith(("ed", "ing")) and verb not in NO_PARTICIPLE
    is_third_person = verb.endswith("s") and not verb.endswith(("ss", "us"))
    if verb in NOT_A_VERB or is_participle or is_third_person:
        return f"must begin with an imperative after the scope (add, fix, rename, ...), not with {match['verb']!r}"
    return None


def recent_subjects() -> list[tuple[str, str]]:
    """(abbreviated hash, subject) of the commits of HEAD since SINCE, without merges."""
    listed = subprocess.run(
        ["git", "-C", str(REPOSITORY), "log", "--no-merges", f"--since={SINCE.isoformat()}", "--format=%h %at %s"],
        capture_output=True, text=True, check=False)
    if listed.returncode:
        return []
    commits = [line.split(" ", 2) for line in listed.stdout.splitlines()]
    return [(commit, subject) for commit, written, subject in commits if int(written) >= SINCE.timestamp()]


def subject_of_message(path: Path) -> str:
    """The first line of a commit message that is not a comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line for line in lines if line.strip() and not line.startswith("#")), "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--message", type=Path, metavar="FILE", help="Check the commit message in this file.")
    message = parser.parse_args().message
    try:
        subjects = recent_subjects() if message is None else [("", subject_of_message(message))]
    except FileNotFoundError:  # no git
        return 0
    problems = [(commit, subject, reason) for commit, subject in subjects if (reason := problem(subject)) is not None]
    for commit, subject, reason in problems:
        print(f"commit {commit} {subject!r}: {reason}".replace("commit  ", "commit message "), file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
