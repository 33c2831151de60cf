"""Is an exported adapter, on its base model in PEFT, the model that was trained? Transformers and PEFT answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_embed.errors import CheckpointError, first_line
from megatron_embed.export.verify import mean_of_tokens, without_bars

TOLERANCE = {None: 1e-5, "score": 1e-4, "yes_no": 1e-4}
"""By the head of the checkpoint, both sides in float32: of a component of a unit vector, or of a score relative to
max(1, |score|)."""


@dataclass(frozen=True, kw_only=True)
class PeftComparison:
    """How close PEFT's results are to ours; `str()` is the line for the user."""

    texts: int
    worst: float
    head: Literal["score", "yes_no"] | None

    def __str__(self) -> str:
        what = "scores" if self.head else "vectors"
        return (f"PEFT, on the base model, gives the same {what} of {self.texts} texts: largest difference "
                f"{self.worst:.1e}")


def compare_with_peft(directory: Path, base: Path, token_ids: Sequence[Sequence[int]], ours: Tensor, *, dtype: str,
                      head: Literal["score", "yes_no"] | None = None, answers: tuple[int, int] | None = None,
                      token_types: Sequence[Sequence[int]] | None = None,
                      bidirectional: bool = False) -> PeftComparison:
    """Load `directory` with PEFT on `base`, on the CPU in float32, and compare with the trained model.

    Args:
        directory: the adapter.
        base: its base model's directory.
        token_ids: of each text or pair.
        ours: [texts, hidden_size] mean token vectors, or [pairs] scores before the activation; of the trained model.
        dtype: of the trained model's frozen weights, to which the base model's are rounded first.
        head: of the checkpoint; None: an embedding model.
        answers: ids of yes and no, of a yes_no head.
        token_types: of each pair; None: the model takes none.
        bidirectional: a decoder whose tokens attend to the whole text, in a Transformers that runs it causally.
    Raises:
        CheckpointError: PEFT cannot load it, or a value differs by more than TOLERANCE (NaN included).
    """
    try:
        with without_bars(), torch.inference_mode():
            model = _load(directory, base, dtype, head)
            if head is None:
                theirs = _unit(torch.stack([mean_of_tokens(model, ids, bidirectional) for ids in token_ids]))
            else:
                theirs = torch.stack([_score(model, number, token_ids, token_types, answers)
                                      for number in range(len(token_ids))])
    except (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{directory}: PEFT cannot use it on {base} ({first_line(error)}); the export must not "
                              "be used") from error
    ours = ours.detach().cpu().float()
    ours, scale = (_unit(ours), torch.tensor(1.0)) if head is None else (ours, ours.abs().clamp(min=1))
    if theirs.shape != ours.shape:
        raise CheckpointError(f"{directory}: PEFT gives values of shape {list(theirs.shape)}, the trained model "
                              f"{list(ours.shape)}; the export must not be used")
    worst = float(torch.nan_to_num((theirs - ours).abs() / scale, nan=torch.inf).max())
    if not worst <= TOLERANCE[head]:
        raise CheckpointError(f"{directory}: PEFT's values differ from the trained model's by up to {worst:.1e}, more "
                              f"than {TOLERANCE[head]:.0e}; the export must not be used: put the model that the run "
                              f"began with back at {base}, and convert again")
    return PeftComparison(texts=len(token_ids), worst=worst, head=head)


def _load(directory: Path, base: Path, dtype: str, head: Literal["score", "yes_no"] | None) -> Any:
    """The base model with the adapter, in float32."""
    from peft import PeftModel
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    load: dict[str | None, Callable[..., Any]] = {
        None: AutoModel.from_pretrained, "yes_no": AutoModelForCausalLM.from_pretrained,
        "score": AutoModelForSequenceClassification.from_pretrained}
    options = {"num_labels": 1} if head == "score" else {}
    model = load[head](str(base), local_files_only=True, dtype=dtype, **options).float()
    return PeftModel.from_pretrained(model, str(directory)).float().eval().get_base_model()


def _score(model: Any, number: int, token_ids: Sequence[Sequence[int]], token_types: Sequence[Sequence[int]] | None,
           answers: tuple[int, int] | None) -> Tensor:
    inputs = {"input_ids": torch.tensor([list(token_ids[number])])}
    if token_types is not None:
        inputs["token_type_ids"] = torch.tensor([list(token_types[number])])
    logits = model(**inputs).logits[0]
    return torch.as_tensor(logits[0] if answers is None else logits[-1, answers[0]] - logits[-1, answers[1]])


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=1)
