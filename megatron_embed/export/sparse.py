"""The files of Sentence Transformers' SparseEncoder: the model with its vocabulary head, then SpladePooling.

Versions 5 and 6 read an encoder's directory; a decoder's, whose logits are those of text generation, only version 6.
"""

from pathlib import Path
from typing import Any

from megatron_embed.models.families import model_shape
from megatron_embed.models.vocabulary_shape import MASKED_LM

_POOLING = "sentence_transformers.sparse_encoder.models.SpladePooling"


def types(directory: Path) -> dict[str, str]:
    """Full names of the modules' classes."""
    if model_shape(directory).family in MASKED_LM:
        return {"Transformer": "sentence_transformers.sparse_encoder.models.MLMTransformer", "SpladePooling": _POOLING}
    return {"Transformer": "sentence_transformers.base.modules.transformer.Transformer", "SpladePooling": _POOLING}


def transformer_settings(directory: Path) -> dict[str, Any]:
    """Keys of sentence_bert_config.json that say where the logits come from; an encoder's class says so itself."""
    if model_shape(directory).family in MASKED_LM:
        return {}
    # Without logits_to_keep the library computes those of the last token alone.
    return {"transformer_task": "text-generation", "module_output_name": "token_embeddings",
            "processing_kwargs": {"text": {"logits_to_keep": 0}},
            "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}}}


def pooling_config(directory: Path) -> dict[str, Any]:
    """config.json of SpladePooling."""
    return {"pooling_strategy": "max", "activation_function": "relu",
            "word_embedding_dimension": model_shape(directory).vocab_size}
