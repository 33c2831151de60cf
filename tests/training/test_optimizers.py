"""optimizer.name: curves equal the plain optimizer's on the stock model, state has the bytes that `plan` counts, and a
run that is killed resumes bit for bit."""

import dataclasses

import bitsandbytes
import numpy as np
import pytest
import torch
import transformers
import yaml

from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import assert_refused, command
from tests.helpers.runs import configuration, curve, go_back, train
from tests.helpers.stock_curves import stock_curve
from tests.helpers.toys import QWEN3, copy_tokenizer, layout, save_model

WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
"""Each Hugging Face matrix has 4096 elements or more, below which bitsandbytes keeps 32 bits: ours are fused."""
STEPS, RATE, DECAY = 20, 1e-4, 0.05


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", tokenizer=True, **WIDTHS)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A mixture of four experts whose routers are decided: rounding chooses no other expert."""
    path = tmp_path_factory.mktemp("models") / "qwen3_moe"
    config = transformers.Qwen3MoeConfig(**QWEN3 | WIDTHS | {
        "vocab_size": 30522, "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2,
        "norm_topk_prob": True, "num_hidden_layers": 2})
    torch.manual_seed(3)
    saved = transformers.Qwen3MoeModel(config)
    with torch.no_grad():
        for name, parameter in saved.named_parameters():
            strong = len(parameter) == config.vocab_size or "gate.weight" in name
            parameter.add_(torch.randn_like(parameter) * (1.0 if strong else 0.1))
    saved.save_pretrained(path)
    copy_tokenizer(path)
    return str(path)


