"""Picture of the demonstration: training curve, and margins and ranks on the test set before and after training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch

matplotlib.use("agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from sentence_transformers import SentenceTransformer
from torch import Tensor

from megatron_embed.evaluation.beir import BeirData
from megatron_embed.evaluation.retrieval import evaluate_retrieval
from megatron_embed.names import Role

BEFORE, AFTER = "#c0653a", "#2c6e9b"


class SearchResult(NamedTuple):
    """A model's search on a test set, with a value per query in the order of the set."""

    ndcg: float
    """nDCG@10."""
    right: Tensor
    """[queries] float32, cosine with the best relevant document."""
    wrong: Tensor
    """[queries] float32, cosine with the most similar other document."""
    rank: Tensor
    """[queries] int64, rank of the best relevant document, from 1."""


def in_sentence_transformers(directory: str, data: BeirData, max_length: int) -> SearchResult:
    """Search with a model in Sentence Transformers, texts truncated to `max_length` tokens."""
    model = SentenceTransformer(directory, device="cpu")
    model.max_seq_length = max_length
    vector: dict[str, Tensor] = {}

    def embed(texts: Sequence[str], role: Role) -> Tensor:
        encode = model.encode_query if role == "query" else model.encode_document
        vectors = encode(list(texts), convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False)
        vector.update(zip(texts, vectors, strict=True))
        return vectors

    ndcg = evaluate_retrieval(embed, data)["ndcg@10"]
    queries, documents = (torch.stack([vector[text] for text in texts])
                          for texts in (data.query_texts, data.document_texts))
    return search_result(data, queries, documents, ndcg)


def search_result(data: BeirData, queries: Tensor, documents: Tensor, ndcg: float) -> SearchResult:
    """Similarities and ranks of unit vectors [queries, dim] and [documents, dim] in the order of the set."""
    similarity = queries @ documents.T
    column = {name: index for index, name in enumerate(data.document_ids)}
    relevant = similarity.new_zeros(similarity.shape).bool()
    for row, query in enumerate(data.query_ids):
        relevant[row, [column[name] for name, label in data.qrels[query].items() if label > 0]] = True
    right = similarity.masked_fill(~relevant, -2).amax(dim=1)
    others = similarity.masked_fill(relevant, -2)
    return SearchResult(ndcg, right, others.amax(dim=1), (others > right[:, None]).sum(dim=1) + 1)


def draw(path: Path, steps: list[dict[str, Any]], before: SearchResult, after: SearchResult) -> None:
    """Write the picture from the rows of metrics.jsonl with a loss and the searches before and after training."""
    figure, (learning, margins, ranks) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    _curve(learning, steps)
    _margins(margins, before, after)
    _ranks(ranks, before, after)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _curve(axes: Axes, steps: list[dict[str, Any]]) -> None:
    numbers = [row["step"] for row in steps]
    loss = axes.plot(numbers, [row["loss"] for row in steps], color=AFTER, marker="o", markersize=3, label="loss")
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    shares = axes.twinx()
    share = shares.plot(numbers, [row["in_batch_accuracy"] for row in steps], color=BEFORE, linestyle="--",
                        label="right passage first among the batch's")
    shares.set(ylabel="share of the batch's questions", ylim=(0, 1))
    axes.legend(handles=[*loss, *share], loc="lower right", fontsize=8, frameon=False)
    axes.set_title("Training: every question against every passage", fontsize=10)


def _margins(axes: Axes, before: SearchResult, after: SearchResult) -> None:
    bins = [edge / 20 for edge in range(-12, 13)]
    for name, model, colour in (("before", before, BEFORE), ("after", after, AFTER)):
        margin = model.right - model.wrong
        axes.hist(margin.numpy(), bins=bins, color=colour, alpha=0.6,
                  label=f"{name}: {(margin > 0).float().mean().item():.0%} above 0")
    axes.axvline(0, color="black", linewidth=1)
    axes.set(xlabel="cosine with the right passage - with the best wrong one", ylabel="held-out questions")
    axes.legend(loc="upper left", fontsize=8, frameon=False)
    axes.set_title("Right passage against the best wrong one", fontsize=10)


def _ranks(axes: Axes, before: SearchResult, after: SearchResult) -> None:
    cuts = range(1, 51)
    for name, model, colour in (("before", before, BEFORE), ("after", after, AFTER)):
        axes.plot(cuts, [(model.rank <= cut).float().mean().item() for cut in cuts], color=colour, label=name)
    axes.set(xscale="log", xlabel="k", ylabel="share of held-out questions", ylim=(0, 1))
    axes.set_xticks([1, 2, 5, 10, 20, 50], labels=["1", "2", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    axes.set_title("Right passage among the first k found", fontsize=10)
