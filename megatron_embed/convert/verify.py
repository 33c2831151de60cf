"""Is an export the model that was trained? The stock library answers, on real text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_embed.convert.safetensors_file import first_line
from megatron_embed.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class ComparisonReport:
    """How close two libraries' vectors of the same texts are; `str()` is the line for the user."""

    texts: int
    minimum_cosine: float
    mean_cosine: float
    max_difference: float
    """Largest absolute difference of one component."""

    def __str__(self) -> str:
        return (f"Sentence Transformers gives the same vectors for {self.texts} texts: cosine >= "
                f"{self.minimum_cosine:.6f} (mean {self.mean_cosine:.6f}), largest difference "
                f"{self.max_difference:.1e}")


def compare_with_sentence_transformers(directory: str | Path, texts: Sequence[str], our_vectors: Tensor, *,
                                       minimum_cosine: float, prompt_name: str | None = None,
                                       dtype: str = "auto") -> ComparisonReport:
    """Encode `texts` with `SentenceTransformer(directory)` on the CPU and compare with our vectors.

    Args:
        directory: the export.
        texts: real texts, without prompt.
        our_vectors: [texts, embedding_dim], any float dtype, of the trained model.
        minimum_cosine: of every single text; 0.9999 in float32, 0.999 in bfloat16.
        prompt_name: the export's prompt that our vectors were computed with: "query", "document" or null for none.
        dtype: that the library loads the model in; auto: the directory's own.
    Raises:
        CheckpointError: the library cannot load the directory, or a text's cosine is lower (NaN included).
    """
    their_vectors = _encode(Path(directory), texts, prompt_name, dtype).double()
    our_vectors = our_vectors.detach().cpu().double()
    if their_vectors.shape != our_vectors.shape:
        raise CheckpointError(f"{directory}: Sentence Transformers gives vectors of shape {list(their_vectors.shape)}, "
                              f"the trained model {list(our_vectors.shape)}; the export must not be used")
    cosine = torch.nn.functional.cosine_similarity(their_vectors, our_vectors, dim=1)
    worst = int(torch.nan_to_num(cosine, nan=-2.0).argmin())
    if not cosine[worst] >= minimum_cosine:
        raise CheckpointError(f"{directory}: Sentence Transformers' vector of text {worst} ({texts[worst][:40]!r}) has "
                              f"cosine {cosine[worst]:.6f} to the trained model's, below {minimum_cosine}; "
                              "the export must not be used")
    return ComparisonReport(texts=len(texts), minimum_cosine=float(cosine.min()), mean_cosine=float(cosine.mean()),
                            max_difference=float((their_vectors - our_vectors).abs().max()))


def _encode(directory: Path, texts: Sequence[str], prompt_name: str | None, dtype: str) -> Tensor:
    """Vectors of the stock library, [texts, dim] float32."""
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model = SentenceTransformer(str(directory), device="cpu", local_files_only=True, model_kwargs={"dtype": dtype})
        vectors: Tensor = model.encode(list(texts), prompt_name=prompt_name, convert_to_tensor=True,
                                       show_progress_bar=False)
    except (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError) as error:
        raise CheckpointError(f"{directory}: Sentence Transformers cannot use it ({first_line(error)}); "
                              "the export must not be used") from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    return vectors.float()
