"""Attention dropout by the flash kernels: the second pass of a step drops what the first dropped, in whole runs."""

from unittest import mock

import pytest
import torch

from tests.helpers.device_runs import STEPS, train_arguments
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command

LAYOUTS = {
    "one": (1, {}),
    "recompute": (1, {"training": {"recompute": "full"}}),
    "cp2": (2, {"parallel": {"context_parallel_size": 2}}),
    "tp2": (2, {"parallel": {"tensor_model_parallel_size": 2}}),
    "tp2 without SP": (2, {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": False}}),
}
"""Ranks, settings."""


def embeddings_of(arguments):
    """Runs in a worker: embeddings of every micro-batch in the first and the second passes."""
    from megatron_embed.models.encoder import EmbeddingModel

    right, seen = EmbeddingModel.forward, {False: [], True: []}

    def forward(model, batch):
        output = right(model, batch)
        seen[torch.is_grad_enabled()].append(output.detach().cpu())
        return output

    with mock.patch.object(EmbeddingModel, "forward", forward):
        code, _, err, _ = command(arguments)
    assert code == 0, err
    return seen[False], seen[True]


@pytest.mark.slow
@pytest.mark.multi_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_passes_of_a_step_drop_the_same(models, tmp_path, layout):
    ranks, settings = LAYOUTS[layout]
    runs = []
    for rate in (0.2, 0.0):
        arguments = train_arguments(models["qwen3"], tmp_path / f"run{rate}", "model.dtype=bfloat16",
                                    "model.attention=flash", "training.first_pass_micro_batches=1",
                                    f"training.attention_dropout={rate}", **settings)
        runs.append(run_on_ranks(embeddings_of, ranks, arguments))
    for (first, second), (without, _) in zip(*runs, strict=True):
        assert len(first) == len(second) == 2 * STEPS, "two micro-batches a step"
        assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
        assert not any(torch.equal(one, other) for one, other in zip(first, without, strict=True))
