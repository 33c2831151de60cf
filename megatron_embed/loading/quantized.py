"""Models with quantized weights: which settings load one, and the weights themselves."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_embed.config.schema import RunConfig
from megatron_embed.convert.hf_directory import HFDirectory
from megatron_embed.convert.quantized_base import reference_to
from megatron_embed.convert.quantized_shards import fill_quantized_weights, quantized_tensor
from megatron_embed.errors import ConfigError
from megatron_embed.models.encoder import EmbeddingModel
from megatron_embed.models.quantization import QuantizedBase, check_quantization
from megatron_embed.models.quantized_linear import quantized_weights
from megatron_embed.parallel.topology import Topology

if TYPE_CHECKING:
    from megatron_embed.loading.model_directory import ModelDirectory


def quantized_as(config: RunConfig, model: "ModelDirectory") -> RunConfig:
    """The configuration with the quantization that the model's adapters were trained over, or that its files have.

    Raises:
        ConfigError: it cannot be had here, or in this layout. No communication.
    """
    base = model.quantized or model.stored
    if base is None:
        return config
    config = dataclasses.replace(config, model=dataclasses.replace(
        config.model, quantization=base.quantization, double_quantization=base.double_quantization))
    check_quantization(config, model.shape, has_adapters=True)
    return config


def check_quantized_model(config: RunConfig, model: "ModelDirectory", *, has_adapters: bool) -> None:
    """Raises ConfigError if a run cannot train this model as `model.quantization` says. No communication."""
    asked, base, key = config.model, model.quantized, "model.quantization"
    if base is not None and (asked.quantization, asked.double_quantization) != (
            base.quantization, base.double_quantization):
        raise ConfigError(f"{key} = {asked.quantization!r}: the adapters of {asked.path} were trained over weights "
                          f"with quantization: {base.quantization} and double_quantization: "
                          f"{str(base.double_quantization).lower()}; set the same, or begin from the merged model "
                          "(convert megatron-to-hf --merge-lora)", key=key)
    if base is None and asked.quantization != "none" and model.checkpoint is not None:
        raise ConfigError(f"{key} = {asked.quantization!r}: {asked.path} is a checkpoint of megatron-embed, but "
                          "Hugging Face tensors are quantized; convert it (convert megatron-to-hf) and name "
                          "the result, or set this to none", key=key)
    _check_stored(config, model)
    check_quantization(config, model.shape, has_adapters=has_adapters)


def _check_stored(config: RunConfig, model: "ModelDirectory") -> None:
    """Raises ConfigError unless a directory whose weights are quantized already is trained as they are."""
    asked, stored, key = config.model, model.stored, "model.quantization"
    if stored is not None and (asked.quantization, asked.double_quantization) != (
            stored.quantization, stored.double_quantization):
        double = str(stored.double_quantization).lower()
        raise ConfigError(f"{key} = {asked.quantization!r}: the weights of {asked.path} are quantized already; set "
                          f"{key}: {stored.quantization} and model.double_quantization: {double} to train adapters "
                          "over them, or take the original weights", key=key)


def base_of_run(config: RunConfig, model: "ModelDirectory") -> QuantizedBase | None:
    """The reference that a run's checkpoints hold to its base model; None if they hold all weights. No
    communication."""
    if config.model.quantization == "none":
        return None
    return model.quantized or reference_to(model.hf, model.name, config.model.quantization,
                                           double=config.model.double_quantization)


def load_quantized_weights(directory: Path, config: RunConfig, chunks: Sequence[EmbeddingModel],
                           topology: Topology) -> None:
    """Fill the quantized weights of this rank from a Hugging Face directory, of which one tensor is in memory at a
    time. No communication."""
    kind, double = config.model.quantization, config.model.double_quantization
    etp = topology.groups.expt_tp
    with HFDirectory(directory) as source:
        for chunk in chunks:
            weights = ((chunk.global_name(name), weight) for name, weight in quantized_weights(chunk))
            fill_quantized_weights(
                source, weights,
                lambda name: quantized_tensor(source, name, kind, double=double, device=topology.device),
                tensor=(topology.tp_rank, topology.tp_size), expert_tensor=(etp.rank(), etp.size()))
