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
    "qwen3_0.6b_embed_dp8_8xh100": (5.8, 21.1, 0.71, 1.73),
    "qwen3_4b_embed_tp2_8xh100": (5.9, 24.9, 0.88, 2.13),
    "qwen3_8b_embed_tp2_8xh100": (5.9, 24.9, 1.18, 2.79),
    "mistral_7b_embed_tp2_8xh100": (6.0, 19.2, 1.25, 2.87),
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


def count_of(name, *overrides):
    """Counts of one configuration. Skips without a pretend device."""
    reason = reason_against()
    if reason is not None:
        pytest.skip(f"no pretend device: {reason}")
    done = subprocess.run([sys.executable, TOOL, f"configs/{name}.yaml", "--json", *overrides], cwd=REPOSITORY,
                          capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("name", [
    name if "0.6b" in name else pytest.param(name, marks=pytest.mark.slow) for name in BOUNDS])
def test_a_step_costs_what_plan_says_and_no_more_than_before(name):
    row = count_of(name)
    table, planned, work = table_of([row]), row["planned"], row["work"]
    assert row["activations"] == pytest.approx(planned["activations"], rel=0.1), table
    resident = planned["parameters"] + planned["gradients"] + planned["optimizer"]
    assert row["resident"] == pytest.approx(resident, rel=0.02), table
    assert row["peak"] / 2**30 < H100_GIB, table
    passes = [work["pass 1"], work["pass 2"]]
    for each, traffic, launches in zip(passes, planned["traffic"], planned["launches"], strict=True):
        assert each["other_bytes"] == pytest.approx(traffic, rel=0.1), table
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


@pytest.mark.slow
def test_context_parallel_ranks_divide_the_activations_of_a_long_text():
    sizes = ["--set=data.document_max_length=32768", "--set=training.micro_batch_tokens=32768"]
    one, four = (count_of("qwen3_0.6b_embed_dp8_8xh100", *sizes, f"--set=parallel.context_parallel_size={size}")
                 for size in (1, 4))
    assert one["tokens"] == four["tokens"] == 32768
    for row in (one, four):
        assert row["activations"] == pytest.approx(row["planned"]["activations"], rel=0.1), table_of([row])
    assert four["activations"] < 0.26 * one["activations"], table_of([one, four])
    assert four["work"]["pass 2"]["products"] > one["work"]["pass 2"]["products"], "one call of the kernels for a chunk"


@pytest.mark.slow
def test_experts_are_one_product():
    """Two layers of a mixture with 16 experts on a rank: 72 and 214 products with one for each expert. Gradients of
    weights are products of each expert that add to the main gradient."""
    reason = reason_against()
    if reason is not None:
        pytest.skip(f"no pretend device: {reason}")
    done = subprocess.run(
        [sys.executable, TOOL, "configs/qwen3_30b_a3b_embed_pp2_ep8_16xh100.yaml", "--json", "--gpus=8", "--layers=2",
         "--set=parallel.pipeline_model_parallel_size=1", "--set=training.micro_batch_tokens=2048"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    work = json.loads(done.stdout)["work"]
    assert [work[part]["products"] for part in ("pass 1", "pass 2")] == [12, 94]
    assert work["pass 1"]["others"] <= 105 and work["pass 2"]["others"] <= 280
    sizes = [work[part]["other_bytes"] / 1e9 for part in ("pass 1", "pass 2")]
    assert sizes[0] <= 2.7 and sizes[1] <= 7.4, sizes


@pytest.mark.slow
def test_a_save_of_8b_takes_a_ranks_share_of_host_memory():
    row = count_of("qwen3_8b_embed_tp2_8xh100", "--save")
    counts, planned = row["save"], row["planned"]["save"]
    assert counts["share"] == pytest.approx(planned, rel=0.05)
    assert 0.9 * planned < counts["kept"] <= counts["peak"] < 1.2 * planned
