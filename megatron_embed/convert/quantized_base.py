"""The base model of adapters over quantized weights: a reference to it, and its directory again."""

from pathlib import Path

from megatron_embed.convert.checkpoint_directory import CheckpointDirectory
from megatron_embed.convert.fingerprint import fingerprint
from megatron_embed.convert.hf_directory import HFDirectory
from megatron_embed.errors import CheckpointError
from megatron_embed.models.quantization import QuantizedBase
from megatron_embed.names import Quantization


def reference_to(directory: Path, name: str, kind: Quantization, *, double: bool) -> QuantizedBase:
    """The reference that checkpoints hold to a Hugging Face directory. No communication."""
    with HFDirectory(directory) as source:
        return QuantizedBase(quantization=kind, double_quantization=double, path=str(directory.resolve()), name=name,
                             fingerprint=fingerprint(source))


def base_directory(checkpoint: CheckpointDirectory) -> Path | None:
    """The directory of the base model whose quantized weights a checkpoint leaves out; None if it has all its weights.

    Raises:
        CheckpointError: the base model is no longer there, or has other weights.
    """
    base = checkpoint.info.quantized_base
    if base is None:
        return None
    remedy = (f"write the directory where it is now as \"path\" of \"base\" in "
              f"{checkpoint.path / 'megatron_embed.json'}")
    folder = Path(base.path)
    if not folder.is_dir():
        raise CheckpointError(f"{checkpoint.path}: holds adapters without their base model, which was {base.path} "
                              f"({base.name}) and is not there; {remedy}")
    with HFDirectory(folder) as source:
        current = fingerprint(source)
    if current != base.fingerprint:
        raise CheckpointError(f"{checkpoint.path}: its adapters belong to other weights than {base.path} has now "
                              f"(fingerprint {current}, in training {base.fingerprint}); put these back, or {remedy}")
    return folder
