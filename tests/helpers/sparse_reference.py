"""Sparse models with a small vocabulary, and SPLADE of one process by autograd.

The vocabulary is small so that the largest and the second logit of every maximum are apart, or rounding could choose
another token; and no multiple of 2, so that tensor-parallel ranks pad it.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import BertWordPieceTokenizer

from tests.helpers.toys import MINI_EN

SPARSE = ("flops", "l1", "tied")
"""Regularizers of both roles; tied: flops, of a decoder whose head is its word embeddings."""
VOCABULARY, TEMPERATURE = 509, 4.0
LEAST_GAP = 4e-6
"""Between the largest and the second logit of a maximum, and of a maximum to 0; float32 rounds logits of this size by
less."""


def small_tokenizer(path: Path) -> None:
    """Write a WordPiece tokenizer of VOCABULARY tokens, the letters and the commonest words of the English sample."""
    rows = [json.loads(line) for line in MINI_EN.read_text(encoding="utf-8").splitlines()]
    text = " ".join(row["query"] + " " + row["positive"][0] for row in rows).lower()
    letters = sorted({letter for letter in text if letter.isascii() and letter.isprintable() and letter != " "})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    words = [word for word, _ in Counter(text.split()).most_common(2000) if word.isalpha() and len(word) > 1]
    vocabulary = [*tokens, *words][:VOCABULARY]
    assert len(set(vocabulary)) == VOCABULARY
    (path / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    tokenizer = BertWordPieceTokenizer(str(path / "vocab.txt"), lowercase=True)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]").save_pretrained(path)


def save_sparse_model(path: Path, config_name: str, settings: dict[str, Any], *, tied: bool = False,
                      seed: int = 11, taught: bool = False) -> Path:
    """A language model with random weights, and the small tokenizer. Encoders are always tied.

    `taught`: to tell rows of the English sample apart by sparse vectors.
    """
    torch.manual_seed(seed)
    is_encoder = "bert" in config_name.lower()
    config = getattr(transformers, config_name)(**{
        **settings, "vocab_size": VOCABULARY, "tie_word_embeddings": tied or is_encoder})
    auto = transformers.AutoModelForMaskedLM if is_encoder else transformers.AutoModelForCausalLM
    model = auto.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if "gate.weight" in name else 0.35 if len(parameter) == VOCABULARY else 0.1
            parameter.add_(torch.randn_like(parameter) * scale)
    path.mkdir()
    small_tokenizer(path)
    if taught:
        _teach(model, path)
    model.save_pretrained(path)
    return path


def _teach(model: Any, path: Path) -> None:
    """AdamW until the queries tell their positives apart: untrained models give all texts nearly the same, so that
    gradients are differences of nearly equal numbers."""
    rows = [json.loads(line) for line in MINI_EN.read_text(encoding="utf-8").splitlines()[:16]]
    texts = [row["query"] for row in rows] + [row["positive"][0].split(". ")[0] for row in rows]
    batch = transformers.AutoTokenizer.from_pretrained(path)(texts, padding=True, truncation=True, max_length=48,
                                                             return_tensors="pt")
    batch.pop("token_type_ids", None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        logits = model(**batch).logits.masked_fill(batch["attention_mask"][:, :, None] == 0, 0.0)
        vectors = torch.log1p(torch.relu(logits)).max(dim=1).values
        query, document = vectors.chunk(2)
        loss = torch.nn.functional.cross_entropy(query @ document.T / TEMPERATURE, torch.arange(len(rows)))
        if loss < 1.5:
            return
        optimizer.zero_grad()
        (loss + 3e-4 * regularizer("flops", vectors)).backward()
        optimizer.step()
    raise AssertionError(f"the model did not learn: loss {float(loss)}")


def regularizer(kind: str, vectors: torch.Tensor) -> torch.Tensor:
    """FLOPS or L1 regularizer of sparse vectors [texts, vocabulary], a scalar."""
    return vectors.abs().sum(dim=1).mean() if kind == "l1" else vectors.mean(dim=0).square().sum()


class SparseReference:
    """Sparse vectors of texts, one at a time."""

    def __init__(self, model: Any, before: Callable[[], object]) -> None:
        """`before`: called before each text."""
        self._model, self._before = model, before
        self.smallest_gap = float("inf")

    def vector(self, ids: Sequence[int]) -> torch.Tensor:
        """[vocabulary]."""
        self._before()
        logits = self._model(torch.tensor([list(ids)])).logits[0]
        best = logits.detach().topk(2, dim=0).values
        positive = best[0] > -LEAST_GAP
        gap = torch.minimum(best[0] - best[1], best[0].abs())[positive].min()
        self.smallest_gap = min(self.smallest_gap, float(gap))
        return torch.log1p(torch.relu(logits)).max(dim=0).values

    def check(self) -> None:
        """Raises AssertionError if rounding could change a maximum."""
        assert self.smallest_gap > LEAST_GAP, f"maxima {self.smallest_gap} apart: choose another seed"
