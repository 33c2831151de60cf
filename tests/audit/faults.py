"""Faults that a test gives a run from outside: functions of the program are replaced in the ranks of a run, or files of
it changed afterwards. Each fault has the name by which an audit must call it."""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from tests.helpers.runs import train

WRONG = 4
"""The step that is wrong, from 1, where a fault is of one step; checkpoints are every two steps."""


@contextlib.contextmanager
def replaced(target, name, make):
    """`target.name` replaced by make(original)."""
    with mock.patch.object(target, name, make(vars(target)[name])):
        yield


def shifted_labels():
    from megatron_embed.objectives import contrastive

    def make(original):
        def of(batch, ids, rank):
            terms = original.__func__(batch, ids, rank) if hasattr(original, "__func__") else original(batch, ids, rank)
            return dataclasses.replace(terms, positive=terms.positive.roll(-1))
        return staticmethod(of)

    return replaced(contrastive._Terms, "of", make)


def detached_remote_negatives():
    from megatron_embed.objectives import gathering

    def scatter(rows, group):
        return rows[group.rank()]

    return mock.patch.object(gathering, "scatter_sum", scatter)


def loss_scale():
    from megatron_embed.training import grad_cache

    return mock.patch.object(grad_cache, "surrogate_factor", lambda count, dp_size: float(count * dp_size * 2))


def stale_weights_at_save():
    from megatron_embed.checkpoint.save import Saver

    kept = []

    def make(original):
        def save(self, step, **options):
            parameters = [parameter for model in self._state.models for parameter in model.parameters()]
            now = [parameter.detach().clone() for parameter in parameters]
            stale, kept[:] = kept[:] or now, now
            with torch.no_grad():
                for parameter, value in zip(parameters, stale, strict=True):
                    parameter.copy_(value)
                original(self, step, **options)
                for parameter, value in zip(parameters, now, strict=True):
                    parameter.copy_(value)
        return save

    return replaced(Saver, "save", make)


def rows_changed(change):
    from megatron_embed.data.loader import StepLoader

    def make(original):
        def build(self, records, rows, step):
            return original(self, records, change(self, rows, step) if step == WRONG - 1 else rows, step)
        return build

    return replaced(StepLoader, "build", make)


def dropped_row():
    return rows_changed(lambda loader, rows, step: [*rows[:2], *rows[3:]])


def duplicated_row():
    return rows_changed(lambda loader, rows, step: [*rows[:-1], rows[0]] if loader._share.start == 0 else rows)


def wrong_order_after_resume():
    from megatron_embed.data.sampler import GlobalBatchSampler

    return replaced(GlobalBatchSampler, "rows_of_step", lambda original: lambda self, step: original(
        self, step - 1 if step >= WRONG else step))


def wrong_temperature():
    from megatron_embed.objectives.contrastive import Contrastive

    return replaced(Contrastive, "step_settings", lambda original: lambda self: dataclasses.replace(
        original(self), temperature=0.17))


def doubled_loss():
    from megatron_embed.losses import info_nce

    def make(original):
        def softmax_loss(logits, positive_column, spans):
            loss, gradient = original(logits, positive_column, spans)
            return 2 * loss, gradient.mul_(2)
        return softmax_loss

    return replaced(info_nce, "_softmax_loss", make)


def gradients_not_summed():
    """The last rank's rows give no gradient."""
    import torch.distributed as dist

    from megatron_embed.training import grad_cache

    return replaced(grad_cache, "surrogate_factor", lambda original: lambda *sizes: original(*sizes) * (
        1.0 if dist.get_rank() == 0 else 0.0))


def wrong_prompt():
    from megatron_embed.data.tokenizer import RoleTokenizer

    def make(original):
        def tokenize(self, texts, role, instructions=None, prompts=None):
            return original(self, texts, role, instructions,
                            ["passage: "] * len(texts) if role == "query" else prompts)
        return tokenize

    return replaced(RoleTokenizer, "tokenize", make)


