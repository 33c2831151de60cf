"""Megatron-Core without CUDA: every CUDA-only place on our paths is answered, and nobody else notices."""

import importlib
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_embed.platform import compat, cpu
from tests.helpers.cuda_sites import Site, find_sites
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import configuration, train
from tests.helpers.toys import save_model

pytestmark = pytest.mark.skipif(compat.HAS_CUDA, reason="the adapter is for machines without CUDA")

HARMLESS = {
    "is_available": "answers False", "device_count": "answers 0", "empty_cache": "does nothing before CUDA is used",
    "OutOfMemoryError": "an exception's class, only caught", "CUDAGraph": "a class, only asked for an attribute",
    "FloatTensor": "a class, only compared with", "HalfTensor": "a class, only compared with",
    "BFloat16Tensor": "a class, only compared with", "amp": "decorators, which need no device"}
"""Names of torch.cuda that work without a device."""


@dataclass(frozen=True, kw_only=True)
class NotReached:
    """Places that no run of ours comes to."""

    module: str
    """Below megatron.core; a trailing dot means everything below."""
    functions: tuple[str, ...] = ("",)
    """Functions or classes whose places are meant; "": all of the module."""
    why: str
    """The setting that keeps us away."""


NOT_REACHED = (
    NotReached(module="distributed.fsdp.", why="DistributedDataParallelConfig.use_megatron_fsdp stays False"),
    NotReached(module="distributed.torch_fully_sharded_data_parallel", why="torch's FSDP wrapper is never built"),
    NotReached(module="inference.", why="inference runs through the training schedules, with no inference context"),
    NotReached(module="tensor_parallel.inference_layers", why="only specs for inference build them"),
    NotReached(module="transformer.cuda_graphs", why="TransformerConfig.cuda_graph_impl stays 'none'"),
    NotReached(module="full_cuda_graph", why="TransformerConfig.cuda_graph_impl stays 'none'"),
    NotReached(module="nccl_allocator", why="DistributedDataParallelConfig.nccl_ub stays False"),
    NotReached(module="pipeline_parallel.fine_grained_activation_offload",
               why="TransformerConfig.fine_grained_activation_offloading stays False"),
    NotReached(module="pipeline_parallel.combined_1f1b", why="overlap_moe_expert_parallel_comm stays False"),
    NotReached(module="pipeline_parallel.utils", functions=("ScheduleNode", "set_streams"),
               why="only the combined 1F1B schedule uses them (overlap_moe_expert_parallel_comm)"),
    NotReached(module="pipeline_parallel.schedules", functions=("forward_step",),
               why="torch.autocast runs only with ModelParallelConfig.enable_autocast, which stays False"),
    NotReached(module="optimizer.cpu_offloading.", why="optimizer.cpu_offload is refused without CUDA"),
    NotReached(module="models.common.embeddings.yarn_rotary_pos_embedding", why="rotary positions are never yarn's"),
    NotReached(module="extensions.transformer_engine", why="our layers are torch's and Megatron's, not its"),
    NotReached(module="dist_checkpointing.strategies.async_utils", why="saves are synchronous"),
    NotReached(module="dist_checkpointing.exchange_utils", functions=("_get_empty_tensor_for_exchange",),
               why="the fully parallel load strategy is not used; and init_data goes through torch.empty(device=)"),
    NotReached(module="transformer.moe.token_dispatcher", functions=("MoEAlltoAllTokenDispatcher.__init__",),
               why="the device of permute fusion, whose moe_permute_fusion stays False"),
    NotReached(module="transformer.moe.token_dispatcher", functions=("_NCCLEPManager",),
               why="moe_token_dispatcher_type is alltoall, never flex"),
    NotReached(module="transformer.moe.fused_a2a", why="moe_token_dispatcher_type is alltoall, never flex"),
    NotReached(module="utils", functions=("GlobalSymmetricMemoryBuffer",), why="symmetric memory is for inference"),
    NotReached(module="utils", functions=("StragglerDetector",), why="the straggler detector is never configured"),
    NotReached(module="utils", functions=("nvtx_range_push", "nvtx_range_pop"), why="nvtx ranges stay disabled"),
)
REPLACED = {"tensor_parallel.random": ("_get_cuda_rng_state", "_set_cuda_rng_state")}
"""Functions that the adapter replaces as a whole."""
NAMED_TYPES = tuple((module.removeprefix("megatron.core."), f"{owner}.{function}" if owner else function)
                    for module, owner, function in cpu.CUDA_TYPE_SITES)
