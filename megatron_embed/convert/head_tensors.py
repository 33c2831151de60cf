"""Tensors of a reranker's head under Hugging Face's names: reading them from a model, writing them to an export.

Our names (without `head.`): weight [1 or 2, hidden], bias [1], dense.weight [hidden, hidden], dense.bias [hidden].
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from megatron_embed.convert.checkpoint_directory import PassthroughFile
from megatron_embed.convert.hf_directory import HFDirectory
from megatron_embed.convert.tables.lookup import rules_for
from megatron_embed.errors import CheckpointError
from megatron_embed.models.head_shapes import reranker_head_shapes
from megatron_embed.models.model_shape import ModelShape
from megatron_embed.names import HeadKind

_LM_HEADS: Mapping[str, str] = {"internlm2": "output.weight"}
"""Family -> name of its language-model head, where it is not lm_head.weight."""
_ROBERTA = {"weight": "classifier.out_proj.weight", "bias": "classifier.out_proj.bias",
            "dense.weight": "classifier.dense.weight", "dense.bias": "classifier.dense.bias"}
SCORE_NAMES: Mapping[str, Mapping[str, str]] = {
    "bert": {"weight": "classifier.weight", "bias": "classifier.bias", "dense.weight": "bert.pooler.dense.weight",
             "dense.bias": "bert.pooler.dense.bias"},
    "roberta": _ROBERTA, "xlm-roberta": _ROBERTA,
    "nomic_bert": {"weight": "classifier.weight", "bias": "classifier.bias",
                   "dense.weight": "nomic_bert.pooler.dense.weight", "dense.bias": "nomic_bert.pooler.dense.bias"},
    "deberta-v2": {"weight": "classifier.weight", "bias": "classifier.bias", "dense.weight": "pooler.dense.weight",
                   "dense.bias": "pooler.dense.bias"},
    "modernbert": {"weight": "classifier.weight", "bias": "classifier.bias", "dense.weight": "head.dense.weight",
                   "dense.bias": "head.dense.bias", "norm.weight": "head.norm.weight", "norm.bias": "head.norm.bias"}}
"""Family -> {our name: full name in *ForSequenceClassification}, biases that not every model has among them. Decoders:
DECODER_SCORE."""
DECODER_SCORE: Mapping[str, str] = {"weight": "score.weight"}
_SAVED_MODULES: Mapping[str, tuple[str, ...]] = {
    "bert": ("classifier", "pooler"), "roberta": ("classifier",), "xlm-roberta": ("classifier",),
    "modernbert": ("classifier", "head"), "deberta-v2": ("classifier", "pooler")}
CLASSES: Mapping[str, str] = {
    "bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "modernbert": "ModernBert", "qwen2": "Qwen2",
    "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe", "llama": "Llama", "mistral": "Mistral", "mixtral": "Mixtral",
    "gemma2": "Gemma2", "gemma3_text": "Gemma3Text",
    "phi3": "Phi3", "glm": "Glm", "glm4": "Glm4", "nomic_bert": "NomicBert", "internlm2": "InternLM2",
    "internlm3": "InternLM3", "deberta-v2": "DebertaV2"}
"""Family -> beginning of the names of its Transformers classes, or of those in its released code."""
_OTHER_HEADS = ("lm_head.", "cls.", "score.", "classifier.", "qa_outputs.", "decoder.", "output.", "v_head.",
                "lm_predictions.", "mask_predictions.")
"""Prefixes of tensors that *ForSequenceClassification does not have, except those of its own head."""

HeadSource = HFDirectory | PassthroughFile
"""The tensors of a model directory or of a checkpoint that no layer of ours uses."""


def score_names(family: str) -> Mapping[str, str]:
    """Our names of a score head -> the family's Hugging Face names."""
    return SCORE_NAMES.get(family, DECODER_SCORE)


def lm_head_name(family: str) -> str:
    """Full name of the tensor of a decoder's language-model head."""
    return _LM_HEADS.get(family, "lm_head.weight")


def saved_modules(family: str) -> list[str]:
    """The modules that a score head consists of, as PEFT's `modules_to_save` names them."""
    return list(_SAVED_MODULES.get(family, ("score",)))


def stored_head(source: HeadSource, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]],
                path: str) -> dict[str, str]:
    """The tensors of a head that a model directory has: our names -> full Hugging Face names.

    Args:
        source: the directory's tensors.
        names: our names -> full names, of every tensor that such a head may have.
        shapes: our names -> shapes, of those that the head of this model has.
        path: the directory, for messages.
    Raises:
        CheckpointError: a tensor has another shape, or is one that the head of this model does not have.
    """
    modules = tuple({full.rpartition(".")[0] + "." for full in names.values()})
    expected = {names[ours]: ours for ours in shapes}
    stored: dict[str, str] = {}
    for full in source.passthrough:
        if full in expected:
            stored[expected[full]] = full
            size = source.entry(full).shape
            if size != shapes[expected[full]]:
                raise CheckpointError(f"{path}: {full} has shape {list(size)}, but by config.json the head's has "
                                      f"{list(shapes[expected[full]])}; use the config.json that belongs to these "
                                      "weights")
        elif full.startswith(modules):
            raise CheckpointError(f"{path}: holds {full}, which the head of this model does not have by config.json, "
                                  "so its effect would be silently ignored; use the config.json that belongs to these "
                                  "weights, or remove the tensor")
    return stored


