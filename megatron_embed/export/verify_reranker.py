"""Is an exported reranker the one that was trained? Transformers and Sentence Transformers answer, on real pairs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_embed.errors import CheckpointError
from megatron_embed.export.equal_llama import stock_directory, stock_library
from megatron_embed.export.verify import Report, library_errors, relative_errors, score_of_pair


def compare_with_cross_encoder(directory: str | Path, pairs: Sequence[tuple[str, str]],
                               token_ids: Sequence[Sequence[int]], token_types: Sequence[Sequence[int]] | None,
                               our_scores: Tensor, *, answers: tuple[int, int] | None,
                               tolerance: float) -> list[Report]:
    """Score `pairs` with `CrossEncoder(directory)` and with the Transformers class, both on the CPU, against ours.

    Args:
        directory: the export.
        pairs: real (query, document), short enough not to be cut.
        token_ids: of each pair, as training made them: Transformers reads these, CrossEncoder makes its own.
        token_types: the same; None: the model takes none.
        our_scores: [pairs], before the activation, of the trained model.
        answers: ids of yes and no, of a causal language model; None: a classifier.
        tolerance: of the difference, relative to max(1, |score|); 1e-4 in float32.
    Raises:
        CheckpointError: a library cannot load the directory, or a score differs by more (NaN included).
    """
    directory, reports = Path(directory), []
    theirs = {"Sentence Transformers": _cross_encoder(directory, pairs),
              "Transformers": _transformers(directory, token_ids, token_types, answers)}
    for library, scores in theirs.items():
        errors = relative_errors(directory, library, scores, our_scores)
        worst = int(errors.argmax())
        if not errors[worst] <= tolerance:
            raise CheckpointError(f"{directory}: {library} scores pair {worst} ({pairs[worst][0][:40]!r}, "
                                  f"{pairs[worst][1][:40]!r}) {float(scores[worst]):.6f}, the trained model "
                                  f"{float(our_scores[worst]):.6f}; the export must not be used")
        reports.append(Report(library=stock_library(directory, library), results="scores", count=len(pairs),
                              max_difference=float(errors[worst])))
    return reports


def _cross_encoder(directory: Path, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """[pairs] float32, before the activation."""
    from sentence_transformers import CrossEncoder

    with library_errors(directory, "Sentence Transformers"):
        with stock_directory(directory) as stock:
            model = CrossEncoder(str(stock), device="cpu", local_files_only=True, model_kwargs={"dtype": "float32"})
        scores: Tensor = model.predict(list(pairs), activation_fn=torch.nn.Identity(), convert_to_tensor=True,
                                       show_progress_bar=False)
    return scores.float()


def _transformers(directory: Path, token_ids: Sequence[Sequence[int]], token_types: Sequence[Sequence[int]] | None,
                  answers: tuple[int, int] | None) -> Tensor:
    """[pairs] float32, one pair at a time."""
    import transformers

    auto: Any = (transformers.AutoModelForSequenceClassification if answers is None
                 else transformers.AutoModelForCausalLM)
    all_types: Sequence[Sequence[int] | None] = token_types or [None] * len(token_ids)
    with library_errors(directory, "Transformers"), torch.inference_mode():
        with stock_directory(directory) as stock:
            model = auto.from_pretrained(stock, local_files_only=True, dtype="float32").eval()
        scores = [score_of_pair(model, ids, type_ids, answers)
                  for ids, type_ids in zip(token_ids, all_types, strict=True)]
    return torch.stack(scores).float()
