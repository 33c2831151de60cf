"""Logs that come from somewhere else: an audit reads them, or says which line is wrong."""

import json
import random

import pytest

from megatron_embed.audit.run_log import read_run
from megatron_embed.errors import UserError
from tests.helpers.audit_records import start_record, step_record

VALUES = (None, "", "x", [], {}, [1], -1, 1.5, True, 10**18, 10**30, float("nan"), float("inf"))


def put(folder, records, metrics=()):
    (folder / "audit.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in metrics))


def key_paths(value, keys=()):
    for key, inner in value.items():
        yield (*keys, key)
        if isinstance(inner, dict):
            yield from key_paths(inner, (*keys, key))


@pytest.mark.parametrize("records, words", [
    ([start_record(5), step_record(2)], "no start of the run before this step"),
    ([{**start_record(), "start": [1]}, step_record(2)], "audit.jsonl:1: .*start: must be an object"),
    ([start_record(settings=[1]), step_record(2)], "settings must be"),
    ([start_record(parallel={"tensor_model_parallel_size": 0}), step_record(2)], "tensor_model_parallel_size = 0"),
    ([start_record(parallel={"evil": 1}), step_record(2)], "evil"),
    ([start_record(world_size=3, parallel={"tensor_model_parallel_size": 2}), step_record(2)], "not a multiple"),
    ([start_record(), step_record(float("inf"))], "step = Infinity"),
    ([start_record(), step_record(2, micro_batches=10**18)], "micro_batches must be at most"),
    ([start_record(), step_record(2, labels=5)], "labels = 5 must be 16"),
    ([start_record(), step_record(2, drifted={"x": 1}, parameter_norm=1.0)], "norms by rank"),
    ([start_record(), {"step": 2, "loss": 1.0}], "row_set"), ([start_record()], "its log has no step")])
def test_records_that_are_damaged_are_refused(tmp_path, records, words):
    put(tmp_path, records)
    with pytest.raises(UserError, match=words):
        read_run(str(tmp_path), 2)


def test_damaged_logs_are_read_or_refused(tmp_path):
    """Every value of every record, replaced by others."""
    outcomes = []
    for index, keys in enumerate([("start", *keys) for keys in key_paths(start_record())] + [
            ("step", *keys) for keys in key_paths(step_record(2))]):
        records = {"start": start_record(), "step": step_record(2)}
        inner = records
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = random.Random(index).choice(VALUES)
        put(tmp_path, records.values(), [{"step": inner[keys[-1]], "loss": 1}])
        try:
            log = read_run(str(tmp_path), 2)
            outcomes.append(log.start_of(2)[1]["parallel"]["context_parallel_size"] == 1)
        except UserError:
            outcomes.append(False)
    assert 0 < sum(outcomes) < len(outcomes)


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    put(tmp_path, [start_record(), step_record(2)], [{"step": 2, "loss": 1.0}, [1], {"step": 1e400, "loss": 1}])
    with (tmp_path / "audit.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    log = read_run(str(tmp_path), 2)
    assert list(log.steps) == [2] and list(log.metrics) == [2]
    with (tmp_path / "audit.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="audit.jsonl:3: not readable"):
        read_run(str(tmp_path), 2)