def check_tied(source: HeadSource, shape: ModelShape, name: str, rows: Iterable[tuple[int, int]], path: str) -> None:
    """Raises CheckpointError if the directory holds an output matrix that is not the word embeddings, although
    config.json ties it to them: versions of Transformers disagree on which of the two gives the logits.

    Args:
        name: full name of the matrix.
        rows: ranges of rows that are compared.
    """
    if name not in source.passthrough:
        return
    embedding = dict(rules_for(shape.family).tied)[name]
    # A checkpoint of ours keeps none that was equal when it was converted.
    if not isinstance(source, HFDirectory) or not all(
            torch.equal(source.read_slice(name, 0, *part).double(), source.read_slice(embedding, 0, *part).double())
            for part in rows):
        raise CheckpointError(f"{path}: {name} is another matrix than {embedding}, and config.json ties the two "
                              "(tie_word_embeddings, true by default in some families); set tie_word_embeddings to "
                              f"false there if {name} is meant, else remove the tensor")


def read_head(source: HeadSource, shape: ModelShape, kind: HeadKind, token_ids: tuple[int, int] | None,
              path: str) -> dict[str, Tensor]:
    """The head's tensors that a model directory has, by our names; none of a yes_no head that is tied.

    Args:
        source: the directory's tensors.
        token_ids: ids of yes and no.
        path: the directory, for messages.
    Raises:
        CheckpointError: a yes_no head without lm_head, a classifier with more than one output, see `stored_head` and
            `check_tied`.
    """
    if kind == "yes_no":
        assert token_ids is not None
        return _answer_rows(source, shape, token_ids, path)
    names = score_names(shape.family)
    outputs = source.entry(names["weight"]).shape[:1] if names["weight"] in source.passthrough else ()
    if outputs not in ((), (1,)):
        raise CheckpointError(f"{path}: {names['weight']} has {outputs[0]} outputs, but a reranker has one score; take "
                              "a model with num_labels = 1, or one without a classifier")
    stored = stored_head(source, names, reranker_head_shapes(kind, shape), path)
    return {ours: source.read(full) for ours, full in stored.items()}


def _answer_rows(source: HeadSource, shape: ModelShape, token_ids: tuple[int, int], path: str) -> dict[str, Tensor]:
    """The rows of the language-model head for yes and no."""
    lm_head, rows = lm_head_name(shape.family), [(token, token + 1) for token in token_ids]
    stored = stored_head(source, {"weight": lm_head}, {"weight": (shape.vocab_size, shape.hidden_size)}, path)
    if shape.tie_word_embeddings:
        check_tied(source, shape, lm_head, rows, path)
        return {}
    if not stored:
        raise CheckpointError(f"{path}: no {lm_head}, and its word embeddings are not tied to one, so there are no "
                              "rows for yes and no; take a model with a language-model head, or reranker.head: score")
    return {"weight": torch.cat([source.read_slice(lm_head, 0, *part) for part in rows])}


def architecture(family: str, kind: Literal["ForCausalLM", "ForSequenceClassification"]) -> str:
    """Name of the Transformers class. Raises CheckpointError for a family without one."""
    if family not in CLASSES or (kind == "ForCausalLM" and family in SCORE_NAMES):
        raise CheckpointError(f"a {family} model has no {kind} export; use --format cross-encoder")
    return (CLASSES[family] if kind == "ForSequenceClassification" else CLASSES[family].removesuffix("Text")) + kind


class HeadExport:
    """The head of a trained reranker as tensors of a Hugging Face model with that head.

    Attributes:
        added: full Hugging Face name -> tensor that the backbone's table does not write.
    """

    def __init__(self, family: str, kind: HeadKind, *, head: Mapping[str, Tensor],
                 token_ids: tuple[int, int] | None, classification: bool) -> None:
        """
        Args:
            head: tensors by our names; "weight" of a yes_no head holds the two rows, tied or not.
            token_ids: ids of yes and no.
            classification: write a *ForSequenceClassification model; else *ForCausalLM, for a yes_no head only.
        """
        self._classification = classification
        self._token_ids = token_ids
        self._lm_head = lm_head_name(family)
        self._rows: Tensor | None = None
        if not classification:
            assert kind == "yes_no", "a causal language model cannot hold a score head"
            self.added: dict[str, Tensor] = {}
            self._rows = head["weight"]
        elif kind == "yes_no":
            rows = head["weight"].float()
            # Kept in float32: rounded to bfloat16, the difference of two similar rows would lose what was learned.
            self.added = {DECODER_SCORE["weight"]: rows[:1] - rows[1:]}
        else:
            self.added = {name: head[ours] for ours, name in score_names(family).items() if ours in head}

    def keeps(self, name: str) -> bool:
        """Whether the export contains this passthrough tensor."""
        if name in self.added:
            return False
        return not (self._classification and name.startswith(_OTHER_HEADS))

    def edited(self, name: str, tensor: Tensor) -> Tensor:
        """A passthrough tensor with the trained rows inserted."""
        if name != self._lm_head or self._rows is None:
            return tensor
        assert self._token_ids is not None
        tensor = tensor.clone()
        tensor[list(self._token_ids)] = self._rows.to(tensor.dtype)
        return tensor
