"""Tensors of a sparse model's vocabulary head under Hugging Face's names: reading them, and writing them to an export.

Our names (without `head.`): dense.weight [hidden, hidden], dense.bias, norm.weight, norm.bias [hidden], bias
[vocabulary], weight [vocabulary, hidden] where it is not tied to the word embeddings.
"""

from collections.abc import Mapping

from torch import Tensor

from megatron_embed.convert.head_tensors import CLASSES, lm_head_name

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
_OTHER_HEADS = ("cls.", "lm_head.", "head.", "decoder.", "classifier.", "score.", "qa_outputs.", "bert.pooler.",
                "roberta.pooler.")
"""Prefixes of tensors that the class of the export does not have, but for its own head's."""


def vocabulary_names(family: str) -> Mapping[str, str]:
    """Our names of a vocabulary head -> the family's Hugging Face names."""
    return MASKED_LM_NAMES.get(family, {"weight": lm_head_name(family)})


def vocabulary_class(family: str) -> str:
    """Name of the Transformers class with this head."""
    return CLASSES[family] + ("ForMaskedLM" if family in MASKED_LM_NAMES else "ForCausalLM")


class VocabularyExport:
    """The head of a trained sparse model as tensors of a Hugging Face model with that head; see HeadExport.

    Attributes:
        added: full Hugging Face name -> tensor that the backbone's table does not write.
    """

    def __init__(self, family: str, head: Mapping[str, Tensor], vocab_size: int) -> None:
        """`head`: tensors by our names, those of the vocabulary perhaps padded."""
        names = vocabulary_names(family)
        self.added = {names[ours]: tensor[:vocab_size] if ours in ("weight", "bias") else tensor
                      for ours, tensor in head.items()}

    def keeps(self, name: str) -> bool:
        """Whether the export contains this passthrough tensor."""
        return not name.startswith(_OTHER_HEADS)

    def edited(self, name: str, tensor: Tensor) -> Tensor:
        """A passthrough tensor, unchanged."""
        return tensor
