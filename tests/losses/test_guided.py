"""A guide's masks: value and gradients of Sentence Transformers' GISTEmbedLoss and CachedGISTEmbedLoss."""

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss, GISTEmbedLoss
from torch.nn.functional import normalize

from megatron_embed.losses.info_nce import Candidates, ContrastiveSettings, contrastive_gradients
from megatron_embed.losses.negatives import GuidedMask, IgnoredColumns, either
from tests.helpers.loss_values import TOLERANCES, assert_equal, value_and_gradients, vectors

ROWS, TEMPERATURE = 9, 0.2


class Columns(torch.nn.Module):
    """In place of a model: the columns' embeddings, one after the other."""

    def __init__(self, columns):
        super().__init__()
        self.columns = iter(columns)

    def forward(self, features):
        return {"sentence_embedding": next(self.columns)}


def peer(kind, **settings):
    """A loss of Sentence Transformers without models."""
    loss = kind.__new__(kind)
    torch.nn.Module.__init__(loss)
    loss.similarity_fct, loss.cross_entropy_loss = torch.nn.CosineSimilarity(dim=-1), torch.nn.CrossEntropyLoss()
    defaults = {"temperature": TEMPERATURE, "margin": 0.0, "margin_strategy": "absolute", "contrast_anchors": True,
                "contrast_positives": True, "gather_across_devices": False, "must_retokenize": False}
    for name, value in {**defaults, **settings}.items():
        setattr(loss, name, value)
    return loss


def by_gist(columns, guides, **settings):
    loss = peer(GISTEmbedLoss, **settings)
    loss.model, loss.guide = Columns(columns), Columns(guides)
    return loss([{} for _ in columns], None)


def by_cached_gist(columns, guides, **settings):
    loss = peer(CachedGISTEmbedLoss, mini_batch_size=4, show_progress_bar=False, **settings)
    return loss.calculate_loss([[column] for column in columns], [[guide] for guide in guides])


def ours(columns, guides, *, margin=0.0, relative=False, directions):
    """(value, gradients of the columns, which are of unit length)."""
    (query, *documents), (guide_query, *guide_documents) = columns, [normalize(guide, dim=1) for guide in guides]
    rows, document = torch.arange(ROWS), torch.cat(documents)
    ignored = IgnoredColumns(
        row_query=rows, positive_index=rows, document_query=rows.repeat(len(documents)),
        is_positive=torch.arange(len(document)) < ROWS, num_queries=ROWS, directions=directions, private=False,
        own_negatives_only=None)
    guided = GuidedMask(query=guide_query, document=torch.cat(guide_documents), queries=guide_query,
                        positive_index=rows, query_index=rows, directions=directions, margin=-margin, relative=relative)
    assert 0.1 < guided.tile(0, ROWS).double().mean() < 0.8
    candidates = Candidates(document=document, positive_index=rows, query=query, query_index=rows,
                            ignored=ignored.tile, excluded=guided.tile)
    grad = contrastive_gradients(query, candidates, ContrastiveSettings(temperature=TEMPERATURE, directions=directions),
                                 total=ROWS)
    of_query = grad.anchor if "query_to_query" not in directions else grad.anchor + grad.query
    return grad.sums.loss / ROWS, (of_query, *grad.document.split(ROWS))


def compared(dtype, count, by_peer, directions, *, margin=0.0, relative=False, **settings):
    columns, guides = vectors(count), vectors(count, seed=5)
    units = [normalize(column, dim=1) for column in columns]
    theirs = value_and_gradients(
        lambda *leaves: by_peer([normalize(leaf, dim=1) for leaf in leaves], guides, margin=margin,
                                margin_strategy="relative" if relative else "absolute", **settings), *units)
    value, gradients = ours([unit.to(dtype) for unit in units], guides, margin=margin, relative=relative,
                            directions=directions)
    # Theirs normalizes: of its gradient what is along the vector is gone.
    gradients = [gradient - (gradient * unit).sum(dim=1, keepdim=True) * unit
                 for gradient, unit in zip(gradients, [unit.to(dtype) for unit in units], strict=True)]
    return (value, gradients), theirs


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("margin, relative", [(0.0, False), (0.1, False), (0.05, True)])
def test_pairs_with_all_three_directions_equal_gist_embed_loss(dtype, tolerance, margin, relative):
    directions = ("query_to_document", "query_to_query", "document_to_document")
    mine, theirs = compared(dtype, 2, by_gist, directions, margin=margin, relative=relative)
    assert_equal(mine, theirs, tolerance)


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
def test_hard_negatives_equal_gist_embed_loss(dtype, tolerance):
    mine, theirs = compared(dtype, 3, by_gist, ("query_to_document", "query_to_query"), contrast_positives=False)
    assert_equal(mine, theirs, tolerance)


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("directions", [("query_to_document",), ("query_to_document", "query_to_query")])
def test_several_hard_negatives_equal_cached_gist_embed_loss(dtype, tolerance, directions):
    mine, theirs = compared(dtype, 4, by_cached_gist, directions, margin=0.1, contrast_positives=False,
                            contrast_anchors=len(directions) > 1)
    assert_equal(mine, theirs, tolerance)


def test_a_positive_and_a_positives_own_query_are_never_masked():
    generator = torch.Generator().manual_seed(2)
    query, document = (normalize(torch.randn(5, 3, generator=generator), dim=1) for _ in range(2))
    rows = torch.arange(5)
    mask = GuidedMask(query=query, document=document, queries=query, positive_index=rows, query_index=rows,
                      directions=("query_to_document", "document_to_query"), margin=-9.0, relative=False)
    kept = ~mask.tile(1, 4)
    assert kept.nonzero().tolist() == [[row, column] for row in range(3) for column in (row + 1, row + 6)]


def test_either_mask_excludes():
    def odd(first, last):
        return torch.arange(4)[None] % 2 == torch.ones(last - first, 1)

    def third(first, last):
        return (torch.arange(4) == 2).expand(last - first, 4)

    assert either(odd, third)(0, 2).tolist() == [[False, True, True, True]] * 2
    assert either(None, third) is third
    assert either(odd, None) is odd
    assert either(None, None) is None