CALLED_WHERE_TYPES_ARE_NAMED = {
    ("optimizer.distrib_optimizer", "DistributedOptimizer._build_model_and_main_param_groups"):
        ("optimizer.distrib_optimizer", "DistributedOptimizer.__init__")}
"""Place -> the only caller, which is in NAMED_TYPES."""
IMPORTED = {"torch.cuda._lazy_call": "called in functions that are replaced",
            "torch.cuda._lazy_init": "called in functions that are replaced",
            "torch.cuda.device": "a context manager of functions that are replaced"}


def inside(site: Site, functions: tuple[str, ...]) -> bool:
    return any(name in ("", site.function) or site.function.startswith(f"{name}.") for name in functions)


def is_reached(site: Site) -> bool:
    for entry in NOT_REACHED:
        same = site.module.startswith(entry.module) if entry.module.endswith(".") else site.module == entry.module
        if same and inside(site, entry.functions):
            return False
    return True


def is_covered(site: Site) -> bool:
    """Whether the adapter covers the site, or it needs no replacement."""
    if inside(site, REPLACED.get(site.module, ())):
        return True
    if match := re.fullmatch(r"torch\.cuda\.(\w+)", site.what):
        return match[1] in cpu.CUDA_CALLS or match[1] in HARMLESS
    if match := re.fullmatch(r"(.*)\((device|pin_memory)=\)", site.what):
        name = match[1].removeprefix("torch.")
        if name == "TensorProperties":
            return True  # metadata of a tensor that exists
        return name in cpu.FACTORIES or name.removeprefix("cuda.") in cpu.CUDA_CALLS
    if match := re.fullmatch(r"\.(\w+)\(\)", site.what):
        return vars(torch.Tensor)[match[1]] in (cpu._same, cpu._nothing)
    if re.fullmatch(r"torch\.cuda\.\w*Tensor string", site.what):
        location = (site.module, site.function)
        return CALLED_WHERE_TYPES_ARE_NAMED.get(location, location) in NAMED_TYPES
    if site.what.endswith(" string"):
        return True  # text of a message
    return site.what.removeprefix("import ") in IMPORTED


def uncovered(sites: list[Site], files: dict[str, str]) -> list[str]:
    """`FILE:LINE: what (in which function)` of each place without an answer."""
    return [f"{files[site.module]}:{site.line}: {site.what} in {site.function or 'the module'}"
            for site in sites if is_reached(site) and not is_covered(site)]


def loaded_by_a_run(values: dict) -> dict[str, str]:
    """Files of Megatron's modules, by name below megatron.core, once a run has trained and saved."""
    train(values)
    modules = {name.removeprefix("megatron.core."): getattr(module, "__file__", None)
               for name, module in sys.modules.items() if name.startswith("megatron.core.")}
    return {name: file for name, file in modules.items() if file}


def test_every_cuda_site_of_the_installed_megatron_is_covered(tmp_path, monkeypatch):
    model = save_model(tmp_path / "model", "qwen3", tokenizer=True)
    (files,) = run_on_ranks(loaded_by_a_run, 1, configuration(model, tmp_path / "run", train_steps=1))
    assert {"pipeline_parallel.schedules", "optimizer.distrib_optimizer", "transformer.moe.router",
            "dist_checkpointing.strategies.torch"} <= files.keys()
    sites = [site for name, file in files.items() for site in find_sites(name, Path(file).read_text(encoding="utf-8"))]
    assert len(sites) > 200
    missing = uncovered(sites, files)
    assert not missing, "megatron_embed/platform/cpu.py does not cover:\n" + "\n".join(missing)
    monkeypatch.delitem(cpu.CUDA_CALLS, "synchronize")
    assert any(files["pipeline_parallel.p2p_communication"] in line for line in uncovered(sites, files))


