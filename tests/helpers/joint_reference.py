"""The scores and the loss of BGE-M3 of one process by autograd, text by text; nothing of the trainer's is used.

Choices that rounding could change must be apart: the largest and the second dot product of a maximum, the largest
weights of a token, and a weight and 0.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LEAST_GAP = 1e-6
TOKEN_DIM = 12
SPECIAL = (0, 100, 101, 102)
"""[PAD], [UNK], [CLS] and [SEP] of the WordPiece tokenizer, which have no weight."""

Text = tuple[Tensor, Tensor, Tensor]
"""(dense vector, [tokens] weights before ReLU, [tokens, dim] vectors) of the tokens that give any."""


def largest_weights(ids: Sequence[int], weights: Tensor) -> dict[int, Tensor]:
    """The largest weight of each token, -1 left out."""
    largest: dict[int, Tensor] = {}
    for token, weight in zip(ids, weights.relu(), strict=True):
        if token >= 0 and (token not in largest or bool(weight > largest[token])):
            largest[token] = weight
    return largest


def scores_of_texts(query_ids: Sequence[Sequence[int]], queries: Sequence[Text],
                    document_ids: Sequence[Sequence[int]], documents: Sequence[Text]) -> list[Tensor]:
    """[queries, documents] each: dense, sparse and multi-vector."""
    rows: list[list[list[Tensor]]] = [[], [], []]
    for q_ids, (q_dense, q_weights, q_vectors) in zip(query_ids, queries, strict=True):
        of_query = largest_weights(q_ids, q_weights)
        for row in rows:
            row.append([])
        for d_ids, (d_dense, d_weights, d_vectors) in zip(document_ids, documents, strict=True):
            of_document = largest_weights(d_ids, d_weights)
            shared = [of_query[token] * of_document[token] for token in of_query if token in of_document]
            rows[0][-1].append(q_dense @ d_dense)
            rows[1][-1].append(torch.stack(shared).sum() if shared else q_dense.new_zeros(()))
            rows[2][-1].append((q_vectors @ d_vectors.T).max(dim=1).values.mean())
    return [torch.stack([torch.stack(row) for row in score]) for score in rows]


def joint_loss(logits: Sequence[Tensor], positive: Tensor, score_weights: Sequence[float],
               loss_weights: Sequence[float], *, distils: bool) -> Tensor:
    """[queries]: Chen et al. 2024, section 3.3."""
    total = sum(weight * score.nan_to_num(neginf=0.0) for weight, score in zip(score_weights, logits, strict=True))
    total = total.masked_fill(logits[0] == -torch.inf, -torch.inf)

    def contrast(score: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(score, positive, reduction="none")

    loss = (contrast(total) + sum(weight * contrast(score) for weight, score in zip(
        loss_weights, logits, strict=True))) / 4
    if not distils:
        return loss
    target = total.detach().softmax(dim=1)
    taught = [-(target * score.log_softmax(dim=1).masked_fill(score == -torch.inf, 0.0)).sum(dim=1)
              for score in logits]
    return (loss + sum(weight * own for weight, own in zip(loss_weights, taught, strict=True)) / 3) / 2


def add_joint_heads(path: Path, hidden: int = 32, seed: int = 61) -> Path:
    """Write BGE-M3's two files, with random weights, into a model directory; the directory."""
    torch.manual_seed(seed)
    for name, outputs in (("colbert_linear", TOKEN_DIM), ("sparse_linear", 1)):
        layer = torch.nn.Linear(hidden, outputs)
        with torch.no_grad():
            layer.weight.normal_(0.0, (1.5 if outputs > 1 else 0.4) * hidden**-0.5)
            layer.bias.normal_(0.2, 0.1)
        torch.save(layer.state_dict(), path / f"{name}.pt")
    return path


class JointHeads:
    """The heads in float64."""

    def __init__(self, path: Path) -> None:
        self.layers: dict[str, Any] = {}
        for name in ("colbert_linear", "sparse_linear"):
            state = torch.load(path / f"{name}.pt", weights_only=True)
            layer = torch.nn.Linear(state["weight"].shape[1], len(state["weight"]), dtype=torch.float64)
            layer.load_state_dict(state)
            self.layers[name] = layer

    def of(self, ids: Sequence[int], states: Tensor, pooling: str) -> tuple[list[int], Text]:
        """(ids, -1 without a weight, and what the text gives) of all tokens but the first; [tokens, hidden] states."""
        pooled = {"cls": states[0], "mean": states.mean(dim=0), "lasttoken": states[-1]}[pooling]
        vectors = torch.nn.functional.normalize(self.layers["colbert_linear"](states[1:]), dim=1)
        weights = self.layers["sparse_linear"](states[1:])[:, 0]
        return ([-1 if token in SPECIAL else token for token in ids[1:]],
                (torch.nn.functional.normalize(pooled, dim=0), weights, vectors))

    def check(self, ids: Sequence[Sequence[int]], texts: Sequence[Text], num_queries: int) -> None:
        """Raises AssertionError where rounding could choose another maximum, or nothing is compared."""
        gap, repeated = float("inf"), 0
        for own, (_, weights, _) in zip(ids, texts, strict=True):
            gap = min(gap, float(weights.detach().abs().min()))
            for token in {token for token in own if token >= 0 and own.count(token) > 1}:
                values = weights.detach().relu()[[index for index, other in enumerate(own) if other == token]]
                best = values.sort(descending=True).values
                if best[0] > 0:
                    gap, repeated = min(gap, float(best[0] - best[1])), repeated + 1
        for _, _, query in texts[:num_queries]:
            for _, _, document in texts[num_queries:]:
                best = (query @ document.T).detach().topk(min(2, len(document)), dim=1).values
                gap = min(gap, float((best[:, 0] - best[:, -1]).min()) if best.shape[1] > 1 else gap)
        assert gap > LEAST_GAP, f"maxima {gap} apart: choose another case"
        assert repeated, "no token stands twice in a text"


def load_joint_heads(path: Path) -> JointHeads:
    """Those of a directory."""
    return JointHeads(path)


def save_joint_gradients(heads: JointHeads, path: Path) -> float:
    """Write the gradients as if they were weights; their L2 norm."""
    squares = 0.0
    for name, layer in heads.layers.items():
        gradients = {key: parameter.grad for key, parameter in layer.named_parameters()}
        assert all(gradient is not None and bool(gradient.any()) for gradient in gradients.values())
        torch.save({key: gradient.float() for key, gradient in gradients.items()}, path / f"{name}.pt")
        squares += sum(float(gradient.square().sum()) for gradient in gradients.values())
    return squares**0.5
