"""Faults that a CPU run cannot see: each must end a run on the device, and leave the CPU's curve as it is.

Without this test the others could pass on a device that forgives everything.
"""

import contextlib
import dataclasses
from unittest import mock

import pytest

from tests.helpers.device_runs import SECONDS, curve_of, train_arguments
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command

pytestmark = pytest.mark.multi_gpu


def angles_on_the_host():
    from megatron_embed.models import encoder

    right = encoder.rotary_cos_sin
    return mock.patch.object(encoder, "rotary_cos_sin", lambda *arguments: right(*arguments).cpu())


def token_ids_on_the_host():
    from megatron_embed.training import grad_cache

    right = grad_cache.to_device

    def to_device(*arguments, **options):
        batch = right(*arguments, **options)
        return dataclasses.replace(batch, token_ids=batch.token_ids.cpu())

    return mock.patch.object(grad_cache, "to_device", to_device)


@contextlib.contextmanager
def nccl_alone():
    import torch.distributed as dist

    right = dist.init_process_group

    def init_process_group(backend, *arguments, **options):
        return right("nccl" if "nccl" in backend else backend, *arguments, **options)

    dist.barrier()
    dist.destroy_process_group()  # the run starts its own, as by a launcher
    with mock.patch.object(dist, "init_process_group", init_process_group):
        yield


MUTATIONS = {
    angles_on_the_host: ("same device", 1),
    token_ids_on_the_host: ("same device", 1),
    nccl_alone: ("No backend type associated with device type cpu", 2),
}
"""Fault -> words of the error on the device, ranks."""


def mutated(mutation, arguments):
    with mutation():
        return command(arguments)


@pytest.mark.parametrize("mutation", [
    pytest.param(mutation, marks=[pytest.mark.slow] if mutation is nccl_alone else [], id=mutation.__name__)
    for mutation in MUTATIONS])
def test_a_fault_that_the_cpu_does_not_see_ends_a_run_on_a_gpu(models, cpu_curve, cpu_pool, mutation, tmp_path):
    words, ranks = MUTATIONS[mutation]
    on_cpu = cpu_pool.run(mutated, ranks, (mutation, train_arguments(models["qwen3"], tmp_path / "cpu")), {}, SECONDS)
    assert curve_of(on_cpu, tmp_path / "cpu") == pytest.approx(cpu_curve("qwen3"), rel=1e-4)
    for code, _, err, _ in run_on_ranks(mutated, ranks, mutation, train_arguments(models["qwen3"], tmp_path / "gpu")):
        assert code not in (0, 2) and words in err, err