UNKNOWN = [
    ("torch.cuda.foo()", "torch.cuda.foo"),
    ("x = torch.cuda.memory", "torch.cuda.memory"),
    ("x = torch.eye(3, device='cuda')", "torch.eye(device=)"),
    ("x.new_zeros(3, device='cuda:0')", "x.new_zeros(device=)"),
    ("x.to('cuda')", "x.to(cuda)"),
    ("x = torch.device('cuda', 0)", "torch.device(cuda)"),
    ("x = torch.eye(3, pin_memory=True)", "torch.eye(pin_memory=)"),
    ("if x.type() == 'torch.cuda.HalfTensor': pass", "torch.cuda.HalfTensor string"),
    ("from torch.cuda import nccl", "import torch.cuda.nccl"),
    ("import torch.cuda.nccl as nccl", "import torch.cuda.nccl"),
    ("from torch import cuda", "import torch.cuda"),
]


@pytest.mark.parametrize("line, what", UNKNOWN)
def test_new_site_is_found_with_file_and_line(line, what):
    source = f"import torch\n\ndef step(x):\n    {line}\n"
    (message,) = uncovered(find_sites("new", source), {"new": "megatron/core/new.py"})
    assert message == f"megatron/core/new.py:4: {what} in step"


@pytest.mark.parametrize("line", [
    "torch.cuda.synchronize()", "x = torch.zeros([], device='cuda')", "x = torch.empty(1, pin_memory=True)", "x.cuda()",
    "x.record_stream(None)", "x = torch.zeros(1, device=torch.cuda.current_device())", "getattr(x, 'cuda_graph', None)",
    "torch.cuda.Stream(device='cuda')"])
def test_answered_site_is_no_finding(line):
    assert uncovered(find_sites("new", f"import torch\nx = 0\n{line}\n"), {"new": "new.py"}) == []


def test_harmless_names_work_without_a_device():
    assert not torch.cuda.is_available()
    assert torch.cuda.device_count() == 0
    torch.cuda.empty_cache()
    assert all(isinstance(getattr(torch.cuda, name), type) for name in HARMLESS if name[0].isupper())


def test_replaced_functions_are_the_adapters():
    for module, names in REPLACED.items():
        for name in names:
            assert vars(importlib.import_module(f"megatron.core.{module}"))[name].__module__ == cpu.__name__
    for module, owner, name in cpu.CUDA_TYPE_SITES:
        target = importlib.import_module(module)
        assert "__wrapped__" in vars(vars(vars(target)[owner] if owner else target)[name])


def test_megatrons_torch_answers_on_the_cpu():
    schedules = importlib.import_module("megatron.core.pipeline_parallel.schedules")
    seen = schedules.torch
    assert seen is not torch
    for name in cpu.FACTORIES:
        arguments = {"full": ((2,), 1.0), "full_like": (torch.ones(2), 1.0), "randint": (3, (2,)), "tensor": ([1.0],),
                     "arange": (3,), "randperm": (3,)}.get(name, (torch.ones(2),) if name.endswith("like") else (2,))
        options = {} if name.endswith("like") else {"pin_memory": True}
        assert vars(seen)[name](*arguments, device="cuda", **options).device.type == "cpu"
        assert vars(seen)[name](*arguments, device=torch.device("cuda", 0)).device.type == "cpu"
    stream = seen.cuda.Stream()
    stream.wait_stream(seen.cuda.current_stream())
    with seen.cuda.stream(stream):
        assert stream.record_event().query()
    seen.cuda.synchronize()
    state = seen.cuda.get_rng_state()
    first = torch.rand(2)
    seen.cuda.set_rng_state(state)
    assert torch.equal(first, torch.rand(2))
    assert seen.nn is torch.nn
    assert seen.cuda.nccl is torch.cuda.nccl