def dropout_left_on():
    from megatron_embed.training import loop

    def make(original):
        def step(batch, trainer):
            for model in trainer.grad_cache.models:
                for module in model.modules():
                    for name in ("hidden_dropout", "dropout"):
                        if isinstance(vars(module).get(name), float):
                            setattr(module, name, 0.1)
                    if isinstance(module, torch.nn.Dropout):
                        module.p = 0.1
            return original(batch, trainer)
        return step

    return replaced(loop, "train_step", make)


def drifted_rank():
    import torch.distributed as dist

    from megatron_embed.training import loop

    calls = []

    def make(original):
        def step(batch, trainer):
            result = original(batch, trainer)
            calls.append(1)
            if len(calls) == WRONG and dist.get_rank() == dist.get_world_size() - 1:
                with torch.no_grad():
                    for parameter in trainer.grad_cache.models[0].parameters():
                        parameter.add_(1e-3)
            return result
        return step

    return replaced(loop, "train_step", make)


def masks_off():
    from megatron_embed.objectives import contrastive

    return replaced(contrastive._Columns, "candidates", lambda original: lambda self, *rest: dataclasses.replace(
        original(self, *rest), excluded=None))


def scaled_learning_rate():
    from megatron_embed.platform.compat import OptimizerParamScheduler

    return replaced(OptimizerParamScheduler, "get_lr", lambda original: lambda self, group: 2 * original(self, group))


def clipping_off():
    from megatron_embed.training import step

    def make(original):
        def update(optimizer, squares, loss):
            optimizer.config.clip_grad = float("inf")
            return original(optimizer, squares, loss)
        return update

    return replaced(step, "update", make)


def weight_decay_off():
    from megatron_embed.training.optimizer import AdamW

    def make(original):
        def update(self, parameters, group):
            return original(self, parameters, {**group, "weight_decay": 0.0})
        return update

    return replaced(AdamW, "_update", make)


def moments_lost():
    from megatron_embed.training import loop

    calls = []

    def make(original):
        def step(batch, trainer):
            calls.append(1)
            if len(calls) == WRONG:
                for part in trainer.optimizer.chained_optimizers:
                    for values in part.optimizer.state.values():
                        for value in values.values():
                            value.zero_()
            return original(batch, trainer)
        return step

    return replaced(loop, "train_step", make)


def missing_micro_batch():
    from megatron_embed.training.grad_cache import GradCache

    def make(original):
        def two_pass(self, batch, batches):
            inner = self.objective

            class Without(type(inner)):
                def __call__(self, embeddings, batch, *, total):
                    result = super().__call__(embeddings, batch, total=total)
                    result.embeddings[batches[1].valid_rows] = 0.0
                    return result

            before, inner.__class__ = inner.__class__, Without
            try:
                return original(self, batch, batches)
            finally:
                inner.__class__ = before
        return two_pass

    return replaced(GradCache, "two_pass", make)


def not_normalized():
    from megatron_embed.models.encoder import EmbeddingModel

    def make(original):
        def forward(self, batch):
            self.normalize = False
            return original(self, batch)
        return forward

    return replaced(EmbeddingModel, "forward", make)


def wrong_pooling():
    from megatron_embed.training import grad_cache

    return replaced(grad_cache, "to_device", lambda original: lambda micro, topology, pooling, **options: original(
        micro, topology, "lasttoken", **options))


def no_hard_negatives():
    from megatron_embed.data import loader

    return replaced(loader, "build_embed_batch", lambda original: lambda records, tokenizer, packing, documents, **rest:
                    original(records, tokenizer, packing, dataclasses.replace(documents, negatives=0), **rest))


def shorter_texts():
    from megatron_embed.data.tokenizer import RoleTokenizer

    def make(original):
        def tokenize(self, texts, role, *rest, **options):
            self._max_lengths["document"] = 40
            return original(self, texts, role, *rest, **options)
        return tokenize

    return replaced(RoleTokenizer, "tokenize", make)


def rank_takes_others_rows():
    return rows_changed(lambda loader, rows, step: loader._sampler.rows_of_step(step)[: len(rows)])


