"""Checks of `model.quantization`, and what a checkpoint of adapters says of its quantized base model. No Megatron."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_embed.config.json_file import read_json_object
from megatron_embed.config.schema import ParallelConfig, RunConfig
from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.models.families import ModelShape
from megatron_embed.names import Quantization

BLOCK = 64
"""Weights of a row that share a scale in nf4."""


@dataclass(frozen=True, kw_only=True)
class StoredQuantization:
    """How the weights of a Hugging Face directory are quantized in its files."""

    quantization: Quantization
    double_quantization: bool
    """True with int8, as the setting's default."""


@dataclass(frozen=True, kw_only=True)
class QuantizedBase:
    """The base model of adapters that were trained over quantized weights."""

    quantization: Quantization
    double_quantization: bool
    path: str
    """Directory of its weights on the machine of the run."""
    name: str
    """Hub name, or the directory again."""
    fingerprint: str
    """See convert/fingerprint.py."""


def stored_quantization(directory: Path) -> StoredQuantization | None:
    """The quantization of a Hugging Face directory's weights; None: they are not quantized.

    Raises:
        CheckpointError: by another method than bitsandbytes' nf4 and int8.
    """
    file = directory / "config.json"
    found = read_json_object(file).get("quantization_config") if file.is_file() else None
    if not isinstance(found, dict):
        return None
    name = str(found.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in found else "an unknown method"))[:40]
    if name != "bitsandbytes":
        raise CheckpointError(
            f"{file}: quantization_config: the weights are quantized already (quant_method: {name}); adapters are "
            "trained over weights that bitsandbytes quantizes: take the original weights, and set model.quantization: "
            "nf4 if memory is short")
    code = found.get("bnb_4bit_quant_type", "fp4")
    if not found.get("load_in_8bit") and code != "nf4":
        raise CheckpointError(f"{file}: quantization_config: bnb_4bit_quant_type = {str(code)[:40]!r}: of 4-bit "
                              "weights only nf4 is read; take the original weights, and set model.quantization: nf4")
    if found.get("load_in_8bit"):
        return StoredQuantization(quantization="int8", double_quantization=True)
    return StoredQuantization(quantization="nf4", double_quantization=bool(found.get("bnb_4bit_use_double_quant")))


def check_quantization(config: RunConfig, shape: ModelShape, *, has_adapters: bool) -> None:
    """Raises ConfigError, before the first collective, if the weights cannot be quantized as asked. No communication.

    Args:
        has_adapters: whether the run trains adapters, new ones or the model's.
    """
    kind = config.model.quantization
    if kind == "none":
        return
    key = "model.quantization"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"{key} = {kind!r} needs the package bitsandbytes: pip install "
                          "'megatron_embed[quantization]', or set it to none", key=key)
    if not has_adapters:
        raise ConfigError(f"{key} = {kind!r}: quantized weights are frozen, so there is nothing to train without "
                          "adapters; set lora.rank (16 is usual), or this to none", key=key)
    check_block_widths(config, shape)


def check_block_widths(config: RunConfig, shape: ModelShape) -> None:
    """Raises ConfigError unless a rank's share of a weight's row is a multiple of nf4's block."""
    if config.model.quantization == "nf4":
        for what, total, size, setting in _split_widths(shape, config.parallel):
            _check_width(what, total, size, setting)


def _split_widths(shape: ModelShape, sizes: ParallelConfig) -> Iterator[tuple[str, int, int, str]]:
    """(what, columns of a weight, ranks that split them, the setting of those) of every kind of linear."""
    tensor = "parallel.tensor_model_parallel_size"
    tp, etp = sizes.tensor_model_parallel_size, sizes.expert_tensor_parallel_size
    yield "hidden size", shape.hidden_size, 1, tensor
    yield "attention width", shape.num_attention_heads * shape.head_dim, tp, tensor
    if shape.num_experts:
        yield "width of an expert", shape.ffn_hidden_size, etp, "parallel.expert_tensor_parallel_size"
    else:
        yield "MLP width", shape.ffn_hidden_size, tp, tensor


def _check_width(what: str, total: int, size: int, setting: str) -> None:
    """Raises ConfigError unless a rank's share of the columns is a multiple of the block."""
    if total % BLOCK:
        raise ConfigError(f"model.quantization = 'nf4': the model's {what} {total} is not a multiple of {BLOCK}, the "
                          "weights of a row that share a scale; use int8", key="model.quantization")
    if total % (size * BLOCK):
        fitting = [divisor for divisor in range(1, size) if total % (divisor * BLOCK) == 0]
        raise ConfigError(f"{setting} = {size}: with model.quantization = 'nf4' a rank's share of the {what} {total} "
                          f"must be a multiple of {BLOCK}, the weights of a row that share a scale; largest valid: "
                          f"{max(fitting)}, or use int8", key=setting)
