"""LoRA adapters: values and gradients equal PEFT's in every layout."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.adapter_reference import write_adapter
from tests.helpers.embedding_reference import EmbeddingReference
from tests.helpers.embedding_reference import save_model as save_experts
from tests.helpers.exactness_cases import KINDS, Case, Layout
from tests.helpers.ranks import run_on_ranks
from tests.helpers.step_reference import ROWS, both_passes_of_runs, difference, objective_settings
from tests.helpers.toys import MINILM, layout, open_model, run_config, save_model

FAST = (
    Case(kind="qwen3", layout=Layout(), micro_batches=2, adapters=True),
    Case(kind="bert", layout=Layout(), micro_batches=1, adapters=True, recompute="full"),
    Case(kind="qwen3_moe", layout=Layout(dp=2, ep=2), micro_batches=2, adapters=True, distributed=True),
    Case(kind="qwen3", layout=Layout(tp=2), micro_batches=2, adapters=True, distributed=True),
    Case(kind="qwen3", layout=Layout(tp=2, sequence_parallel=False), micro_batches=1, adapters=True),
    Case(kind="qwen3_moe", layout=Layout(tp=2, etp=2), micro_batches=1, adapters=True),
    Case(kind="bert", layout=Layout(pp=2), micro_batches=2, adapters=True),
    Case(kind="bert", layout=Layout(cp=2), micro_batches=2, adapters=True),
    Case(kind="qwen3", layout=Layout(tp=2, pp=2), micro_batches=4, adapters=True, recompute="full"),
    # What else the families have: positions behind the padding id, biases of q, k, v, biases and a chopped rope,
    # experts with names of their own.
    Case(kind="xlm-roberta", layout=Layout(), micro_batches=2, adapters=True),
    Case(kind="mixtral", layout=Layout(), micro_batches=2, adapters=True),
    Case(kind="qwen2", layout=Layout(tp=2), micro_batches=2, adapters=True),
    Case(kind="llama", layout=Layout(tp=2), micro_batches=1, adapters=True),
    # One module for queries, keys and values, one for gate and up.
    Case(kind="modernbert", layout=Layout(tp=2, sequence_parallel=False), micro_batches=2, adapters=True),
)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    return EmbeddingReference(tmp_path_factory.mktemp("oracle"))


def by_layout(cases):
    layouts = dict.fromkeys(case.layout for case in cases)
    return [[case for case in cases if case.layout == layout] for layout in layouts]


@pytest.mark.parametrize("cases", [
    pytest.param(cases, id=str(cases[0].layout), marks=pytest.mark.slow if str(cases[0].layout) == "TP2" else ())
    for cases in by_layout(FAST)])
def test_gradients_equal_pefts(oracle, cases):
    for case, outcome in zip(cases, oracle.run(cases), strict=True):
        assert outcome.exact, f"{case}: {outcome}"


SLOW = tuple(
    Case(kind=kind, layout=sizes, micro_batches=count, adapters=True, distributed=(index + kind_index) % 2 == 0,
         recompute=("none", "selective", "full")[(index + kind_index) % 3])
    for index, sizes in enumerate((
        Layout(), Layout(dp=2), Layout(tp=2), Layout(tp=2, sequence_parallel=False), Layout(pp=2), Layout(cp=2),
        Layout(dp=2, ep=2), Layout(pp=2, vpp=2), Layout(tp=2, ep=2), Layout(tp=2, etp=2),
        Layout(tp=2, pp=2), Layout(tp=2, cp=2), Layout(pp=2, vpp=2, tp=2), Layout(tp=2, dp=2, ep=4),
        Layout(dp=4, ep=2, etp=2), Layout(tp=4, etp=2)))
    for kind_index, kind in enumerate(KINDS if max(sizes.ep, sizes.etp) == 1 else ("qwen3_moe",))
    for count in (2, 4)
    if sizes.sequence_parallel or kind != "qwen3_moe")
SLOW += tuple(
    Case(kind=kind, layout=layout, micro_batches=2, adapters=True, distributed=True)
    for layout in (Layout(tp=2), Layout(pp=2), Layout(cp=2), Layout(dp=2, ep=2), Layout(tp=2, etp=2))
    for kind in (("mixtral",) if max(layout.ep, layout.etp) > 1 else (
        "xlm-roberta", "qwen2", "llama", "mixtral", "modernbert", "gemma3_text")))
"""Every axis, experts split among fewer tensor ranks than the layers and among more."""


@pytest.mark.slow
@pytest.mark.parametrize("cases", by_layout(SLOW), ids=lambda cases: str(cases[0].layout))
def test_gradients_equal_pefts_in_every_layout(oracle, cases):
    for case, outcome in zip(cases, oracle.run(cases), strict=True):
        assert outcome.exact, f"{case}: {outcome}"


def test_a_wrong_factor_is_seen(oracle):
    (outcome,) = oracle.run([Case(kind="qwen3", layout=Layout(), micro_batches=2, adapters=True, sabotage="factor")])
    assert not outcome.exact


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """(base, PEFT directory) by kind."""
    folder = tmp_path_factory.mktemp("models")
    bases = {"qwen3": save_model(folder / "qwen3", "qwen3", tokenizer=True),
             "qwen3_moe": save_experts(folder / "qwen3_moe", "qwen3_moe")}
    adapters = {kind: write_adapter(folder / f"{kind}-lora", Path(base)) for kind, base in bases.items()}
    for path in adapters.values():
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(MINILM / name, path)
    return {kind: (base, str(adapters[kind])) for kind, base in bases.items()}


@pytest.mark.parametrize("sizes", [layout(), layout(2), layout(2, sp=False)], ids=["one", "tp2", "tp2nosp"])
def test_second_pass_drops_what_the_first_dropped(adapted, sizes):
    def config(rate, recompute="none"):
        return run_config(adapted["qwen3"][1], parallel=sizes, objective=objective_settings(), lora={"dropout": rate},
                          training={"global_batch_size": ROWS, "micro_batch_size": 6, "recompute": recompute})

    runs = [(config(0.3), None, True), (config(0.3, "full"), None, True), (config(0.3), None, False),
            (config(0.0), None, True)]
    answers = run_on_ranks(both_passes_of_runs, sizes["tensor_model_parallel_size"], runs)
    (replayed, gradients), (recomputed, again), (forgotten, _), (without, _) = answers[-1]
    assert any(gradient.any() for gradient in gradients.values())
    assert difference(again, gradients) <= 1e-5
    for outputs in (replayed, recomputed):
        assert all(torch.equal(first, second) for first, second in zip(outputs[:2], outputs[2:], strict=True))
    assert not torch.equal(forgotten[0], forgotten[2])
    assert (replayed[0] - without[0]).abs().max() > 0.01, "dropout was off"


def first_weights(config):
    """Adapters of this rank as they are drawn, by global name."""
    opened = open_model(config)
    return {name: parameter.detach().clone() for chunk in opened.chunks
            for name, parameter in chunk.global_parameters().items() if parameter.requires_grad}


def test_every_layout_begins_with_the_same_adapters(adapted):
    def sampled_documents(base, sizes, ranks, seed=1234):
        config = run_config(base, parallel=sizes, lora={"rank": 4}, training={"seed": seed})
        return run_on_ranks(first_weights, ranks, config)

    (whole,) = sampled_documents(adapted["qwen3"][0], layout(), 1)
    assert len(whole) == 4 * 7 * 2
    for name, matrix in whole.items():
        if name.endswith(".B"):
            assert not matrix.any()
            continue
        bound = matrix.shape[1]**-0.5  # PEFT's: kaiming_uniform_ with a = sqrt(5)
        assert matrix.abs().max() <= bound
        assert matrix.std() == pytest.approx(bound / 3**0.5, rel=0.2), name
    matrices = [matrix.flatten()[:32] for name, matrix in whole.items() if name.endswith(".A")]
    assert len({tuple(matrix.tolist()) for matrix in matrices}) == len(matrices), "two adapters began alike"
    shards = sampled_documents(adapted["qwen3"][0], layout(2), 2)
    for name, matrix in whole.items():
        split = name.endswith(".A") and (".linear_proj." in name or ".linear_fc2." in name)
        shares = matrix.chunk(2, dim=1) if split else [matrix, matrix]
        if name.endswith(".A"):
            assert all(torch.equal(shard[name], share) for shard, share in zip(shards, shares, strict=True)), name
    (other,) = sampled_documents(adapted["qwen3"][0], layout(), 1, seed=5)
    assert not any(torch.equal(other[name], matrix) for name, matrix in whole.items() if name.endswith(".A"))


def trained_state(config):
    """Numbers that the optimizer holds, the adapters have, and gradient buffers have room for, after a step."""
    from megatron_embed.training.optimizer import build_optimizer, wrap_in_ddp

    opened = open_model(config)
    wrapped = wrap_in_ddp(opened.chunks, config, opened.topology)
    optimizer = build_optimizer(config, wrapped, opened.topology)
    parameters = [parameter for chunk in opened.chunks for parameter in chunk.parameters()]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    frozen = [parameter.detach().clone() for parameter in parameters if not parameter.requires_grad]
    for parameter in trained:
        parameter.main_grad.fill_(1.0)
    optimizer.step()
    assert all(torch.equal(before, parameter) for before, parameter in zip(
        frozen, (parameter for parameter in parameters if not parameter.requires_grad), strict=True))
    held = sum(value.numel() for part in optimizer.chained_optimizers for state in part.optimizer.state.values()
               for name, value in state.items() if name == "exp_avg")
    buffers = sum(parameter.numel() for chunk in wrapped for buffer in chunk.buffers + chunk.expert_parallel_buffers
                  for parameter in buffer.params)
    return held, sum(parameter.numel() for parameter in trained), buffers


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed", "plain"])
def test_optimizer_holds_adapters_alone(adapted, distributed):
    for kind in ("qwen3", "qwen3_moe"):
        config = run_config(adapted[kind][0], lora={"rank": 4}, distributed=distributed)
        (held, trained, buffers), = run_on_ranks(trained_state, 1, config)
        assert held == trained == buffers > 0
