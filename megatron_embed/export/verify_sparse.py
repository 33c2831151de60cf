"""Is an export the sparse model that was trained? Sentence Transformers' SparseEncoder answers."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from megatron_embed.export.verify import (
    ExpectedSettings,
    Report,
    compare_vectors,
    library_errors,
    load_stock_encoder,
    require_settings,
    require_stock_ids,
    stock_ids,
)
from megatron_embed.names import Role


def compare_with_sparse_encoder(directory: str | Path, texts: Sequence[str], ours: Tensor, *, role: Role,
                                minimum_cosine: float, expected: ExpectedSettings,
                                cut: Sequence[tuple[str, Sequence[int]]] = (), dtype: str = "auto") -> Report:
    """Encode `texts` with `SparseEncoder(directory)` on the CPU and compare every vector with ours.

    Args: as those of `compare_with_sentence_transformers`; `ours`: [texts, vocabulary].

    Raises:
        CheckpointError: the library cannot load the directory, says something else of it, cuts a text elsewhere, or
            a vector's cosine to ours is lower.
    """
    directory = Path(directory)
    with library_errors(directory, "Sentence Transformers"):
        model = load_stock_encoder(directory, "SparseEncoder", "5", dtype)
        ids = [stock_ids(model, text, role) for text, _ in cut]
        encode = model.encode_query if role == "query" else model.encode_document
        vectors: Tensor = encode(list(texts), convert_to_sparse_tensor=False, show_progress_bar=False).float()
    require_settings(directory, model, expected, in_its_dtype=dtype == "auto")
    require_stock_ids(directory, cut, ids)
    return compare_vectors(directory, "Sentence Transformers", texts, vectors, ours, minimum_cosine)
