"""Products grouped over experts equal Megatron's loop over experts, in value and gradient."""

from unittest import mock

import pytest
import torch

from megatron_embed.platform.grouped_linear import GroupedLinear, Groups
from tests.helpers.ranks import run_on_ranks
from tests.helpers.step_reference import ROWS, build, objective_settings
from tests.helpers.toys import copy_tokenizer, layout, run_config, save_toy

LAYOUTS = {"EP1": (1, {}), "EP2": (2, {"expert_model_parallel_size": 2}),
           "ETP2": (2, layout(2) | {"expert_tensor_parallel_size": 2})}
LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = save_toy(tmp_path_factory.mktemp("model") / "moe", "Qwen3MoeModel", vocab_size=30522)
    copy_tokenizer(path)
    return str(path)


def step_of(config, experts):
    """(outputs of the first expert layer, gradients) of one step with this class of experts."""
    from megatron_embed.models import backbone

    with mock.patch.object(backbone, "GroupedExperts", vars(backbone)[experts]):
        built, batch = build(config)
    layers = [module for module in built.chunks[0].modules() if type(module).__name__ == experts]
    assert len(layers) == built.chunks[0].config.num_layers
    generator = torch.Generator().manual_seed(built.topology.rank)
    with torch.no_grad():  # adapters whose second matrix is zero would add nothing
        for name, parameter in built.chunks[0].named_parameters():
            if name.endswith(".B"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    outputs = []
    layers[0].register_forward_hook(lambda module, inputs, output: outputs.append(output[0].detach()))
    built.gradients(batch)
    parameters = built.chunks[0].global_parameters()
    return outputs, {name: parameter.main_grad.clone() for name, parameter in parameters.items()
                     if parameter.requires_grad}


def both_kinds(config):
    return step_of(config, "SequentialMLP"), step_of(config, "GroupedExperts")


@pytest.mark.parametrize("name, lora", [
    pytest.param(name, lora, id=f"{name}, {kind}",
                 marks=() if (name, kind) in (("EP2", "all"), ("ETP2", "adapters")) else pytest.mark.slow)
    for name in LAYOUTS for kind, lora in (("all", {}), ("adapters", LORA))])
def test_grouped_experts_equal_a_loop_over_experts(model, name, lora):
    ranks, sizes = LAYOUTS[name]
    config = run_config(model, parallel=sizes, objective=objective_settings(), lora=lora,
                        training={"global_batch_size": ROWS, "micro_batch_size": 3, "keep_activations": 0})
    for (expected_outputs, expected), (outputs, gradients) in run_on_ranks(both_kinds, ranks, config):
        assert len(outputs) == len(expected_outputs) > 2
        for output, reference in zip(outputs, expected_outputs, strict=True):
            assert (output - reference).norm() <= 1e-6 * reference.norm()
        assert gradients.keys() == expected.keys()
        experts = [name for name in gradients if "local_experts" in name]
        assert len(experts) >= 12 and all(expected[name].any() for name in experts)
        for key, gradient in gradients.items():
            # Adapters of gate and up are summed in another order, which the layers below amplify.
            assert (gradient - expected[key]).norm() <= (1e-5 if lora else 1e-6) * expected[key].norm(), key


def test_experts_without_rows_get_no_gradient(monkeypatch):
    """On a B200 torch's product leaves memory as it was there (pytorch issue 172439)."""
    sizes, original = (0, 3, 0, 5), torch.nn.functional.grouped_mm

    def leaves_gaps(left, right, *, offs):
        result = original(left, right, offs=offs)
        if result.dim() == 3:
            result[[0, 2]] = torch.nan
        return result

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", leaves_gaps)
    groups = Groups(sizes=sizes, ends=torch.tensor(sizes).cumsum(0).to(torch.int32))
    inputs, weights = torch.randn(8, 16), [torch.randn(8, 16).bfloat16().requires_grad_() for _ in sizes]
    GroupedLinear.apply(inputs.bfloat16(), groups, *weights).sum().backward()
    assert [bool(weight.grad.any()) for weight in weights] == [False, True, False, True]
    assert all(weight.grad.isfinite().all() for weight in weights)


@pytest.mark.parametrize("sizes", [(3, 0, 5), (0, 0, 0), (8,)])
@pytest.mark.parametrize("trained", [True, False])
def test_rows_of_each_expert_meet_its_weight(sizes, trained):
    torch.manual_seed(2)
    rows, width, outputs = sum(sizes), 6, 4
    inputs = torch.randn(rows, width, requires_grad=True)
    weights = [torch.randn(outputs, width, requires_grad=trained) for _ in sizes]
    result = GroupedLinear.apply(inputs, Groups(sizes=sizes, ends=None), *weights)
    copies = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in (inputs, *weights)]
    expected = torch.cat([part @ weight.t() for part, weight in zip(copies[0].split(sizes), copies[1:], strict=True)])
    upstream = torch.randn_like(result)
    result.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(result, expected)
    for tensor, copy in zip((inputs, *weights), copies, strict=True):
        assert (tensor.grad is None) == (copy.grad is None)
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, copy.grad)
