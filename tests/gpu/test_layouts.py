"""Losses and gradient norms of every layout on GPUs, in float32, are those of one CPU rank.

Not run on a GPU so far, but on the pretend device (docs/pretend_device.md).
"""

import pytest

from tests.helpers.device_runs import train

EXACT = 1e-4
"""Relative; sums in another order."""
LAYOUTS = {
    "dp2": {},
    "dp2_overlapped": {"optimizer": {"overlap_grad_reduce": True, "overlap_param_gather": True}},
    "dp2_whole_optimizer": {"optimizer": {"distributed": False}},
    "tp2": {"parallel": {"tensor_model_parallel_size": 2}},
    "pp2": {"parallel": {"pipeline_model_parallel_size": 2}},
    "vpp2": {"parallel": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}},
    "cp2": {"parallel": {"context_parallel_size": 2}},
    "cp2_by_heads": {"parallel": {"context_parallel_size": 2, "cp_comm_type": "a2a"}},
}
QUICK = ("tp2", "vpp2")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["qwen3", *(pytest.param(name, marks=pytest.mark.slow)
                                             for name in ("bert", "qwen3_moe"))])
def test_one_gpu_is_the_cpu(models, cpu_curve, kind, tmp_path):
    assert train(models[kind], tmp_path / "run") == pytest.approx(cpu_curve(kind), rel=EXACT)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("layout", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
                                    for name in LAYOUTS])
def test_two_gpus_are_the_cpu(models, cpu_curve, layout, tmp_path):
    curve = train(models["qwen3"], tmp_path / "run", ranks=2, **LAYOUTS[layout])
    assert curve == pytest.approx(cpu_curve("qwen3"), rel=EXACT)


@pytest.mark.slow
@pytest.mark.multi_gpu
@pytest.mark.parametrize("key", ["expert_model_parallel_size", "tensor_model_parallel_size"])
def test_experts_on_two_gpus_are_the_cpu(models, cpu_curve, key, tmp_path):
    curve = train(models["qwen3_moe"], tmp_path / "run", ranks=2, parallel={key: 2})
    assert curve == pytest.approx(cpu_curve("qwen3_moe"), rel=EXACT)
