"""A model whose released code is not run, as an equal one of Transformers: what an export is compared with.

InternLM2 and InternLM3 compute what a Llama computes (Qwen2, if query, key and value alone have biases).
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_embed.config.json_file import read_json_object, read_optional_json_object
from megatron_embed.convert.checkpoint_directory import copy_files, write_json
from megatron_embed.convert.head_tensors import architecture, lm_head_name
from megatron_embed.convert.hf_directory import HFDirectory
from megatron_embed.convert.storage.safetensors_file import SafetensorsWriter
from megatron_embed.convert.tables.lookup import rules_for
from megatron_embed.convert.tables.transforms import Context, Transform
from megatron_embed.models.families import ModelShape, model_shape

OWN_CODE = ("internlm2", "internlm3")
"""Families that Transformers has no class for."""


def has_own_code(directory: Path) -> bool:
    """Whether Transformers has no class for the model of a directory."""
    return (directory / "config.json").is_file() and model_shape(directory).family in OWN_CODE


def stock_library(directory: Path, library: str) -> str:
    """The library's name for messages."""
    return f"{library}, as an equal Llama," if has_own_code(directory) else library


@contextmanager
def stock_directory(directory: Path) -> Iterator[Path]:
    """The directory itself, or an equal one that Transformers has a class for, beside it for as long as the block
    takes."""
    if not has_own_code(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix=".equal-", dir=directory.absolute().parent) as folder:
        target = Path(folder) / "model"
        write_equal_llama(directory, target)
        yield target


def write_equal_llama(source: Path, target: Path) -> None:
    """Write a Llama (or Qwen2) directory of the tensors of an InternLM directory. All of them are held in memory."""
    target.mkdir()
    copy_files(source, target)
    with HFDirectory(source) as files:
        shape = files.shape
        kind = "qwen2" if shape.add_qkv_bias and not shape.add_bias_linear else "llama"
        rules = {rule.ours: rule for rule in rules_for(kind).rules}
        tensors: dict[str, Tensor] = {}
        for rule, context in files.family.applied_rules(shape):
            tensors |= _hf_tensors(rules[rule.ours], context, rule.to_ours(files.read_slice, context))
        heads = {lm_head_name(shape.family): "lm_head.weight", "score.weight": "score.weight"}
        tensors |= {heads[name]: files.read(name) for name in files.passthrough if name in heads}
        if not files.prefixed:
            tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    with SafetensorsWriter(target / "model.safetensors", [
            (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    write_json(target / "config.json", _config(read_json_object(source / "config.json"), kind, shape))
    tokenizer = read_optional_json_object(target / "tokenizer_config.json")
    if "auto_map" in tokenizer:
        tokenizer = {key: value for key, value in tokenizer.items() if key != "auto_map"}
        write_json(target / "tokenizer_config.json", tokenizer | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _hf_tensors(rule: Transform, context: Context, ours: Tensor) -> dict[str, Tensor]:
    """The Hugging Face tensors of a rule, by their names, from our whole parameter."""
    ranges = sorted(rule.row_ranges(context), key=lambda rows: rows.hf_start)
    return {name: torch.cat([ours[rows.our_start:rows.our_start + rows.rows] for rows in ranges if rows.part == part])
            for part, name in enumerate(rule.hf_names(context))}


def _config(values: dict[str, Any], kind: str, shape: ModelShape) -> dict[str, Any]:
    """Contents of config.json of the equal model."""
    values = {key: value for key, value in values.items() if key not in ("auto_map", "bias", "qkv_bias")}
    names = [str(name).replace(architecture(shape.family, "ForCausalLM").removesuffix("ForCausalLM"),
                               "Qwen2" if kind == "qwen2" else "Llama") for name in values.get("architectures") or []]
    values |= {"model_type": kind, "architectures": names, "num_key_value_heads": shape.num_query_groups}
    if kind == "llama":
        values |= {"attention_bias": shape.add_bias_linear, "mlp_bias": shape.add_bias_linear}
    return values
