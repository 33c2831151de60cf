"""Sparse models and rerankers whose heads lie in the files as other programs write them, whole or damaged."""

import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_embed.errors import UserError
from tests.helpers.sparse_reference import VOCABULARY, small_tokenizer
from tests.helpers.toys import QWEN3

TEXTS = ["The quick brown fox", "jumps over; or: it does not!", "the lazy dog, and over a longer text that follows"]
_SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
          "max_position_embeddings": 64, "vocab_size": VOCABULARY, "pad_token_id": 0}
_SHAPES = {"ModernBert": {**_SHAPE, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3},
           "Qwen3": {**QWEN3, "vocab_size": VOCABULARY}}
_CAUSAL = {"transformer_task": "text-generation", "module_output_name": "token_embeddings",
           "processing_kwargs": {"text": {"logits_to_keep": 0}},
           "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}}}
_MLM = "sentence_transformers.sparse_encoder.models.MLMTransformer"


def write(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def sparse_model(path: Path, family: str = "Bert", **settings: object) -> Path:
    """A sparse model with random weights in every tensor of its head."""
    torch.manual_seed(4)
    config = getattr(transformers, f"{family}Config")(**{**_SHAPES.get(family, _SHAPE), **settings})
    is_encoder = "ert" in family
    auto = transformers.AutoModelForMaskedLM if is_encoder else transformers.AutoModelForCausalLM
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.35 if len(parameter) == VOCABULARY else 0.1))
    model.save_pretrained(path)
    small_tokenizer(path)
    kinds = {"": _MLM if is_encoder else "sentence_transformers.base.modules.transformer.Transformer",
             "1_SpladePooling": "sentence_transformers.sparse_encoder.models.SpladePooling"}
    write(path / "modules.json", [{"idx": index, "name": str(index), "path": folder, "type": kind}
                                  for index, (folder, kind) in enumerate(kinds.items())])
    write(path / "1_SpladePooling" / "config.json", {"pooling_strategy": "max", "activation_function": "relu"})
    write(path / "config_sentence_transformers.json", {"model_type": "SparseEncoder", "prompts": {}})
    write(path / "sentence_bert_config.json", {"max_seq_length": 48, **({} if is_encoder else _CAUSAL)})
    return path


def changed(path: Path, **tensors: torch.Tensor | str | None) -> Path:
    """Set tensors of a directory's file; __ stands for a dot. None removes one, the name of another moves it here."""
    stored = load_file(path / "model.safetensors")
    for key, tensor in tensors.items():
        name = key.replace("__", ".")
        if tensor is None:
            del stored[name]
        else:
            stored[name] = stored.pop(tensor) if isinstance(tensor, str) else tensor
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, path / "model.safetensors",
              metadata={"format": "pt"})
    return path


def copied(source: Path, path: Path, **tensors: torch.Tensor | str | None) -> Path:
    """A copy of a directory with other tensors, see `changed`."""
    shutil.copytree(source, path)
    return changed(path, **tensors)


def opened(directories: list[str]) -> list[object]:
    """Our dense array of each sparse directory, or the message of the error. Called by all ranks."""
    import megatron_embed

    results: list[object] = []
    for directory in directories:
        try:
            results.append(megatron_embed.load(directory).encode(TEXTS, "document").toarray())
        except UserError as error:
            results.append(str(error))
    return results
