"""Is an exported reranker the one that was trained? Transformers and Sentence Transformers answer, on real pairs."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_embed.errors import CheckpointError, first_line


@dataclass(frozen=True, kw_only=True)
class ScoreReport:
    """How close the libraries' scores of the same pairs are to ours; `str()` is the line for the user."""

    pairs: int
    sentence_transformers: float
    """Largest difference of CrossEncoder's scores, relative to max(1, |score|)."""
    transformers: float
    """The same of the Transformers class by itself, one pair at a time."""

    def __str__(self) -> str:
        return (f"the same scores of {self.pairs} pairs: Sentence Transformers' CrossEncoder to "
                f"{self.sentence_transformers:.1e}, Transformers to {self.transformers:.1e}")


def compare_with_cross_encoder(directory: str | Path, pairs: Sequence[tuple[str, str]],
                               token_ids: Sequence[Sequence[int]], token_types: Sequence[Sequence[int]] | None,
                               our_scores: Tensor, *, answers: tuple[int, int] | None, tolerance: float) -> ScoreReport:
    """Score `pairs` with `CrossEncoder(directory)` and with the Transformers class, both on the CPU, against ours.

    Args:
        directory: the export.
        pairs: real (query, document), short enough not to be cut.
        token_ids: of each pair, as training made them: Transformers reads these, CrossEncoder makes its own.
        token_types: the same; null: the model takes none.
        our_scores: [pairs], before the activation, of the trained model.
        answers: ids of yes and no, of a causal language model; null: a classifier.
        tolerance: of the difference, relative to max(1, |score|); 1e-4 in float32.
    Raises:
        CheckpointError: a library cannot load the directory, or a score differs by more (NaN included).
    """
    theirs = {"Sentence Transformers": _cross_encoder(Path(directory), pairs),
              "Transformers": _transformers(Path(directory), token_ids, token_types, answers)}
    our_scores = our_scores.detach().cpu().double()
    worst = {}
    for library, scores in theirs.items():
        if scores.shape != our_scores.shape:
            raise CheckpointError(f"{directory}: {library} gives scores of shape {list(scores.shape)}, the trained "
                                  f"model {list(our_scores.shape)}; the export must not be used")
        errors = torch.nan_to_num((scores.double() - our_scores).abs() / our_scores.abs().clamp(min=1), nan=torch.inf)
        place = int(errors.argmax())
        worst[library] = float(errors[place])
        if not worst[library] <= tolerance:
            raise CheckpointError(f"{directory}: {library} scores pair {place} ({pairs[place][0][:40]!r}, "
                                  f"{pairs[place][1][:40]!r}) {float(scores[place]):.6f}, the trained model "
                                  f"{float(our_scores[place]):.6f}; the export must not be used")
    return ScoreReport(pairs=len(pairs), sentence_transformers=worst["Sentence Transformers"],
                       transformers=worst["Transformers"])


def _cross_encoder(directory: Path, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """[pairs] float32, before the activation."""
    from sentence_transformers import CrossEncoder

    with _quietly(directory, "Sentence Transformers"):
        model = CrossEncoder(str(directory), device="cpu", local_files_only=True, model_kwargs={"dtype": "float32"})
        scores: Tensor = model.predict(list(pairs), activation_fn=torch.nn.Identity(), convert_to_tensor=True,
                                       show_progress_bar=False)
    return scores.float()


def _transformers(directory: Path, token_ids: Sequence[Sequence[int]], token_types: Sequence[Sequence[int]] | None,
                  answers: tuple[int, int] | None) -> Tensor:
    """[pairs] float32."""
    import transformers

    kind: Any = (transformers.AutoModelForSequenceClassification if answers is None
                 else transformers.AutoModelForCausalLM)
    scores = []
    with _quietly(directory, "Transformers"), torch.inference_mode():
        model = kind.from_pretrained(directory, local_files_only=True, dtype="float32").eval()
        for number, ids in enumerate(token_ids):
            inputs = {"input_ids": torch.tensor([list(ids)])}
            if token_types is not None:
                inputs["token_type_ids"] = torch.tensor([list(token_types[number])])
            logits = model(**inputs).logits[0]
            scores.append(logits[0] if answers is None else logits[-1, answers[0]] - logits[-1, answers[1]])
    return torch.stack(scores).float()


@contextlib.contextmanager
def _quietly(directory: Path, library: str) -> Iterator[None]:
    """Without progress bars; whatever a library raises about the directory is a CheckpointError."""
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{directory}: {library} cannot use it ({first_line(error)}); the export must not be used"
                              ) from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
