"""How often the host waits for the GPU in a step, by the function that asks: nowhere else, and not more often.

A copy from or to the GPU that is not asynchronous, a value or a size that is read back, a synchronization: each stops
the host until the GPU has done what was queued. Counted on the pretend device, whose kernels are the CPU's.

Where the counts change: a lower one passes (lower the number here as well); after a new or a larger one the message of
the failed test is the table to paste, if the wait is needed at all.
"""

import collections
import json
from unittest import mock

import pytest

from tests.helpers.device_runs import SECONDS, STEPS, train_arguments
from tests.helpers.kinds_of_runs import RUNS, sections_of
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command
from tests.helpers.reranker_runs import run_settings
from tests.helpers.toys import MINI_EN, save_reranker
from tests.pretend_cuda.environment import is_pretended

MICRO_BATCHES = 4
"""Number in a step, which has two passes over each. The model has 4 layers and 34 tensors of parameters."""

PER_STEP = {"parallel.device_copy:copy_to_host": 1}
"""Function -> blocking waits of one step, at most."""
SAMPLE = {"checkpoint.parameter_checksums:sample": 1}
"""Of runs whose parameters are not gathered late: audit.jsonl then notes a sample of every step, in one read of a few
numbers after the update, however large the model is."""
WITH_SAMPLE = ("lora", "nf4", "nf4_of_scales_too", "int8", "sparse", "sparse_taught", "muon")
"""Kinds of runs with adapters, with a head whose weights are read without a call of their module, or without
`optimizer.distributed`."""


@pytest.fixture(autouse=True)
def _on_the_pretend_device():
    if not is_pretended():
        pytest.skip("needs the pretend device, which counts (docs/pretend_device.md)")


def waits_of(arguments):
    """Runs in a worker: function -> blocking waits of a whole run."""
    from megatron_embed.platform.weight_gradient import products_can_accumulate
    from tests.pretend_cuda import waits

    products_can_accumulate()  # once in a process, which a test may begin with a run of either length
    with waits.recorded() as events:
        code, _, err, _ = command(arguments)
    assert code == 0, err
    functions = collections.Counter()
    for wait, count in events.items():
        if wait.blocks:
            functions[wait.function.rpartition(":")[0]] += count
    return dict(functions), waits.table(events)


def check_budget(arguments, ranks=1, **more):
    """The difference between runs of four steps and of two: the first step also makes what later ones reuse.

    `arguments`: those of a run, by its number of steps. `more`: waits of a step besides PER_STEP.
    """
    short, long = (run_on_ranks(waits_of, ranks, [*arguments(steps), f"training.train_steps={steps}",
                                                  f"training.micro_batch_size={8 // ranks // MICRO_BATCHES or 1}",
                                                  "model.dtype=bfloat16"], timeout_seconds=SECONDS)
                   for steps in (2, 4))
    for (before, _), (after, lines) in zip(short, long, strict=True):
        per_step = {name: (count - before.get(name, 0)) / 2 for name, count in after.items()}
        per_step = {name: count for name, count in sorted(per_step.items()) if count > 0}
        assert per_step, "nothing was counted, so nothing is shown"
        table = "".join(f'    "{name}": {count:g},\n' for name, count in per_step.items())
        over = {name: count for name, count in per_step.items() if count > (PER_STEP | more).get(name, 0)}
        assert not over, (f"more waits per step than PER_STEP allows: {over}\nnow:\n{table}\nby line, whole run:\n"
                          f"{lines}")


def embedder(path, folder, /, **sections):
    """Arguments of a run of an embedding model, by its number of steps."""
    return lambda steps: train_arguments(path, folder / f"run{steps}", **sections)


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [0, pytest.param("auto", marks=pytest.mark.slow)])
def test_a_step_waits_no_more_than_its_budget(models, kept, tmp_path):
    check_budget(embedder(models["qwen3"], tmp_path, training={"keep_activations": kept}))


@pytest.mark.slow
@pytest.mark.multi_gpu
@pytest.mark.parametrize("key, more", [
    ("tensor_model_parallel_size", {}), ("context_parallel_size", {}), (None, {}),
    # Megatron synchronizes after every exchange with another stage (batch_p2p_sync): 8 micro-batches in two passes.
    ("pipeline_model_parallel_size", {"megatron.core.pipeline_parallel.p2p_communication:_communicate": 17})])
def test_two_ranks_wait_no_more(models, key, more, tmp_path):
    check_budget(embedder(models["qwen3"], tmp_path, parallel={} if key is None else {key: 2}), 2, **more)


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("loss", ["cosent", "online_contrastive", "cosine_similarity"])
def test_pairs_wait_no_more(models, loss, tmp_path):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps({"text_a": f"number {row} is a number", "text_b": f"{row % 3} is none",
                                        "score": row % 2}) + "\n" for row in range(64)), encoding="utf-8")
    check_budget(embedder(models["bert"], tmp_path, data={"train": [str(rows)]}, objective={"loss": loss}))


@pytest.mark.slow
@pytest.mark.gpu
def test_triplets_wait_no_more(models, tmp_path):
    check_budget(embedder(models["qwen3"], tmp_path, data={"train": [str(MINI_EN)], "num_negatives": 1},
                          objective={"loss": "triplet"}))


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("loss", ["lambda_loss", "listwise"])
def test_rerankers_wait_no_more(loss, tmp_path):
    model = save_reranker(tmp_path / "model", "Qwen3ForCausalLM")

    def arguments(steps):
        folder = tmp_path / f"run{steps}"
        folder.mkdir()
        return ["train", run_settings(model, folder, objective={"loss": loss})]

    check_budget(arguments, **SAMPLE)


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_run_waits_no_more(directories, rows, name, tmp_path):
    model, sections = sections_of(name, directories, rows)
    check_budget(embedder(model, tmp_path, **sections), **(SAMPLE if name in WITH_SAMPLE else {}))


@pytest.mark.slow
@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", ["late_interaction", "sparse", "joint", "guided", "compatible", "teacher"])
def test_two_ranks_of_a_kind_wait_no_more(directories, rows, name, tmp_path):
    """Data-parallel ones, whose documents and ids are gathered."""
    model, sections = sections_of(name, directories, rows)
    check_budget(embedder(model, tmp_path, **sections), 2, **(SAMPLE if name in WITH_SAMPLE else {}))


def read_back_in_the_forward_pass(arguments):
    """Runs in a worker: as `waits_of`, with a model that looks at its output, and how often it looked."""
    from megatron_embed.models.encoder import EmbeddingModel

    right = EmbeddingModel.forward
    looks = []

    def forward(model, batch):
        output = right(model, batch)
        looks.append(output.sum().item())
        return output

    with mock.patch.object(EmbeddingModel, "forward", forward):
        return *waits_of(arguments), len(looks)


@pytest.mark.slow
@pytest.mark.gpu
def test_a_new_read_back_is_counted(models, tmp_path):
    arguments = train_arguments(models["qwen3"], tmp_path / "run", "model.dtype=bfloat16")
    ((counts, lines, looks),) = run_on_ranks(read_back_in_the_forward_pass, 1, arguments)
    # Under the name of its caller, for this file is not the package's.
    planted = {name: count for name, count in counts.items()
               if name.startswith("megatron.core.distributed.") and name.endswith(":forward")}
    assert looks >= STEPS, "the model was not asked in every step"
    assert sum(planted.values()) == looks and not planted.keys() & PER_STEP.keys(), lines
