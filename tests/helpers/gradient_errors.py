"""Gradients of many ranks against a reference, which is a model directory whose "weights" are gradients.

Every rank reads the share that it must hold with the tables that its weights came with, so the comparison needs no code
for a layout. The error is the largest, over all parameters, of |g - g*| / max(|g*|, 1e-6 |G*|) in L2 norms, G* all
gradients together.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SquaredErrors = dict[tuple[str, int], tuple[float, float]]
"""(parameter, index of its shard) -> squared norms of (difference to the reference, reference)."""


def save_gradients(model: Any, path: Path, *, unused: Sequence[str] = ()) -> float:
    """Save the gradients of a Transformers model as its weights. Returns their L2 norm.

    `unused`: parts of names of parameters that may have no gradient; any other must have one that is not 0.
    """
    with torch.no_grad():
        gradients = {name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                     for name, parameter in model.named_parameters()}
        zero = [name for name, gradient in gradients.items()
                if not gradient.any() and not any(part in name for part in unused)]
        assert not zero, f"gradients that are 0 prove nothing: {zero}"
        for name, parameter in model.named_parameters():
            parameter.copy_(gradients[name])
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
    model.float().save_pretrained(path)
    return norm


def gather_shards(wrapped: Sequence[Any]) -> None:
    """All-gather the summed gradients, of which the distributed optimizer leaves each rank a shard."""
    for chunk in wrapped:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            data_parallel = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                shard = bucket.grad_data.chunk(data_parallel.size())[data_parallel.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=data_parallel)


def squared_error(parameter: Any, expected: torch.Tensor) -> tuple[float, float]:
    """Squared norms of (difference of the gradient to the reference, reference)."""
    assert parameter.shape == expected.shape
    difference = parameter.main_grad.cpu().double() - expected.double()
    return float(difference.square().sum()), float(expected.double().square().sum())


def squared_errors(chunks: Sequence[Any], topology: Any, reference: Path) -> SquaredErrors:
    """Errors of this rank's parameters but those of a reranker's head. Rows that pad the vocabulary must be 0."""
    from megatron_embed.convert.hf_directory import HFDirectory, hf_weight_shards
    from megatron_embed.models.vocabulary_shape import padded_vocabulary

    errors: SquaredErrors = {}
    etp = topology.groups.expt_tp
    with HFDirectory(reference) as source:
        padded = padded_vocabulary(source.shape.vocab_size, topology.tp_size)
        for chunk in chunks:
            parameters = {name: parameter for name, parameter in chunk.global_parameters().items()
                          if not name.startswith(("head.", "dense."))}
            whole = dict(hf_weight_shards(source, names=parameters, tp_rank=0, tp_size=1,
                                          padded_vocab_size=padded))
            for name, shard in hf_weight_shards(
                    source, names=parameters, tp_rank=topology.tp_rank, tp_size=topology.tp_size,
                    padded_vocab_size=padded, etp_rank=etp.rank(), etp_size=etp.size()):
                split = shard.numel() < whole[name].numel()
                index = (etp.rank() if "local_experts" in name else topology.tp_rank) if split else 0
                errors[name, index] = squared_error(parameters[name], shard)
            assert {name for name, _ in errors} >= parameters.keys()
            errors |= _squared_errors_of_dense(chunk, topology, reference)
            errors |= _squared_errors_of_vocabulary(chunk, topology, source)
    return errors


def _squared_errors_of_vocabulary(chunk: Any, topology: Any, source: Any) -> SquaredErrors:
    """Errors of a sparse model's head; its gradients have the names of a masked or causal language model."""
    from megatron_embed.convert.vocabulary_tensors import vocabulary_names
    from megatron_embed.models.vocabulary_head import VocabularyHead

    errors: SquaredErrors = {}
    if not isinstance(chunk.head, VocabularyHead):
        return errors
    names, rows = vocabulary_names(chunk.shape), chunk.head.rows
    for name, parameter in chunk.head.named_parameters():
        expected = source.read(names[name])
        divided = name in ("weight", "bias")
        if divided:
            padded = expected.new_zeros(rows * topology.tp_size, *expected.shape[1:])
            padded[: len(expected)] = expected
            expected = padded[topology.tp_rank * rows :][:rows]
        errors[f"head.{name}", topology.tp_rank if divided else 0] = squared_error(parameter, expected)
    return errors


