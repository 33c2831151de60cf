"""InfoNCE against Sentence Transformers' loss; the closed-form gradient against autograd; the sums against loops."""

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from megatron_embed.losses import info_nce as module
from megatron_embed.losses.info_nce import info_nce, info_nce_gradients


def random_batch(rows=6, candidates=17, dim=5, dtype=torch.float64, seed=0, excluded=False):
    """Unit vectors, positives in any order, some documents equal; `excluded` never at the positive."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.nn.functional.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)
    document = torch.nn.functional.normalize(torch.randn(candidates, dim, generator=generator, dtype=torch.float64),
                                             dim=1)
    document[candidates // 2] = document[0]
    positive = torch.randperm(candidates, generator=generator)[:rows]
    mask = None
    if excluded:
        mask = torch.rand(rows, candidates, generator=generator) < 0.4
        mask[torch.arange(rows), positive] = False
    return query.to(dtype), document.to(dtype), positive, mask


def tiles(mask):
    """The mask as info_nce_gradients asks for it."""
    return None if mask is None else lambda first, last: mask[first:last]


def by_autograd(query, document, positive, temperature, total_rows, excluded):
    query, document = query.clone().requires_grad_(), document.clone().requires_grad_()
    loss = info_nce(query, document, positive, temperature, excluded) * len(query)
    return (loss.detach(), *torch.autograd.grad(loss / total_rows, (query, document)))


def test_value_and_gradients_are_those_of_sentence_transformers():
    query, document, *_ = random_batch(7, 14, 6)
    document = document.clone().requires_grad_()
    query = query.clone().requires_grad_()
    peer = MultipleNegativesRankingLoss(model=None, scale=1 / 0.05)
    peer_loss = peer.compute_loss_from_embeddings([query, document[:7], document[7:]], None)
    peer_gradients = torch.autograd.grad(peer_loss, (query, document))
    # Queries' positives first, then their hard negatives: the order does not matter to the loss.
    loss = info_nce(query, document, torch.arange(7), 0.05)
    gradients = torch.autograd.grad(loss, (query, document))
    assert loss > 0.3
    torch.testing.assert_close(loss, peer_loss, rtol=1e-12, atol=0)
    # Its cosine similarity differentiates through the norm; ours takes unit vectors, so only tangents can agree.
    for ours, theirs, vectors in zip(gradients, peer_gradients, (query, document), strict=True):
        tangent = ours - (ours * vectors).sum(dim=1, keepdim=True) * vectors
        assert theirs.abs().max() > 0.01
        torch.testing.assert_close(tangent, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("tile", [None, 17, 40, 1])
@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_closed_form_gradients_equal_autograd(monkeypatch, dtype, tolerance, tile, excluded, temperature):
    if tile is not None:
        monkeypatch.setattr(module, "TILE_ELEMENTS", tile)
    query, document, positive, mask = random_batch(dtype=dtype, excluded=excluded)
    before = query.clone(), document.clone()
    sums, *gradients = info_nce_gradients(query, document, positive, temperature, total=11, excluded=tiles(mask))
    exact = random_batch(excluded=excluded)
    loss, *expected = by_autograd(*exact[:3], temperature, 11, exact[3])
    torch.testing.assert_close(sums.loss, loss, rtol=tolerance, atol=0)
    for found, wanted in zip(gradients, expected, strict=True):
        assert wanted.norm() > 0.01
        assert found.dtype == dtype
        assert (found.double() - wanted).norm() <= tolerance * wanted.norm()
    assert torch.equal(query, before[0])
    assert torch.equal(document, before[1])


def test_one_candidate_has_no_loss_and_no_gradient():
    query, document, *_ = random_batch(1, 2)
    sums, grad_query, grad_document = info_nce_gradients(query, document[:1], torch.tensor([0]), 0.05, total=1)
    assert not grad_query.any()
    assert not grad_document.any()
    assert sums.stacked().isfinite().all()
    assert (sums.loss, sums.correct, sums.negatives, sums.margin) == (0, 1, 0, 0)
    assert sums.positive_similarity == pytest.approx(float(query[0] @ document[0]))


@pytest.mark.parametrize("candidates", [0, 4])
def test_no_rows_have_no_loss_and_no_gradient(candidates):
    query, document, positive, _ = random_batch(4, 8)
    sums, grad_query, grad_document = info_nce_gradients(query[:0], document[:candidates], positive[:0], 0.05,
                                                         total=3)
    assert not sums.stacked().any()
    assert grad_query.shape == (0, 5)
    assert torch.equal(grad_document, torch.zeros(candidates, 5, dtype=torch.float64))


def test_row_with_all_negatives_excluded_has_no_loss_and_counts_none():
    query, document, positive, _ = random_batch(3, 8)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[1] = torch.arange(8) != positive[1]
    sums, grad_query, _ = info_nce_gradients(query, document, positive, 0.05, total=3, excluded=tiles(mask))
    assert sums.stacked().isfinite().all()
    assert not grad_query[1].any()
    assert grad_query[0].any()
    assert (sums.negatives, sums.masked) == (14, 7)


def naive_sums(query, document, positive, temperature, excluded):
    loss = correct = positive_similarity = negative_similarity = margin = negatives = masked = 0.0
    for row in range(len(query)):
        similarity = query[row] @ document.T
        others = [column for column in range(len(document))
                  if column != positive[row] and (excluded is None or not excluded[row, column])]
        at_positive = float(similarity[positive[row]])
        logits = torch.stack([similarity[positive[row]], *similarity[others]]) / temperature
        loss -= float(logits.log_softmax(dim=0)[0])
        correct += at_positive > float(similarity[others].max())
        positive_similarity += at_positive
        negative_similarity += float(similarity[others].mean())
        margin += at_positive - float(similarity[others].max())
        negatives += len(others)
        masked += 0 if excluded is None else int(excluded[row].sum())
    return torch.tensor([loss, correct, positive_similarity, negative_similarity, margin, negatives, masked],
                        dtype=torch.float64)


@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize("tile", [17, 1 << 20])
def test_sums_are_what_their_names_say(monkeypatch, tile, excluded):
    monkeypatch.setattr(module, "TILE_ELEMENTS", tile)
    query, document, positive, mask = random_batch(9, 12, excluded=excluded, seed=3)
    query[:4] += 2 * document[positive[:4]]
    query = torch.nn.functional.normalize(query, dim=1)
    sums, *_ = info_nce_gradients(query, document, positive, 0.1, total=9, excluded=tiles(mask))
    expected = naive_sums(query, document, positive, 0.1, mask)
    assert 0 < expected[1] < 9
    assert sums.stacked().dtype == torch.float64
    torch.testing.assert_close(sums.stacked(), expected, rtol=1e-12, atol=1e-12)


def test_duplicate_of_the_positive_is_not_counted_as_correct():
    query, document, positive, _ = random_batch(2, 6)
    query[0] = document[positive[0]]
    sums, *_ = info_nce_gradients(query, document, positive, 0.05, total=2)
    alone = float(sums.correct)
    document = torch.cat([document, document[positive[:1]]])
    sums, *_ = info_nce_gradients(query, document, positive, 0.05, total=2)
    assert float(sums.correct) == alone - 1


def test_half_precision_inputs_give_a_float32_loss():
    query, document, positive, _ = random_batch(dtype=torch.bfloat16)
    loss = info_nce(query, document, positive, 0.05)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, info_nce(query.float(), document.float(), positive, 0.05))
