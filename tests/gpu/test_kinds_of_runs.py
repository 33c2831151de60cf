"""Heads, objectives, quantized weights and optimizers on GPUs: the curves of the same runs on one CPU rank.

Not run on a GPU so far, but on the pretend device (docs/pretend_device.md).
"""

import json

import pytest

from tests.helpers.device_runs import call, train
from tests.helpers.kinds_of_runs import RUNS, sections_of

pytestmark = pytest.mark.slow
EXACT, HALF = 1e-4, 0.1
"""Relative: sums in another order; losses in bfloat16."""
NEAR = {"nf4_of_scales_too": 1e-2}
"""Of bitsandbytes' kernels, those of CPUs round some scales to the next code: one of thousands."""
LAYOUTS = {
    "dp2": {}, "tp2": {"tensor_model_parallel_size": 2}, "pp2": {"pipeline_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2}}
ON_TWO = [("bidirectional", "tp2"), ("bidirectional", "cp2"), ("late_interaction", "dp2"), ("late_interaction", "tp2"),
          ("sparse", "tp2"), ("sparse", "pp2"), ("joint", "dp2"), ("joint", "cp2"), ("rounded", "dp2"),
          ("guided", "dp2"), ("compatible", "pp2"), ("query_side", "tp2"), ("teacher", "dp2"), ("nf4", "tp2"),
          ("int8", "pp2"), ("adamw_8bit", "dp2"), ("muon", "tp2"), ("three_layers", "pp2"),
          ("workers", "tp2")]


@pytest.fixture(scope="module")
def expected(directories, rows, cpu_pool, tmp_path_factory):
    """The curve of one of RUNS on one CPU rank."""
    folder = tmp_path_factory.mktemp("expected")

    def run(name):
        if name not in known:
            model, sections = sections_of(name, directories, rows)
            known[name] = train(model, folder / name, pool=cpu_pool, **sections)
        return known[name]

    known: dict[str, list[float]] = {}
    return run


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_one_gpu_is_the_cpu(directories, rows, expected, name, tmp_path):
    model, sections = sections_of(name, directories, rows)
    assert train(model, tmp_path / "run", **sections) == pytest.approx(
        expected(name), rel=NEAR.get(name, EXACT))


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_bfloat16_is_near_float32(directories, rows, expected, name, tmp_path):
    """By the flash kernels where the run allows them."""
    model, sections = sections_of(name, directories, rows)
    half = {**sections, "model": {**sections.get("model", {}), "dtype": "bfloat16"}}
    assert train(model, tmp_path / "run", **half)[::2] == pytest.approx(expected(name)[::2], rel=HALF)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name, layout", ON_TWO)
def test_two_gpus_are_the_cpu(directories, rows, expected, name, layout, tmp_path):
    model, sections = sections_of(name, directories, rows)
    curve = train(model, tmp_path / "run", ranks=2, **sections, parallel=LAYOUTS[layout])
    assert curve == pytest.approx(expected(name), rel=EXACT)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_is_audited(directories, rows, ranks, tmp_path):
    """Of two data-parallel GPUs, by as many and by one."""
    train(directories["qwen3"], tmp_path / "run", ranks=2, data={"train": [rows]},
          checkpoint={"save_every_steps": 2, "keep": 0})
    result = json.loads(call(["audit", tmp_path / "run", "--step", "3", "--json"], ranks).splitlines()[-1])
    assert result["equal"] and result["first_difference"] is None, result
