"""Weights of DeBERTa v2 and v3 encoders: BERT's, with other names of the projections, and embeddings of relative
positions."""

from dataclasses import replace

from megatron_embed.convert.tables.bert import BERT
from megatron_embed.convert.tables.transforms import Rename, weight_and_bias

_NAMES = (("bert.", "deberta."), ("{query,key,value}", "{query,key,value}_proj"))


def _renamed(name: str) -> str:
    for theirs, ours in _NAMES:
        name = name.replace(theirs, ours, 1)
    return name


DEBERTA_V2 = replace(
    BERT,
    name="deberta-v2",
    prefix="deberta.",
    rules=(
        *(replace(rule, hf=_renamed(rule.hf)) for rule in BERT.rules if "position_embeddings" not in rule.ours),
        Rename("relative_embeddings.weight", "deberta.encoder.rel_embeddings.weight", "relative_rows hidden_size"),
        *weight_and_bias("relative_embeddings.norm", "deberta.encoder.LayerNorm"),
    ),
    # Among them the two heads that DeBERTa-v3 was pretrained with.
    passthrough=("pooler.*", "classifier.*", "cls.*", "lm_predictions.*", "mask_predictions.*", "qa_outputs.*",
                 "deberta.embeddings.position_*"),
    tied=(("cls.predictions.decoder.weight", "deberta.embeddings.word_embeddings.weight"),),
    old_endings=(),
)