def stale_optimizer_at_save():
    from megatron_embed.checkpoint.save import Saver

    def make(original):
        def save(self, step, **options):
            moments = [value for part in self._state.optimizer.chained_optimizers
                       for values in part.optimizer.state.values() for value in values.values()]
            now = [value.clone() for value in moments]
            for value in moments:
                value.mul_(0.5)
            original(self, step, **options)
            for value, kept in zip(moments, now, strict=True):
                value.copy_(kept)
        return save

    return replaced(Saver, "save", make)


def weights_not_restored():
    from megatron_embed.run import assemble

    def make(original):
        def resume(progress, state):
            step = original(progress, state)
            with torch.no_grad():
                for model in state.models:
                    for parameter in model.parameters():
                        parameter.mul_(1.001)
            return step
        return resume

    return replaced(assemble, "resume", make)


def frozen_matrix():
    from megatron_embed.training import loop

    def make(original):
        def step(batch, trainer):
            weight = trainer.grad_cache.models[0].decoder.layers[1].mlp.linear_fc2.weight
            before = weight.detach().clone()
            result = original(batch, trainer)
            with torch.no_grad():
                weight.copy_(before)
            return result
        return step

    return replaced(loop, "train_step", make)


def attention_across_texts():
    from megatron_embed.training import grad_cache

    def make(original):
        def to_device(micro, topology, pooling, **options):
            one = dataclasses.replace(micro, cu_seqlens=micro.cu_seqlens[[0, -1]], rows=micro.rows[:1])
            merged = original(one, topology, pooling, **options)
            return dataclasses.replace(original(micro, topology, pooling, **options), packed=merged.packed)
        return to_device

    return replaced(grad_cache, "to_device", make)


def wrong_seed():
    from megatron_embed.run import preflight

    return replaced(preflight, "build_sampler", lambda original: lambda records, data, **options: original(
        records, data, **{**options, "seed": 42}))


def repeated_record():
    from megatron_embed.data import loader

    return replaced(loader, "build_embed_batch", lambda original: lambda records, *rest, **options: original(
        [records[1], *records[1:]], *rest, **options))


def other_settings(**settings):
    """The loss has other settings than the configuration."""
    from megatron_embed.objectives.contrastive import Contrastive

    return replaced(Contrastive, "step_settings", lambda original: lambda self: dataclasses.replace(
        original(self), **settings))


def other_weight_of_a_dimension():
    from megatron_embed.objectives.contrastive import Contrastive

    def make(original):
        def init(self, *arguments, **options):
            original(self, *arguments, **options)
            self.dims = tuple(dataclasses.replace(dim, weight=1.0 + index) for index, dim in enumerate(self.dims))
        return init

    return replaced(Contrastive, "__init__", make)


def with_loss(before=None, after=None):
    """What a contrastive loss is given, or what it returns, is changed."""
    from megatron_embed.objectives.contrastive import Contrastive

    def make(original):
        def loss(self, embeddings, batch, *, total):
            result = original(self, embeddings if before is None else before(embeddings), batch, total=total)
            if after is not None:
                after(result.embeddings, batch)
            return result
        return loss

    return replaced(Contrastive, "__call__", make)


def queries_twice(gradient, batch):
    gradient[: batch.num_queries] *= 2


def scaled_adapters():
    from megatron_embed.models.lora import Lora

    def make(original):
        def init(self, *arguments, **options):
            original(self, *arguments, **options)
            self.scale *= 2
        return init

    return replaced(Lora, "__init__", make)


def shorter_texts_of_both():
    from megatron_embed.data.tokenizer import RoleTokenizer

    def make(original):
        def tokenize(self, texts, role, *rest, **options):
            self._max_lengths = {"query": 12, "document": 40}
            return original(self, texts, role, *rest, **options)
        return tokenize

    return replaced(RoleTokenizer, "tokenize", make)


def repeated_micro_batch():
    from megatron_embed.data.loader import StepLoader

    def make(original):
        def build(self, *arguments):
            batch = original(self, *arguments)
            first, second, *rest = batch.micro_batches
            return dataclasses.replace(batch, micro_batches=(
                first, dataclasses.replace(first, rows=second.rows), *rest))
        return build

    return replaced(StepLoader, "build", make)


