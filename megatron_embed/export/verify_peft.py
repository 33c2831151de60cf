"""Is an exported adapter, on its base model in PEFT, the model that was trained? Transformers and PEFT answer."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_embed.convert.hf_directory import HFDirectory
from megatron_embed.convert.lora_names import linear_rules
from megatron_embed.convert.peft import module_pattern
from megatron_embed.errors import CheckpointError
from megatron_embed.export.verify import Report, library_errors, mean_of_tokens, relative_errors, score_of_pair
from megatron_embed.models.families import model_shape
from megatron_embed.models.quantization import QuantizedBase
from megatron_embed.models.quantized_weight import quantize, restored_whole
from megatron_embed.names import HeadKind

TOLERANCE = {None: 1e-5, "score": 1e-4, "yes_no": 1e-4}
"""Largest difference by the head of the checkpoint, both sides in float32: of a component of a unit vector, or of a
score relative to max(1, |score|)."""


def compare_with_peft(directory: Path, base: Path, token_ids: Sequence[Sequence[int]], ours: Tensor, *, dtype: str,
                      head: HeadKind | None = None, answers: tuple[int, int] | None = None,
                      token_types: Sequence[Sequence[int]] | None = None,
                      bidirectional: bool = False, quantized: QuantizedBase | None = None) -> Report:
    """Load `directory` with PEFT on `base`, on the CPU in float32, and compare with the trained model.

    Args:
        directory: the adapter.
        base: its base model's directory.
        token_ids: of each text or pair.
        ours: [texts, hidden_size] mean token vectors, or [pairs] scores before the activation; of the trained model.
        dtype: of the trained model's frozen weights, to which the base model's are rounded first; without effect if
            they were quantized.
        head: of the checkpoint; None: an embedding model.
        answers: ids of yes and no, of a yes_no head.
        token_types: of each pair; None: the model takes none.
        quantized: how the base model's weights were held in training; None: as they are.
        bidirectional: a decoder whose tokens attend to the whole text, in a Transformers that runs it causally.
    Raises:
        CheckpointError: PEFT cannot load it, or a value differs by more than TOLERANCE (NaN included).
    """
    with library_errors(directory, "PEFT", base), torch.inference_mode():
        model = _load(directory, base, dtype, head, quantized)
        if head is None:
            theirs = _unit(torch.stack([mean_of_tokens(model, ids, bidirectional) for ids in token_ids]))
        else:
            all_types: Sequence[Sequence[int] | None] = token_types or [None] * len(token_ids)
            theirs = torch.stack([score_of_pair(model, ids, type_ids, answers)
                                  for ids, type_ids in zip(token_ids, all_types, strict=True)])
    worst = float(relative_errors(directory, "PEFT", theirs, _unit(ours.float()) if head is None else ours).max())
    if not worst <= TOLERANCE[head]:
        raise CheckpointError(f"{directory}: PEFT's values differ from the trained model's by up to {worst:.1e}, more "
                              f"than {TOLERANCE[head]:.0e}; the export must not be used: put the model that the run "
                              f"began with back at {base}, and convert again")
    return Report(library="PEFT, on the base model,", results="vectors" if head is None else "scores",
                  count=len(token_ids), max_difference=worst)


def _load(directory: Path, base: Path, dtype: str, head: HeadKind | None, quantized: QuantizedBase | None) -> Any:
    """The base model with the adapter, in float32."""
    from peft import PeftModel
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTextEncoding,
    )

    # AutoModel of a T5 is encoder and decoder.
    embedder: Any = AutoModel if model_shape(base).relative_positions is None else AutoModelForTextEncoding
    load: dict[str | None, Callable[..., Any]] = {
        None: embedder.from_pretrained, "yes_no": AutoModelForCausalLM.from_pretrained,
        "score": AutoModelForSequenceClassification.from_pretrained}
    options = {"num_labels": 1} if head == "score" else {}
    if quantized is not None:
        dtype = "float32"  # training quantizes the values of the files, and the trained model's others are read there
    model = load[head](str(base), local_files_only=True, dtype=dtype, **options)
    if quantized is not None:
        round_to_quantized(model, base, quantized)
    torch.nn.Module.float(model)  # Transformers' own refuses a model that was quantized
    return PeftModel.from_pretrained(model, str(directory)).float().eval().get_base_model()


def round_to_quantized(model: Any, base: Path, quantized: QuantizedBase) -> None:
    """Give the linears of Transformers' model what their quantized weights stand for."""
    with HFDirectory(base) as source:
        family = source.family
        if source.stored is not None:
            replace_quantized(model, source)
            return
    known = linear_rules(family)

    def round_weight(weight: Tensor) -> None:
        weight.copy_(restored_whole(quantize(weight, quantized.quantization, double=quantized.double_quantization),
                                    torch.float32))

    for name, module in model.named_modules():
        full = family.full_name(name, prefixed=name.startswith(family.prefix))
        if isinstance(module, torch.nn.Linear) and module_pattern(full, known) is not None:
            round_weight(module.weight)
    for name, parameter in model.named_parameters():  # experts are one tensor in Transformers 5
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            for expert in parameter:
                for weight in expert.chunk(2) if name.endswith("gate_up_proj") else (expert,):
                    round_weight(weight)


def replace_quantized(model: Any, source: HFDirectory) -> None:
    """Plain linears, in float32, in place of those of bitsandbytes, whose products depend on its settings."""
    for name, module in list(model.named_modules()):
        full = source.family.full_name(f"{name}.weight", prefixed=name.startswith(source.family.prefix))
        if full in source.stored_names and source.is_quantized(full):
            weight = restored_whole(source.read_quantized(full), torch.float32)
            linear = torch.nn.Linear(*weight.T.shape, bias=False)
            linear.weight, linear.bias = torch.nn.Parameter(weight), module.bias
            model.set_submodule(name, linear)


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=1)
