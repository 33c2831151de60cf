"""A full-size step of shipped configurations, counted on fake tensors beside what `plan` says, and frozen bounds.

`python tools/count_step.py CONFIG...` prints the numbers; lower a bound when a change lowers its number.
"""

import importlib.util
import json
import subprocess
import sys

import pytest

from tests.helpers.toys import REPOSITORY
from tests.pretend_cuda.build import reason_against

TOOL = REPOSITORY / "tools" / "count_step.py"
H100_GIB = 80 * 0.94
"""What fragmentation leaves."""
BOUNDS = {
    "qwen3_0.6b_embed_dp8_8xh100": (6.8, 26.1, 0.82, 2.17),
    "qwen3_4b_embed_tp2_8xh100": (6.9, 29.9, 0.99, 2.51),
    "qwen3_8b_embed_tp2_8xh100": (6.9, 29.9, 1.33, 3.25),
    "mistral_7b_embed_tp2_8xh100": (7.0, 24.2, 1.36, 3.25),
}
"""Configuration -> launches besides products and collectives per layer in passes 1 and 2, at most; GB that they move
per layer in passes 1 and 2, at most."""
MICRO_BATCH_WAITS, UPDATE_WAITS = 0, 1
"""Times that the host waits for a micro-batch, copies to the device included, and for the update of a step."""


def table_of(rows):
    spec = importlib.util.spec_from_file_location("count_step", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool.table(rows)


@pytest.mark.parametrize("name", [
    name if "0.6b" in name else pytest.param(name, marks=pytest.mark.slow) for name in BOUNDS])
def test_a_step_costs_what_plan_says_and_no_more_than_before(name):
    reason = reason_against()
    if reason is not None:
        pytest.skip(f"no pretend device: {reason}")
    done = subprocess.run([sys.executable, TOOL, f"configs/{name}.yaml", "--json"], cwd=REPOSITORY,
                          capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    row = json.loads(line)
    table, planned, work = table_of([row]), row["planned"], row["work"]
    assert row["activations"] == pytest.approx(planned["activations"], rel=0.1), table
    resident = planned["parameters"] + planned["gradients"] + planned["optimizer"]
    assert row["resident"] == pytest.approx(resident, rel=0.02), table
    assert row["peak"] / 2**30 < H100_GIB, table
    passes = [work["pass 1"], work["pass 2"]]
    for each, traffic, launches in zip(passes, planned["traffic"], planned["launches"], strict=True):
        assert each["other_bytes"] == pytest.approx(traffic, rel=0.3), table
        assert sum(each[kind] for kind in ("products", "others", "collectives")) == pytest.approx(launches, rel=0.4)
    waits = {part: sum(times for _, kind, times in each["waits"] if not kind.startswith("async"))
             for part, each in work.items()}
    assert waits["to_device"] + waits["pass 1"] + waits["pass 2"] <= MICRO_BATCH_WAITS, table
    assert waits["optimizer"] <= UPDATE_WAITS, table
    counted = (*(each["others"] / row["layers"] for each in passes),
               *(each["other_bytes"] / 1e9 / row["layers"] for each in passes))
    assert min(each["products"] / row["layers"] for each in passes) >= 4, "no model was run"
    over = [f"{value:.2f} > {bound}" for value, bound in zip(counted, BOUNDS[name], strict=True) if value > bound]
    assert not over, f"{over}\n{table}"