def with_kernel(change):
    """Another update by AdamW: change(original) -> (self, parameters, group)."""
    from megatron_embed.training.optimizer import AdamW

    return replaced(AdamW, "_update", change)


def l2_regularization():
    def change(original):
        def update(self, parameters, group):
            for parameter in parameters:
                parameter.grad.add_(parameter, alpha=group["weight_decay"])
            original(self, parameters, {**group, "weight_decay": 0.0})
        return update

    return with_kernel(change)


def stronger_weight_decay():
    return with_kernel(lambda original: lambda self, parameters, group: original(
        self, parameters, {**group, "weight_decay": group["weight_decay"] * 1.7}))


def second_moments_lost():
    from megatron_embed.run import assemble

    def make(original):
        def resume(progress, state):
            step = original(progress, state)
            for part in state.optimizer.chained_optimizers:
                for values in part.optimizer.state.values():
                    values["exp_avg_sq"].zero_()
            return step
        return resume

    return replaced(assemble, "resume", make)


def two_updates():
    from megatron_embed.training.optimizer import AdamW

    def make(original):
        def step(self):
            original(self)
            original(self)
        return step

    return replaced(AdamW, "step", make)


def edited_metrics(run):
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**line, "loss": line["loss"] * 1.01} if line["step"] == WRONG else line) + "\n"
                            for line in lines))


def flipped_bit(run):
    file = next(iter(sorted((run / f"step_{2:06d}" / "model").glob("*.distcp"))))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(bytes(data))


def edited_configuration(run):
    for file in [*run.glob("step_*/config.yaml"), run / ".assets" / "config.yaml"]:
        text = file.read_text()
        file.unlink()
        file.write_text(text.replace("temperature: 0.3", "temperature: 0.2"))


