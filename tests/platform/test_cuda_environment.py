"""What a process on a GPU is given before CUDA starts, and what is left alone."""

import contextlib
import ctypes
import os
import subprocess
import sys
import types
from unittest import mock

import pytest
import torch

import megatron_embed
from megatron_embed import __main__ as program
from megatron_embed import api
from megatron_embed.errors import ConfigError
from megatron_embed.parallel import topology
from megatron_embed.platform import cuda_environment, gpus
from megatron_embed.run import assemble
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command
from tests.helpers.runs import configuration, train
from tests.helpers.toys import REPOSITORY, save_model

OURS = (*cuda_environment.ALLOCATOR_NAMES, *cuda_environment.DETERMINISTIC, "TORCH_NCCL_AVOID_RECORD_STREAMS",
        "CUDA_DEVICE_MAX_CONNECTIONS")
LEFT_ALONE = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING", "NCCL_NVLS_ENABLE")


@pytest.fixture
def environment():
    """Those of the variables that are set, from an environment without any of them."""
    with mock.patch.dict(os.environ):
        for name in (*OURS, *LEFT_ALONE):
            os.environ.pop(name, None)
        yield lambda: {name: os.environ[name] for name in (*OURS, *LEFT_ALONE) if name in os.environ}


@pytest.mark.parametrize("version, expected", [
    ((2, 6), {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TORCH_NCCL_AVOID_RECORD_STREAMS": "1"}),
    ((2, 8), {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
    ((2, 9), {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
    ((2, 10), {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
    ((2, 14), {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})])
def test_allocator_and_nccl_have_the_names_that_this_torch_reads(monkeypatch, environment, version, expected):
    monkeypatch.setattr(cuda_environment, "torch_version", lambda: version)
    cuda_environment.set_defaults()
    assert environment() == expected


@pytest.mark.parametrize("name", cuda_environment.ALLOCATOR_NAMES)
def test_allocators_setting_of_the_user_is_kept_by_either_name(environment, name):
    os.environ[name] = "max_split_size_mb:512"
    cuda_environment.set_defaults()
    assert environment() == {name: "max_split_size_mb:512"}


def test_torchs_version_is_known_without_its_import():
    assert ".".join(map(str, cuda_environment.torch_version())) == ".".join(torch.__version__.split(".")[:2])


@pytest.mark.parametrize("capability, tp, cp, expected", [
    ((9, 0), 2, 1, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}), ((8, 0), 1, 2, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
    ((9, 0), 1, 1, {}), ((10, 0), 2, 2, {}), (None, 2, 1, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"})])
def test_connections_follow_layout_and_gpu(monkeypatch, environment, capability, tp, cp, expected):
    monkeypatch.setattr(cuda_environment, "compute_capability", lambda: capability)
    cuda_environment.set_for_layout(tp, cp)
    assert environment() == expected
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"
    cuda_environment.set_for_layout(2, 2)
    assert environment() == {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}


def test_capability_is_asked_of_the_driver(monkeypatch):
    def answer(device, major, minor):
        major._obj.value, minor._obj.value = 9, 0
        return 0

    library = types.SimpleNamespace(nvmlInit_v2=lambda: 0, nvmlDeviceGetHandleByIndex_v2=lambda index, device: 0,
                                    nvmlDeviceGetCudaComputeCapability=answer, nvmlShutdown=lambda: 0)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert gpus.compute_capability() == (9, 0)
    library.nvmlDeviceGetHandleByIndex_v2 = lambda index, device: 6
    assert gpus.compute_capability() is None


@pytest.fixture
def run_file(tmp_path):
    (tmp_path / "run.yaml").write_text("model: {path: m}\ndata: {train: [rows.jsonl]}\n"
                                       "training: {deterministic: true}\n"
                                       "parallel: {tensor_model_parallel_size: 2}\n")
    return str(tmp_path / "run.yaml")


def test_training_sets_what_its_layout_and_determinism_need(monkeypatch, environment, run_file):
    """By the command alone: no launch script is involved."""
    seen = []
    monkeypatch.setattr(cuda_environment, "torch_version", lambda: (2, 13))
    monkeypatch.setattr(assemble, "run_training", lambda config: seen.append(environment()))
    assert program.main(["train", run_file]) == 0
    assert seen == [{"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True",
                     "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring",
                     "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}]


def test_training_from_python_sets_the_same(monkeypatch, environment, run_file):
    seen = []
    monkeypatch.setattr(cuda_environment, "torch_version", lambda: (2, 13))
    monkeypatch.setattr(assemble, "run_training", lambda config, on_step: seen.append(environment()) or {})
    assert megatron_embed.train(run_file) == {}
    assert seen == [{"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True",
                     "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring",
                     "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}]


FROM_PYTHON = """
import importlib.abc, os, sys

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print({key: value for key, value in os.environ.items() if key.endswith("ALLOC_CONF")})
            os._exit(0)

sys.meta_path.insert(0, Watch())
import megatron_embed
megatron_embed.CALL
"""


@pytest.mark.parametrize("call", ["load('m')", "train({'model': {'path': 'm'}})"])
def test_python_programs_have_the_allocators_variable_before_torch(call):
    clean = {name: value for name, value in os.environ.items() if name not in (*OURS, *LEFT_ALONE)}
    done = subprocess.run([sys.executable, "-c", FROM_PYTHON.replace("CALL", call)], cwd=REPOSITORY, env=clean,
                          capture_output=True, text=True, check=True)
    name = cuda_environment.ALLOCATOR_NAMES[cuda_environment.torch_version() < (2, 10)]
    assert done.stdout.strip() == str({name: "expandable_segments:True"})


def test_loading_from_python_sets_the_defaults(monkeypatch, environment):
    seen = []
    monkeypatch.setattr(cuda_environment, "torch_version", lambda: (2, 13))
    monkeypatch.setattr(api, "open_any", lambda *arguments, **options: seen.append(environment()))
    megatron_embed.load("m")
    assert seen == [{"PYTORCH_ALLOC_CONF": "expandable_segments:True"}]


def connections_of_encode(model, folder, tp_size):
    """(exit code, CUDA_DEVICE_MAX_CONNECTIONS) of `encode` on a rank."""
    os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    code, *_ = command(["encode", "--model", model, "--input", str(folder / "texts.jsonl"), "--output",
                        str(folder / f"tp{tp_size}.npy"), f"parallel.tensor_model_parallel_size={tp_size}"])
    return code, os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")


def test_commands_set_what_tensor_parallelism_needs(tmp_path):
    model = save_model(tmp_path / "model", "qwen3", tokenizer=True)
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert run_on_ranks(connections_of_encode, 2, model, tmp_path, 2) == [(0, "1")] * 2
    assert run_on_ranks(connections_of_encode, 1, model, tmp_path, 1) == [(0, None)]


@pytest.mark.parametrize("name, value", [("NCCL_ALGO", "Tree"), ("CUBLAS_WORKSPACE_CONFIG", ":0:0"),
                                         ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")])
def test_determinism_is_refused_where_the_environment_forbids_it(environment, run_file, capsys, name, value):
    os.environ[name] = value
    assert program.main(["train", run_file]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"run.yaml:3: training.deterministic = True: {name} = {value!r} does not repeat its results" in line
    with pytest.raises(ConfigError) as refused:
        cuda_environment.set_deterministic()
    assert refused.value.key == "training.deterministic"


def losses(values):
    """(loss, whether Megatron and torch were told, torch's setting afterwards) of a run with these values."""
    from megatron_embed.models import encoder

    original, told = encoder.megatron_config, []

    def built(*arguments, **options):
        config = original(*arguments, **options)
        told.append((config.deterministic_mode, torch.are_deterministic_algorithms_enabled()))
        return config

    with mock.patch.object(encoder, "megatron_config", built):
        loss = train(values)["loss"]
    return loss, set(told), torch.are_deterministic_algorithms_enabled()


def test_torch_and_megatron_are_told_to_be_deterministic(tmp_path):
    model = save_model(tmp_path / "model", "qwen3", tokenizer=True)
    values = configuration(model, tmp_path / "run", train_steps=1, deterministic=True)
    ((loss, told, afterwards),) = run_on_ranks(losses, 1, values)
    assert told == {(True, True)} and loss > 0 and not afterwards


def settings_around_a_failing_run(values):
    """torch's settings in a run that fails at its first rows, and afterwards, from the two that a program can have."""
    def fail(config):
        seen.append(torch.get_deterministic_debug_mode())
        raise ConfigError("no rows")

    seen = []
    with mock.patch.object(assemble, "read_inputs", fail):
        for mode in ("default", "warn"):
            torch.set_deterministic_debug_mode(mode)
            with contextlib.suppress(ConfigError):
                train(values)
            seen.append(torch.get_deterministic_debug_mode())
    torch.set_deterministic_debug_mode("default")
    return seen


def test_programs_own_setting_of_torch_comes_back(tmp_path):
    """0: none, 1: warnings, 2: errors where there is no deterministic algorithm."""
    values = configuration("m", tmp_path / "run", train_steps=1, deterministic=True)
    assert run_on_ranks(settings_around_a_failing_run, 1, values) == [[2, 0, 2, 1]]


def test_launch_scripts_set_nothing_of_it():
    clean = {name: value for name, value in os.environ.items() if name not in (*OURS, *LEFT_ALONE)}
    done = subprocess.run(["bash", "-c", "source launch/environment.sh && env"], cwd=REPOSITORY, env=clean,
                          capture_output=True, text=True, check=True)
    assert "NCCL_IB_TIMEOUT=19" in done.stdout
    assert not [name for name in (*OURS, *LEFT_ALONE) if f"{name}=" in done.stdout]


@pytest.mark.parametrize("has_cuda", [True, False])
def test_nccl_connects_at_start_and_groups_do_not_split_it(monkeypatch, has_cuda):
    given, world = {}, types.SimpleNamespace(bound_device_id="bound")
    monkeypatch.setattr(topology, "HAS_CUDA", has_cuda)
    monkeypatch.setattr(topology, "rendezvous_address", lambda: ("a", 1))
    monkeypatch.setattr(topology, "Rendezvous", lambda *arguments: types.SimpleNamespace(
        wait_for_all=lambda seconds: None, group_store=lambda seconds: "store"))
    monkeypatch.setattr(topology, "dist", types.SimpleNamespace(
        init_process_group=lambda backend, **options: given.update(options, backend=backend),
        group=types.SimpleNamespace(WORLD=world), DistError=topology.dist.DistError))
    device = torch.device("cuda", 3)
    assert topology._init_process_group(1, 2, 20, device) == ("a", 1)
    assert given["device_id"] == (device if has_cuda else None)
    assert given["backend"] == ("cpu:gloo,cuda:nccl" if has_cuda else "gloo")
    assert world.bound_device_id is None


ON_A_GPU = """
import importlib.abc, os, sys

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            seen.append({key: value for key, value in os.environ.items() if key.endswith("ALLOC_CONF")})

seen = []
sys.meta_path.insert(0, Watch())
from megatron_embed.platform import cuda_environment
import megatron_embed.__main__
assert not seen
os.environ["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] = "1"
cuda_environment.set_defaults()
import torch
assert seen == [{"PYTORCH_ALLOC_CONF": "expandable_segments:True"}], seen
assert torch.backends.cuda.matmul.allow_tf32
torch.cuda.is_available = lambda: True
del os.environ["PYTORCH_ALLOC_CONF"]
import megatron_embed.platform.compat as compat
assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
assert compat.HAS_CUDA
assert "megatron_embed.platform.cpu" not in sys.modules
assert not torch.backends.cuda.matmul.allow_tf32
assert torch.get_float32_matmul_precision() == "highest"

import megatron.core.pipeline_parallel.schedules as schedules
assert schedules.torch is torch
assert torch.Tensor.cuda.__name__ == "cuda"

from megatron.core.jit import jit_fuser
from megatron.core.transformer.moe.moe_utils import RouterGatingLinearFunction
from megatron.core.transformer.moe.router import TopKRouter
rows, weight = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
logits = RouterGatingLinearFunction.apply(rows, weight, None, torch.float32)
logits.sum().backward()
assert torch.equal(logits, rows @ weight.T) and weight.grad.any()
assert jit_fuser is torch.compile
compiled = [name for name, method in vars(TopKRouter).items() if "_torchdynamo_orig_callable" in dir(method)]
assert not compiled, compiled
assert "_torchdynamo_orig_callable" in dir(jit_fuser(lambda x: x))
"""


def test_process_with_a_gpu(tmp_path):
    """CUDA's own adapter stays out; a mixture of experts runs without Transformer Engine, its router not compiled; TF32
    is off although the container asks for it; the allocator's variable is there before torch is."""
    clean = {name: value for name, value in os.environ.items() if name not in (*OURS, *LEFT_ALONE)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", ON_A_GPU], check=True, timeout=600, cwd=REPOSITORY, env=clean)
