"""Tensors of a sparse model's vocabulary head under Hugging Face's names: reading them, and writing them to an export.

Our names (without `head.`): dense.weight [hidden, hidden], dense.bias, norm.weight, norm.bias [hidden], bias
[vocabulary], weight [vocabulary, hidden] where it is not tied to the word embeddings.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from megatron_embed.checkpoint.safe_unpickler import HEAD_KEYS
from megatron_embed.convert.head_tensors import CLASSES, HeadSource, check_tied, lm_head_name, stored_head
from megatron_embed.errors import CheckpointError
from megatron_embed.models.model_shape import ModelShape
from megatron_embed.models.vocabulary_shape import vocabulary_head_shapes

_ROBERTA = {"dense.weight": "lm_head.dense.weight", "dense.bias": "lm_head.dense.bias",
            "norm.weight": "lm_head.layer_norm.weight", "norm.bias": "lm_head.layer_norm.bias",
            "bias": "lm_head.bias", "weight": "lm_head.decoder.weight"}
MASKED_LM_NAMES: Mapping[str, Mapping[str, str]] = {
    "bert": {"dense.weight": "cls.predictions.transform.dense.weight",
             "dense.bias": "cls.predictions.transform.dense.bias",
             "norm.weight": "cls.predictions.transform.LayerNorm.weight",
             "norm.bias": "cls.predictions.transform.LayerNorm.bias", "bias": "cls.predictions.bias",
             "weight": "cls.predictions.decoder.weight"},
    "roberta": _ROBERTA, "xlm-roberta": _ROBERTA,
    "modernbert": {"dense.weight": "head.dense.weight", "dense.bias": "head.dense.bias",
                   "norm.weight": "head.norm.weight", "norm.bias": "head.norm.bias", "bias": "decoder.bias",
                   "weight": "decoder.weight"}}
"""Family -> {our name: full name in *ForMaskedLM}, biases that not every model has among them."""
DECODER_BIASES: Mapping[str, str] = {"bert": "cls.predictions.decoder.bias", "roberta": "lm_head.decoder.bias",
                                     "xlm-roberta": "lm_head.decoder.bias"}
"""Family -> second name of the bias, with which Transformers computes: tied to the first if the matrix is tied."""
_OTHER_HEADS = ("cls.", "lm_head.", "head.", "decoder.", "classifier.", "score.", "qa_outputs.", "bert.pooler.",
                "roberta.pooler.")
"""Prefixes of tensors that the class of the export does not have, but for its own head's."""


def vocabulary_names(shape: ModelShape) -> dict[str, str]:
    """Our names of a vocabulary head -> the family's Hugging Face names, as Transformers computes with them."""
    names = dict(MASKED_LM_NAMES.get(shape.family, {"weight": lm_head_name(shape.family)}))
    if shape.family in DECODER_BIASES and not shape.tie_word_embeddings:
        names["bias"] = DECODER_BIASES[shape.family]
    return names


def stored_vocabulary_head(source: HeadSource, shape: ModelShape, path: str) -> dict[str, str]:
    """The head's tensors that a model directory has: our names -> full Hugging Face names.

    Args:
        source: the directory's tensors.
        path: the directory, for messages.
    Raises:
        CheckpointError: a tensor that does not fit, see `stored_head` and `check_tied`, or one that Transformers does
            not compute with.
    """
    names, shapes = vocabulary_names(shape), vocabulary_head_shapes(shape)
    bias = names.get("bias", "")
    rows: dict[str, tuple[int, ...]] = {"weight": (shape.vocab_size, shape.hidden_size),
                                        "decoder.bias": (shape.vocab_size,)}
    if shape.family in DECODER_BIASES:
        names |= {"bias": MASKED_LM_NAMES[shape.family]["bias"], "decoder.bias": DECODER_BIASES[shape.family]}
    stored = stored_head(source, names, shapes | {name: rows[name] for name in rows if name in names}, path)
    if shape.tie_word_embeddings:
        block = max(1, (8 << 20) // shape.hidden_size)
        check_tied(source, shape, names["weight"], ((first, min(first + block, shape.vocab_size))
                                                    for first in range(0, shape.vocab_size, block)), path)
        stored.pop("weight", None)
    if "decoder.bias" in stored:  # of two the one that Transformers computes with
        stored["bias"] = stored.pop("decoder.bias")
    elif stored.get("bias", bias) != bias:
        raise CheckpointError(f"{path}: holds {stored['bias']} and no {bias}, which Transformers computes with if "
                              "config.json has tie_word_embeddings = false; store the bias under that name, too, if it "
                              "is meant")
    return stored


def check_vocabulary_head(stored: Mapping[str, tuple[int, ...]], shape: ModelShape, path: Path) -> None:
    """Raises CheckpointError unless a checkpoint holds the head of this model.

    Args:
        stored: our names -> shapes; what is divided by the vocabulary may be padded.
        path: the checkpoint, for messages.
    """
    expected = vocabulary_head_shapes(shape)
    sizes = {name: (min(size[0], shape.vocab_size), *size[1:]) if size and name in ("weight", "bias") else size
             for name, size in stored.items()}
    for name in sorted(expected.keys() | sizes):
        if sizes.get(name) != expected.get(name):
            raise CheckpointError(f"{path}: the shape of {HEAD_KEYS}{name} is {_shown(stored.get(name))}, but by "
                                  f"hf/config.json {_shown(expected.get(name))}; use the config.json that belongs to "
                                  "this checkpoint")


def _shown(size: tuple[int, ...] | None) -> str:
    return "none (no such tensor)" if size is None else str(list(size))


def vocabulary_class(family: str) -> str:
    """Name of the Transformers class with this head."""
    return CLASSES[family] + ("ForMaskedLM" if family in MASKED_LM_NAMES else "ForCausalLM")


class VocabularyExport:
    """The head of a trained sparse model as tensors of a Hugging Face model with that head; see HeadExport.

    Attributes:
        added: full Hugging Face name -> tensor that the backbone's table does not write.
    """

    def __init__(self, shape: ModelShape, head: Mapping[str, Tensor]) -> None:
        """`head`: tensors by our names, those of the vocabulary perhaps padded."""
        names = vocabulary_names(shape)
        self.added = {names[ours]: tensor[:shape.vocab_size] if ours in ("weight", "bias") else tensor
                      for ours, tensor in head.items()}
        if "bias" in head:  # Transformers has a second one beside an untied matrix, which it does not compute with
            self.added[MASKED_LM_NAMES[shape.family]["bias"]] = self.added[names["bias"]]

    def keeps(self, name: str) -> bool:
        """Whether the export contains this passthrough tensor."""
        return not name.startswith(_OTHER_HEADS)

    def edited(self, name: str, tensor: Tensor) -> Tensor:
        """A passthrough tensor, unchanged."""
        return tensor