def _squared_errors_of_dense(chunk: Any, topology: Any, reference: Path) -> SquaredErrors:
    """Errors of this rank's Dense modules, whose gradients lie in the folders of their weights."""
    from megatron_embed.convert.dense_tensors import read_dense
    from megatron_embed.models.joint_files import read_joint_heads

    errors: SquaredErrors = {}
    for index, layer in enumerate([] if chunk.dense is None else chunk.dense.layers()):
        joint = read_joint_heads(reference)
        expected = read_dense(reference, layer.settings) if joint is None else joint
        for name, parameter in layer.named_parameters():
            split = parameter.numel() < expected[name].numel()
            assert split == (layer.settings.out_features >= 1024 and topology.tp_size > 1)
            errors[f"dense.{index}.{name}", topology.tp_rank if split else 0] = squared_error(
                parameter, layer.own_rows(expected[name]))
    return errors


def squared_errors_of_adapters(chunks: Sequence[Any], topology: Any, reference: Path) -> SquaredErrors:
    """Errors of this rank's LoRA adapters, against a PEFT directory of gradients; no other parameter but a reranker's
    head may have a gradient."""
    from megatron_embed.convert.peft import PeftAdapter
    from megatron_embed.convert.tables.lookup import rules_for

    errors: SquaredErrors = {}
    etp = topology.groups.expt_tp
    for chunk in chunks:
        parameters = chunk.global_parameters()
        adapters = [name for name, parameter in parameters.items()
                    if parameter.requires_grad and not name.startswith(("head.", "dense."))]
        assert all(".lora." in name for name in adapters)
        assert all(parameter.grad is None and not hasattr(parameter, "main_grad")
                   for parameter in parameters.values() if not parameter.requires_grad)
        with PeftAdapter(reference, rules_for(chunk.shape.family), chunk.shape) as source:
            whole = dict(source.shards(adapters, tp_rank=0, tp_size=1, etp_rank=0, etp_size=1))
            for name, shard in source.shards(adapters, tp_rank=topology.tp_rank, tp_size=topology.tp_size,
                                             etp_rank=etp.rank(), etp_size=etp.size()):
                split = shard.numel() < whole[name].numel()
                index = (etp.rank() if "experts" in name else topology.tp_rank) if split else 0
                errors[name, index] = squared_error(parameters[name], shard)
        errors |= _squared_errors_of_dense(chunk, topology, reference)
    return errors


def largest_error(per_rank: Sequence[Mapping[tuple[str, int], tuple[float, float]]], norm: float | None = None, *,
                  zero_gradients: bool = False) -> tuple[float, str]:
    """(largest relative error, its parameter), from the shards of all ranks; of several copies the worst counts.

    Args:
        norm: of all reference gradients; the ranks' shards must make up the whole model.
        zero_gradients: a gradient below 1e-12 of the whole is compared with the whole. A bias that shifts every score
            alike has no gradient under a loss of differences: 1e-17 of the whole in float64. The rounding of a sum in
            float32 is 2e-9 of it, and not an error of a layout.
    """
    shards: SquaredErrors = {}
    for errors in per_rank:
        for key, (difference, reference) in errors.items():
            pair = (difference if math.isfinite(difference) else math.inf, reference)
            shards[key] = max(shards.get(key, (0.0, 0.0)), pair)
    totals: dict[str, tuple[float, float]] = {}
    for (name, _), (difference, reference) in shards.items():
        total = totals.get(name, (0.0, 0.0))
        totals[name] = (total[0] + difference, total[1] + reference)
    whole = math.sqrt(sum(reference for _, reference in totals.values()))
    assert norm is None or math.isclose(whole, norm, rel_tol=1e-5), (
        f"the ranks' shards do not make up the whole model: {whole}, {norm}")
    nonzero = sum(reference > 0 for _, reference in totals.values())
    assert nonzero >= max(1, 0.9 * len(totals)), "gradients that are 0 prove nothing"

    def scale(gradient: float) -> float:
        return whole if zero_gradients and gradient < 1e-12 * whole else max(gradient, 1e-6 * whole)

    return max((math.sqrt(difference) / scale(math.sqrt(reference)), name)
               for name, (difference, reference) in totals.items())
