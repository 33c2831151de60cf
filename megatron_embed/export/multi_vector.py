"""The files of Sentence Transformers' MultiVectorEncoder (version 6 and later), which is for models of a vector per
token."""

from typing import Any

from megatron_embed.config.vector_format import VectorFormat
from megatron_embed.models.saved_settings import SavedSettings

MODEL_TYPE = "MultiVectorEncoder"
SIMILARITY = "maxsim"
TYPES = {"Transformer": "sentence_transformers.base.modules.transformer.Transformer",
         "Dense": "sentence_transformers.base.modules.dense.Dense",
         "MultiVectorMask": "sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask",
         "Normalize": "sentence_transformers.base.modules.normalize.Normalize"}
"""Full names of the modules' classes."""


def mask_config(vectors: VectorFormat) -> dict[str, Any]:
    """config.json of MultiVectorMask."""
    return {"skiplist_words": list(vectors.skiplist_words), "skiplist_tasks": list(vectors.skiplist_tasks),
            "keep_only_token_ids": None}


def of_tokens(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """config.json of a module, which then takes every token's state in place of a text's vector."""
    if kind not in ("Dense", "Normalize"):
        return config
    return {**config, "module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}


def lengths(saved: SavedSettings) -> dict[str, Any]:
    """Keys of sentence_bert_config.json: the lengths of the roles, and how queries are expanded."""
    assert saved.vectors is not None
    expansion = saved.vectors.expansion
    roles = {f"{role}_length": length for role, length in saved.role_lengths.items()}
    if expansion is None:
        return roles
    length = roles.pop("query_length", None)
    # An expansion that cuts queries decides their length, and Sentence Transformers takes no second one, nor one below
    # that of an expansion.
    if length is not None and not expansion.truncates:
        roles["query_length"] = max(length, expansion.length)
    return {**roles, "query_expansion": {
        "strategy": "fixed" if expansion.truncates else "min", "attend": expansion.attend, "token": expansion.token,
        "length": expansion.length}}