def test_types_are_named_for_cuda_only_inside_the_sites():
    with cpu._cuda_type_names():
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.zeros(1).type(torch.int64).dtype == torch.int64
    assert torch.zeros(1).type() == "torch.FloatTensor"


def run_python(code: str) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=600)


def test_everyone_elses_torch_is_untouched():
    run_python("""
import torch, torch._dynamo
before = [dict(vars(space)) for space in (torch, torch.cuda, torch.Tensor, torch.nn.Module)]
import megatron_embed.platform.compat
after = [vars(space) for space in (torch, torch.cuda, torch.Tensor, torch.nn.Module)]
changed = [{name for name, value in old.items() if new.get(name) is not value} for old, new in zip(before, after)]
changed[2:] = [changed[place] | (after[place].keys() - before[place].keys()) for place in (2, 3)]
assert changed[2] == {"cuda", "pin_memory", "record_stream"}, changed[2]
assert changed[3] == {"cuda"}, changed[3]
assert not {"zeros", "empty", "tensor", "compile", "arange", "cuda"} & changed[0], changed[0]
assert not {name for name in changed[1] if not name.startswith("_")}, changed[1]
try:
    torch.zeros(1, device="cuda")
except (AssertionError, RuntimeError):
    pass
else:
    raise SystemExit("torch.zeros makes CUDA tensors")
""")


def test_adapter_refuses_a_machine_with_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="must not be installed on a machine with CUDA"):
        cpu.install()


def test_megatron_imported_first_is_refused(monkeypatch):
    assert "megatron.core" in sys.modules
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path
                                           if not isinstance(finder, cpu._MegatronFinder)])
    with pytest.raises(RuntimeError, match=r"megatron\.core was imported before megatron_embed\.platform\.compat"):
        cpu.install()


def test_second_installation_changes_nothing():
    before = list(sys.meta_path)
    cpu.install()
    assert sys.meta_path == before


SHARES = (3, 0, 5)


def uneven_regions():
    """(gathered rows, gradient of the share; scattered sum, gradient of the rows) of this rank."""
    import torch.distributed as dist

    from megatron_embed.platform.compat import tensor_parallel

    rank, group = dist.get_rank(), dist.group.WORLD
    share = (torch.arange(SHARES[rank] * 2.0).view(-1, 2) + 100 * rank).requires_grad_()
    gathered = tensor_parallel.gather_from_sequence_parallel_region(share, group=group, output_split_sizes=SHARES)
    (gathered * (rank + 1)).sum().backward()
    rows = (torch.arange(16.0).view(8, 2) * (rank + 1)).requires_grad_()
    scattered = tensor_parallel.reduce_scatter_to_sequence_parallel_region(rows, group=group, input_split_sizes=SHARES)
    (scattered * (rank + 1)).sum().backward()
    return gathered.detach(), share.grad, scattered.detach(), rows.grad


def test_uneven_shares_are_gathered_and_scattered():
    results = run_on_ranks(uneven_regions, 3)
    every = torch.cat([torch.arange(size * 2.0).view(-1, 2) + 100 * rank for rank, size in enumerate(SHARES)])
    summed = (torch.arange(16.0).view(8, 2) * 6).split(SHARES)
    owners = torch.repeat_interleave(torch.tensor([1.0, 2.0, 3.0]), torch.tensor(SHARES))[:, None].expand(8, 2)
    for rank, (gathered, share_grad, scattered, rows_grad) in enumerate(results):
        assert torch.equal(gathered, every)
        assert torch.equal(share_grad, torch.full((SHARES[rank], 2), 6.0))
        assert torch.equal(scattered, summed[rank])
        assert torch.equal(rows_grad, owners)