def changed_data(run):
    file = run.parent / f"{run.name}.jsonl"
    lines = file.read_text().splitlines()
    row = json.loads(lines[3])
    lines[3] = json.dumps({**row, "query": row["query"] + " please"})
    file.write_text("\n".join(lines) + "\n")


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault, and what an audit must say of it."""

    part: str
    name: str
    ranks: int = 2
    inject: Callable | None = None
    """Context in the ranks of the run."""
    alter: Callable | None = None
    """Changes files of the run when it has ended."""
    settings: dict = dataclasses.field(default_factory=dict)
    """Further settings by section."""
    step: int = WRONG
    """The step that is audited."""
    resumed: bool = False
    """The run has the fault only since it was resumed after step 4."""


FAULTS = {
    "shifted labels": Fault("masks", "shifted labels", inject=shifted_labels),
    "detached remote negatives": Fault("gradient", "detached remote negatives", inject=detached_remote_negatives),
    "loss scale": Fault("gradient", "loss scale", inject=loss_scale),
    "stale weights at save": Fault("weights", "stale weights in the checkpoint", inject=stale_weights_at_save,
                                    step=6),
    "dropped row": Fault("rows", "dropped row", ranks=1, inject=dropped_row),
    "duplicated row": Fault("rows", "duplicated row", inject=duplicated_row),
    "flipped bit in a shard": Fault("weights", "damaged checkpoint file", alter=flipped_bit),
    "wrong temperature": Fault("loss", "wrong temperature", inject=wrong_temperature),
    "loss doubled": Fault("loss", "loss scale", inject=doubled_loss),
    "gradient of a rank lost": Fault("gradient", "gradient of a rank missing", inject=gradients_not_summed),
    "wrong prompt": Fault("texts", "wrong prompt", inject=wrong_prompt),
    "dropout left on": Fault("vectors", "dropout left on", inject=dropout_left_on),
    "one rank's parameters drift": Fault("copies", "drifted parameters", inject=drifted_rank),
    "masks off": Fault("masks", "masks off", inject=masks_off, settings={"data": {"shuffle": False}}),
    "wrong order after resume": Fault("rows", "wrong order of rows", inject=wrong_order_after_resume, step=6,
                                      resumed=True),
    "learning rate": Fault("learning rate", "wrong learning rate", inject=scaled_learning_rate),
    "clipping off": Fault("update", "clipping off", inject=clipping_off),
    "weight decay off": Fault("update", "weight decay off", inject=weight_decay_off),
    "moments lost": Fault("update", "optimizer state lost", inject=moments_lost),
    "micro-batch missing": Fault("gradient", "micro-batch missing", inject=missing_micro_batch),
    "vectors not normalized": Fault("vectors", "normalization missing", inject=not_normalized),
    "wrong pooling": Fault("vectors", "wrong pooling", inject=wrong_pooling),
    "hard negatives missing": Fault("texts", "number of hard negatives", inject=no_hard_negatives),
    "shorter texts": Fault("texts", "wrong maximum length", inject=shorter_texts),
    "rank with another rank's rows": Fault("rows", "rank with another rank's rows", inject=rank_takes_others_rows),
    "stale optimizer state at save": Fault("optimizer state", "stale optimizer state in the checkpoint",
                                           inject=stale_optimizer_at_save),
    "weights not restored": Fault("weights", "weights not restored at the resume", inject=weights_not_restored,
                                  step=6, resumed=True),
    "frozen matrix": Fault("vectors", "parameters not updated", ranks=1, inject=frozen_matrix),
    "attention across texts": Fault("vectors", "attention across texts", inject=attention_across_texts),
    "wrong seed": Fault("rows", "wrong seed", inject=wrong_seed),
    "repeated record": Fault("texts", "duplicated row", ranks=1, inject=repeated_record),
    "mask margin": Fault("masks", "wrong mask margin", settings={"objective": {"mask_margin": 0.05}},
                         inject=lambda: other_settings(mask_margin=-0.01)),
    "hardness": Fault("loss", "wrong hardness strength", inject=lambda: other_settings(hardness_strength=9.0),
                      settings={"objective": {"hardness": "hard_negatives", "hardness_strength": 5.0}}),
    "weight of a dimension": Fault("loss", "wrong weight of a term", inject=other_weight_of_a_dimension,
                                   settings={"embedding": {"matryoshka_dims": [32, 16]}}),
    "gradient of queries twice": Fault("gradient", "gradient of queries scaled",
                                       inject=lambda: with_loss(after=queries_twice)),
    "rounded vectors": Fault("vectors", "rounded vectors",
                             inject=lambda: with_loss(before=lambda rows: rows.bfloat16().float())),
    "scale of adapters": Fault("vectors", "wrong scale of the adapters", inject=scaled_adapters,
                               settings={"lora": {"rank": 4, "target_modules": ["all-linear"]}}),
    "shorter texts of both roles": Fault("texts", "wrong maximum length", inject=shorter_texts_of_both),
    "micro-batch twice": Fault("texts", "duplicated micro-batch", inject=repeated_micro_batch),
    "L2 regularization": Fault("vectors", "weight decay in the gradient", inject=l2_regularization),
    "stronger weight decay": Fault("update", "wrong weight decay", inject=stronger_weight_decay),
    "second moments lost": Fault("update", "optimizer state lost", inject=second_moments_lost, step=6, resumed=True),
    "two updates": Fault("update", "update made twice", inject=two_updates),
    "edited metrics": Fault("log", "changed log", alter=edited_metrics),
    "edited configuration": Fault("settings", "changed configuration", alter=edited_configuration),
    "changed data": Fault("rows", "changed data", alter=changed_data)}


def train_with(name, values):
    """A run with a fault. Called by all ranks."""
    inject = FAULTS[name].inject if name else None
    with contextlib.nullcontext() if inject is None else inject():
        return train(values)


def copy_of_rows(source: Path, target: Path, rows: int) -> str:
    """The first rows of a file, some with the positive of another row, so that duplicates are masked."""
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()[:rows]]
    for index in range(0, rows - 1, 2):
        lines[index + 1]["positive"] = [*lines[index + 1]["positive"][:1], *lines[index]["positive"][:1]]
    target.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(target)