class MuonOfExperts:
    """torch.optim.Muon on the matrices of each expert, which Transformers stacks: gate, up and down by themselves."""

    def __init__(self, model):
        stacks = [(parameter, 2 if "gate_up" in name else 1)
                  for name, parameter in model.named_parameters() if parameter.ndim == 3]

        def matrices(tensors):
            return [part for tensor, (_, parts) in zip(tensors, stacks, strict=True) for expert in tensor
                    for part in expert.chunk(parts)]

        self.views = [torch.nn.Parameter(part) for part in matrices([parameter.data for parameter, _ in stacks])]
        self.gradients = lambda: matrices([parameter.grad for parameter, _ in stacks])
        self.optimizer = torch.optim.Muon(self.views, lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")

    def step(self):
        for view, gradient in zip(self.views, self.gradients(), strict=True):
            view.grad = gradient
        self.optimizer.step()


def settings(model, directory, name, *, sizes=None, steps=STEPS, dtype="float32"):
    values = configuration(str(model), directory, parallel=sizes, distributed=name != "muon", train_steps=steps,
                           learning_rate=RATE, lr_decay_style="constant", weight_decay=DECAY)
    values["model"]["dtype"] = dtype
    values["data"]["shuffle"] = False
    values["optimizer"]["name"] = name
    values["checkpoint"] |= {"save_every_steps": steps // 2, "keep": 0}
    return values


def losses(directory):
    return np.array([step[0] for step in curve(directory)])


def stock_losses(base, name):
    """Losses of Transformers' model under the optimizer itself, on the rows of the same steps."""
    model = transformers.AutoModel.from_pretrained(base, dtype=torch.float32).train()
    return stock_curve(model, base, plain_optimizers(model, name), STEPS)


def plain_optimizers(model, name):
    decayed = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    if name == "adamw_8bit":
        return [bitsandbytes.optim.AdamW8bit([{"params": decayed, "weight_decay": DECAY},
                                              {"params": others, "weight_decay": 0.0}], lr=RATE)]
    matrices = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    rest = [parameter for parameter in decayed if all(parameter is not matrix for matrix in matrices)]
    return [torch.optim.Muon(matrices, lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([{"params": rest, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}],
                              lr=RATE)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw_8bit", "muon"])
def test_twenty_losses_equal_the_plain_optimizers(model, tmp_path, name, record_property):
    run_on_ranks(train, 1, settings(model, tmp_path / "run", name))
    (theirs,) = run_on_ranks(stock_losses, 1, model, name)
    ours = losses(tmp_path / "run")
    record_property("largest_difference", np.abs(ours - theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    run_on_ranks(train, 1, settings(model, tmp_path / "adamw", "adamw"))
    difference = np.abs(losses(tmp_path / "adamw") - ours).max()
    assert difference > 1e-4, "AdamW would pass as well, and so would a run that learns nothing"


def stock_mixture_losses(base):
    """Losses of Transformers' mixture of experts under torch.optim.Muon, on the rows of the same steps."""
    model = transformers.AutoModel.from_pretrained(base, dtype=torch.float32, experts_implementation="eager").train()
    return stock_curve(model, base, [*plain_optimizers(model, "muon"), MuonOfExperts(model)], STEPS)


@pytest.mark.slow
def test_muon_on_a_mixture_of_experts_equals_the_plain_optimizer_in_every_layout(mixture, tmp_path, record_property):
    """Each expert's matrices are whole on a rank of EP2, and gathered with ETP2; TP2 alone leaves the experts whole."""
    (expected,) = run_on_ranks(stock_mixture_losses, 1, mixture)
    for case, ranks, sizes in (("one", 1, layout()), ("ep2", 2, layout() | {"expert_model_parallel_size": 2}),
                               ("tp2", 2, layout(2)), ("etp2", 2, layout(2) | {"expert_tensor_parallel_size": 2}),
                               ("pp2", 2, layout(pp=2)), ("dp2", 2, layout())):
        values = settings(mixture, tmp_path / case, "muon", sizes=sizes)
        values["training"]["moe_aux_loss_coefficient"] = 0.0
        run_on_ranks(train, ranks, values)
        difference = np.abs(losses(tmp_path / case) - expected).max()
        record_property(f"largest_difference_{case}", difference)
        assert difference <= 3e-5, case
    values = settings(mixture, tmp_path / "adamw", "adamw")
    values["training"]["moe_aux_loss_coefficient"] = 0.0
    run_on_ranks(train, 1, values)
    assert np.abs(losses(tmp_path / "adamw") - expected).max() > 1e-4, "AdamW would pass as well"


@pytest.mark.slow
def test_layouts_agree(model, tmp_path, record_property):
    for name, cases in (("adamw_8bit", [("tp2", layout(2)), ("pp2", layout(pp=2)), ("dp2", layout())]),
                        ("muon", [("tp2", layout(2)), ("pp2", layout(pp=2)), ("dp2", layout())])):
        run_on_ranks(train, 1, settings(model, tmp_path / name, name))
        for case, sizes in cases:
            run_on_ranks(train, 2, settings(model, tmp_path / f"{name}_{case}", name, sizes=sizes))
            difference = np.abs(losses(tmp_path / f"{name}_{case}") - losses(tmp_path / name)).max()
            record_property(f"largest_difference_{name}_{case}", difference)
            assert difference <= (1e-3 if name == "adamw_8bit" else 3e-5), (name, case)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw_8bit", "muon"])
def test_a_run_resumes_bit_for_bit(model, tmp_path, name):
    values = settings(model, tmp_path / "run", name, steps=4, dtype="bfloat16", sizes=layout(pp=2))
    run_on_ranks(train, 2, values)
    resumed = go_back(tmp_path / "run", tmp_path / "resumed", 2)
    run_on_ranks(train, 2, settings(model, resumed, name, steps=4, dtype="bfloat16", sizes=layout(pp=2)))
    assert curve(resumed) == curve(tmp_path / "run")
    assert len(set(curve(resumed))) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw_8bit", "muon"])
def test_a_run_resumes_in_another_layout(model, tmp_path, name):
    run_on_ranks(train, 2, settings(model, tmp_path / "run", name, steps=4, sizes=layout(pp=2)))
    resumed = go_back(tmp_path / "run", tmp_path / "resumed", 2)
    run_on_ranks(train, 2, settings(model, resumed, name, steps=4, sizes=layout(2)))
    difference = np.abs(losses(resumed) - losses(tmp_path / "run"))
    assert difference.max() <= (1e-4 if name == "adamw_8bit" else 3e-5)
    assert len(losses(resumed)) == 4 and len(set(losses(resumed))) == 4


def largest_errors(config, name):
    """(parameter, largest difference, number of different elements) to the plain optimizer on Hugging Face's tensors,
    after three steps with the same gradients; the parameter's own change in them is the unit."""
    from megatron_embed.convert.hf_directory import HFDirectory, hf_weight_shards
    from megatron_embed.training.optimizer import build_optimizer, build_scheduler, squared_norms, update, wrap_in_ddp
    from tests.helpers.toys import open_model

    opened = open_model(config)
    topology, parameters = opened.topology, opened.chunks[0].global_parameters()
    padded = len(parameters["embedding.word_embeddings.weight"]) * topology.tp_size
    wrapped = wrap_in_ddp(opened.chunks, config, topology)
    optimizer = build_optimizer(config, wrapped, topology)
    build_scheduler(optimizer, config.training, 3)
    stock = transformers.AutoModel.from_pretrained(config.model.path, dtype=torch.float32)
    theirs = dict(stock.named_parameters())

    def ours(tensors):
        with HFDirectory(config.model.path) as source:
            source.read_slice = lambda full, dim, start, stop: tensors[full.removeprefix(source.family.prefix)].narrow(
                dim, start, stop - start)
            yield from hf_weight_shards(source, names=parameters, tp_rank=topology.tp_rank, tp_size=topology.tp_size,
                                        padded_vocab_size=padded)

    before = {key: value.detach().clone() for key, value in parameters.items()}
    optimizers = plain_optimizers(stock, name)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for parameter in theirs.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for key, gradient in ours({key: parameter.grad for key, parameter in theirs.items()}):
            parameters[key].main_grad.copy_(gradient)
        for each in optimizers:
            each.step()
        assert update(optimizer, squared_norms(optimizer), 0.0)[1]
    return [(key, float((parameters[key] - expected).abs().max() / (parameters[key] - before[key]).abs().max()),
             int((parameters[key] != expected).sum()))
            for key, expected in ours({key: parameter.detach() for key, parameter in theirs.items()})]


@pytest.mark.parametrize("name, sizes", [("adamw_8bit", layout(2)), ("adamw_8bit", layout()), ("muon", layout(2))],
                         ids=["adamw_8bit-tp2", "adamw_8bit-dp2", "muon-tp2"])
def test_updates_equal_the_plain_optimizers(tmp_path, name, sizes):
    """Bit for bit, with widths of whole blocks of 256 on a rank. Except AdamW's, which Muon leaves to torch's fused
    kernel, and the block in which data-parallel ranks divide the parameters, each with a scale of its own."""
    from tests.helpers.toys import run_config

    width = 512 if name == "adamw_8bit" else 128
    base = save_model(tmp_path / "model", "qwen3", num_hidden_layers=1, hidden_size=width, intermediate_size=width,
                      num_attention_heads=8, num_key_value_heads=2, head_dim=width // 8)
    config = run_config(base, parallel=sizes, distributed=name != "muon", training={
        "learning_rate": RATE, "lr_decay_style": "constant", "weight_decay": DECAY, "clip_grad": 0.0,
        "global_batch_size": 2, "train_steps": 3})
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name=name))
    for errors in run_on_ranks(largest_errors, 2, config, name):
        assert len(errors) == 10
        others = [(key, error, count) for key, error, count in errors if count]
        if name == "muon":
            assert [key for key, *_ in others if ".linear_" in key] == []
            assert max(error for _, error, _ in others) < 1e-3
        elif sizes == layout(2):
            assert others == []
        else:
            assert len(others) <= 1 and all(error < 0.1 and count <= 256 for _, error, count in others), others


def state_bytes(config):
    """(bytes of state on this rank after a step, what `plan` counts)."""
    import torch.distributed as dist

    from megatron_embed.planning.memory import grid_of, stage_memory
    from megatron_embed.planning.shapes import shape_of
    from megatron_embed.platform.adamw_8bit import AdamW8bit
    from megatron_embed.training.optimizer import build_optimizer, wrap_in_ddp
    from tests.helpers.toys import open_model

    opened = open_model(config)
    wrapped = wrap_in_ddp(opened.chunks, config, opened.topology)
    optimizer = build_optimizer(config, wrapped, opened.topology)
    for chunk in opened.chunks:
        for parameter in chunk.parameters():
            parameter.main_grad.fill_(1e-3)
    optimizer.step()
    held = 0
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        held += inner.nbytes if isinstance(inner, AdamW8bit) else 0
        held += sum(value.nbytes for state in inner.state.values() for value in state.values())
        if config.model.dtype == "bfloat16":
            held += sum(parameter.nbytes for group in inner.param_groups for parameter in group["params"])
    counted = stage_memory(config, shape_of(config.model.path), grid_of(config, dist.get_world_size()),
                           opened.topology.pp_rank)
    return held, counted.optimizer


@pytest.mark.parametrize("name", ["adamw_8bit", "muon"])
def test_state_has_the_bytes_that_plan_counts(model, name):
    from tests.helpers.toys import run_config

    for dtype in ("float32", "bfloat16"):
        config = run_config(model, dtype=dtype, distributed=name != "muon")
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name=name))
        ((held, counted),) = run_on_ranks(state_bytes, 1, config)
        assert held == pytest.approx(counted, rel=0.02), dtype


@pytest.mark.slow
def test_state_of_a_mixture_has_the_bytes_that_plan_counts(mixture):
    from tests.helpers.toys import run_config

    config = run_config(mixture, dtype="bfloat16", distributed=False,
                        parallel=layout() | {"expert_model_parallel_size": 2})
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name="muon"))
    for held, counted in run_on_ranks(state_bytes, 2, config):
        assert held == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("change, words", [
    ({"optimizer": {"name": "muon", "distributed": True}}, ["optimizer.name = 'muon'", "distributed: false"]),
    ({"optimizer": {"name": "muon", "distributed": False}, "lora": {"rank": 4}}, ["optimizer.name", "adapters"]),
    ({"optimizer": {"name": "adamw_8bit", "distributed": False}}, ["optimizer.name", "distributed: true"]),
    ({"optimizer": {"name": "galore"}}, ["optimizer.name", "muon"])], ids=str)
def test_wrong_settings_are_refused(model, tmp_path, change, words):
    values = settings(model, tmp_path / "run", "adamw") | change
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert_refused(run_on_ranks(command, 1, ["train", str(tmp_path / "run.yaml")]), *words)
