"""Small runs to be audited, and audits of them."""

import json
from pathlib import Path

from tests.audit.faults import FAULTS, copy_of_rows, train_with
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command
from tests.helpers.runs import configuration, go_back
from tests.helpers.toys import MINI_EN

STEPS = 6


def values_of(path, folder, *, name="run", **settings):
    """A run of six steps with a checkpoint every two, some rows sharing a positive."""
    rows = folder / f"{name}.jsonl"
    values = configuration(path, folder / name, train_steps=STEPS, warmup_steps=2, weight_decay=0.1,
                           checkpoint={"save_every_steps": 2, "keep": 0}, objective={"mask_duplicates": True})
    values["data"]["train"] = [str(rows) if rows.exists() else copy_of_rows(MINI_EN, rows, 200)]
    for section, keys in settings.items():
        values[section] = {**values.get(section, {}), **keys}
    return values


def run_with(fault, path, folder, name="run", ranks=None, **settings):
    """A run with one of FAULTS (None: without). Returns its directory."""
    chosen = FAULTS.get(fault)
    values = values_of(path, folder, name=name, **{**settings, **(chosen.settings if chosen else {})})
    ranks, directory = ranks or (chosen.ranks if chosen else 1), folder / name
    run_on_ranks(train_with, ranks, None if chosen is None or chosen.resumed else fault, values)
    if chosen is not None and chosen.resumed:
        go_back(directory, folder / f"{name}_resumed", 4)
        directory = folder / f"{name}_resumed"
        values["checkpoint"]["directory"] = str(directory)
        run_on_ranks(train_with, ranks, fault, values)
    if chosen is not None and chosen.alter is not None:
        chosen.alter(Path(directory))
    return directory


def audit_of(directory, step, ranks=1, *options):
    """(exit code, JSON values of an audit or its error)."""
    code, out, error, *_ = run_on_ranks(command, ranks, ["audit", str(directory), "--step", str(step), "--json",
                                                         *options])[0]
    return code, json.loads(out.splitlines()[-1]) if code in (0, 3) else error
