"""`audit`: equal to a run in every layout; what differs is found, and named if it is a known fault."""

import json
import shutil

import pytest

from tests.audit.audits import STEPS, audit_of, run_with
from tests.audit.faults import FAULTS, WRONG
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command
from tests.helpers.runs import model  # noqa: F401  a fixture
from tests.helpers.toys import layout

LAYOUTS = {"1 rank": (1, layout()), "DP=2": (2, layout()), "TP=2": (2, layout(2)), "PP=2": (2, layout(pp=2)),
           "CP=2": (2, layout(cp=2))}
"""Ranks and sizes of the runs that are audited."""


@pytest.fixture(scope="module")
def clean(model, tmp_path_factory):
    """A run of one rank without faults."""
    return run_with(None, model, tmp_path_factory.mktemp("clean"))


def changed(directory, target, change):
    """A copy of a run whose records of the audited steps are changed by `change`."""
    shutil.copytree(directory, target)
    lines = [json.loads(line) for line in (target / "audit.jsonl").read_text().splitlines()]
    for record in lines:
        if record["step"] == STEPS and "metrics" in record:
            change(record)
    (target / "audit.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return target


def test_clean_step_is_equal(clean):
    """The replay begins two steps before; every row is named."""
    code, result = audit_of(clean, STEPS)
    assert (code, result["equal"], result["replayed_steps"]) == (0, True, 2)
    assert result["checkpoint"] == str(clean / "step_000004") and len(result["rows"]) == 8
    assert result["rows"][0]["source"].startswith(f"{clean}.jsonl:")
    for name, values in result["metrics"].items():
        assert values["replayed"] == pytest.approx(values["logged"], rel=1e-5), name


@pytest.mark.parametrize("part, key, value", [
    ("labels", "labels", "0" * 16), pytest.param("rows", "row_order", "0" * 16, marks=pytest.mark.slow),
    pytest.param("texts", "query_tokens", 1, marks=pytest.mark.slow)])
def test_changed_record_is_different(clean, tmp_path, part, key, value):
    code, result = audit_of(changed(clean, tmp_path / "run", lambda record: record.update({key: value})), STEPS)
    assert (code, result["first_difference"]["part"], result["first_difference"]["step"]) == (3, part, STEPS)


def test_what_cannot_be_audited(clean, tmp_path):
    for directory, step, words in ((clean, STEPS + 1, "its log has the steps 1 to 6"), (tmp_path, 1, "no audit.jsonl")):
        code, _, error, *_ = run_on_ranks(command, 1, ["audit", str(directory), "--step", str(step)])[0]
        assert code == 2 and words in error


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found_and_named(model, tmp_path, name):
    fault = FAULTS[name]
    directory = run_with(name, model, tmp_path)
    code, result = audit_of(directory, WRONG if fault.alter or not fault.resumed else STEPS)
    assert code == 3
    assert result["first_difference"]["part"] == fault.part, result["first_difference"]
    assert result["causes"] and result["causes"][0]["name"] == fault.name, result["causes"]
