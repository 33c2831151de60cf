"""Is an export the multi-vector model that was trained? Sentence Transformers' MultiVectorEncoder answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_embed.batch import TextVectors
from megatron_embed.errors import CheckpointError
from megatron_embed.export.verify import (
    ExpectedSettings,
    Report,
    compare_vectors,
    library_errors,
    load_stock_encoder,
    require_settings,
    require_stock_ids,
)
from megatron_embed.names import Role


def compare_with_multi_vector_encoder(directory: str | Path, texts: Sequence[str], ours: TextVectors, *, role: Role,
                                      minimum_cosine: float, expected: ExpectedSettings,
                                      cut: Sequence[tuple[str, Sequence[int]]] = (), dtype: str = "auto") -> Report:
    """Encode `texts` with `MultiVectorEncoder(directory)` on the CPU and compare every vector with ours.

    Args: as those of `compare_with_sentence_transformers`.

    Raises:
        CheckpointError: the library cannot load the directory, says something else of it, cuts a text elsewhere or
            gives it another number of vectors, or a vector's cosine to ours is lower.
    """
    directory = Path(directory)
    with library_errors(directory, "Sentence Transformers"):
        model = load_stock_encoder(directory, "MultiVectorEncoder", "6", dtype)
        stock_ids = [_stock_ids(model, text, role) for text, _ in cut]
        encode = model.encode_query if role == "query" else model.encode_document
        vectors = [row.float() for row in encode(list(texts), show_progress_bar=False)]
    require_settings(directory, model, expected, in_its_dtype=dtype == "auto")
    require_stock_ids(directory, cut, stock_ids)
    for text, theirs, count in zip(texts, vectors, ours.counts.tolist(), strict=True):
        if len(theirs) != count:
            raise CheckpointError(f"{directory}: Sentence Transformers gives {text[:40]!r} {len(theirs)} vectors, the "
                                  f"trained model {count}; the export must not be used")
    named = [text for text, count in zip(texts, ours.counts.tolist(), strict=True) for _ in range(count)]
    return compare_vectors(directory, "Sentence Transformers", named, torch.cat(vectors), ours.vectors,
                           minimum_cosine, num_texts=len(texts))


def _stock_ids(model: Any, text: str, role: Role) -> list[int]:
    """Token ids of a text as the library makes them, expansion included."""
    features = model.preprocess([text], prompt=(model.prompts or {}).get(role) or None, task=role)
    return [int(token) for token in features["input_ids"][0]]
