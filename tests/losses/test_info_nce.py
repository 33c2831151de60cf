"""InfoNCE against Sentence Transformers' loss and formulas written out; the closed-form gradient against autograd."""

import itertools
import math

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from megatron_embed.losses import info_nce as module
from megatron_embed.losses.info_nce import Candidates, ContrastiveSettings, contrastive_gradients, info_nce
from megatron_embed.losses.negatives import IgnoredColumns, answered_queries, duplicate_mask, duplicates_over
from tests.helpers.contrastive_reference import contrastive_loss

Q2D, Q2Q, D2D, D2Q = ("query_to_document", "query_to_query", "document_to_document", "document_to_query")
ALL = (Q2D, Q2Q, D2Q, D2D)


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


def gradients(query, document, positive, temperature, total, mask=None):
    """(sums, gradients of queries and documents) of the plain case."""
    excluded = None if mask is None else lambda first, last: mask[first:last]
    result = contrastive_gradients(query, Candidates(document=document, positive_index=positive, excluded=excluded),
                               ContrastiveSettings(temperature=temperature), total=total)
    return result.sums, result.anchor, result.document


def by_autograd(query, document, positive, temperature, total, excluded):
    query, document = query.clone().requires_grad_(), document.clone().requires_grad_()
    loss = info_nce(query, document, positive, temperature, excluded) * len(query)
    return (loss.detach(), *torch.autograd.grad(loss / total, (query, document)))


def test_value_and_gradients_are_those_of_sentence_transformers():
    query, document, *_ = random_batch(7, 14, 6)
    document = document.clone().requires_grad_()
    query = query.clone().requires_grad_()
    peer = MultipleNegativesRankingLoss(model=None, scale=1 / 0.05)
    peer_loss = peer.compute_loss_from_embeddings([query, document[:7], document[7:]], None)
    peer_gradients = torch.autograd.grad(peer_loss, (query, document))
    # Queries' positives first, then their hard negatives: the order does not matter to the loss.
    loss = info_nce(query, document, torch.arange(7), 0.05)
    ours = torch.autograd.grad(loss, (query, document))
    assert loss > 0.3
    torch.testing.assert_close(loss, peer_loss, rtol=1e-12, atol=0)
    assert_tangents_agree(ours, peer_gradients, (query, document), 1e-12)


def assert_tangents_agree(ours, theirs, vectors, tolerance):
    """A cosine's gradient goes through the norm, ours takes unit vectors: what lies along a vector may differ."""
    for gradient, wanted, vector in zip(ours, theirs, vectors, strict=True):
        tangent = gradient - (gradient * vector).sum(dim=1, keepdim=True) * vector
        assert wanted.abs().max() > 0.01
        torch.testing.assert_close(tangent, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("tile", [None, 17, 40, 1])
@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_closed_form_gradients_equal_autograd(monkeypatch, dtype, tolerance, tile, excluded, temperature):
    if tile is not None:
        monkeypatch.setattr(module, "LOSS_TILE_ELEMENTS", tile)
    query, document, positive, mask = random_batch(dtype=dtype, excluded=excluded)
    before = query.clone(), document.clone()
    sums, *gradients_in_closed_form = gradients(query, document, positive, temperature, 11, mask)
    exact = random_batch(excluded=excluded)
    loss, *expected = by_autograd(*exact[:3], temperature, 11, exact[3])
    torch.testing.assert_close(sums.loss, loss, rtol=tolerance, atol=0)
    for ours, wanted in zip(gradients_in_closed_form, expected, strict=True):
        assert wanted.norm() > 0.01
        assert ours.dtype == dtype
        assert (ours.double() - wanted).norm() <= tolerance * wanted.norm()
    assert torch.equal(query, before[0])
    assert torch.equal(document, before[1])


def test_one_candidate_has_no_loss_and_no_gradient():
    query, document, *_ = random_batch(1, 2)
    sums, grad_query, grad_document = gradients(query, document[:1], torch.tensor([0]), 0.05, 1)
    assert not grad_query.any()
    assert not grad_document.any()
    assert torch.stack(sums).isfinite().all()
    assert (sums.loss, sums.correct, sums.negatives, sums.margin) == (0, 1, 0, 0)
    assert sums.positive_similarity == pytest.approx(float(query[0] @ document[0]))


@pytest.mark.parametrize("candidates", [0, 4])
def test_no_rows_have_no_loss_and_no_gradient(candidates):
    query, document, positive, _ = random_batch(4, 8)
    sums, grad_query, grad_document = gradients(query[:0], document[:candidates], positive[:0], 0.05, 3)
    assert not torch.stack(sums).any()
    assert grad_query.shape == (0, 5)
    assert torch.equal(grad_document, torch.zeros(candidates, 5, dtype=torch.float64))


def test_row_with_all_negatives_excluded_has_no_loss_and_counts_none():
    query, document, positive, _ = random_batch(3, 8)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[1] = torch.arange(8) != positive[1]
    sums, grad_query, _ = gradients(query, document, positive, 0.05, 3, mask)
    assert torch.stack(sums).isfinite().all()
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
    return torch.tensor([loss, correct, positive_similarity, negative_similarity, margin, masked, negatives],
                        dtype=torch.float64)


@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize("tile", [17, 1 << 20])
def test_sums_are_what_their_names_say(monkeypatch, tile, excluded):
    monkeypatch.setattr(module, "LOSS_TILE_ELEMENTS", tile)
    query, document, positive, mask = random_batch(9, 12, excluded=excluded, seed=3)
    query[:4] += 2 * document[positive[:4]]
    query = torch.nn.functional.normalize(query, dim=1)
    sums, *_ = gradients(query, document, positive, 0.1, 9, mask)
    expected = naive_sums(query, document, positive, 0.1, mask)
    assert 0 < expected[1] < 9
    assert torch.stack(sums).dtype == torch.float64
    torch.testing.assert_close(torch.stack(sums), expected, rtol=1e-12, atol=1e-12)


def test_duplicate_of_the_positive_is_not_counted_as_correct():
    query, document, positive, _ = random_batch(2, 6)
    query[0] = document[positive[0]]
    sums, *_ = gradients(query, document, positive, 0.05, 2)
    own_only = float(sums.correct)
    document = torch.cat([document, document[positive[:1]]])
    sums, *_ = gradients(query, document, positive, 0.05, 2)
    assert float(sums.correct) == own_only - 1


def test_half_precision_inputs_give_a_float32_loss():
    query, document, positive, _ = random_batch(dtype=torch.bfloat16)
    loss = info_nce(query, document, positive, 0.05)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, info_nce(query.float(), document.float(), positive, 0.05))


class Groups:
    """Queries with documents of their own, positives first; texts that repeat over them; all as a loss wants it."""

    def __init__(self, rows=6, negatives=2, seed=5, dim=6, positives=1):
        generator = torch.Generator().manual_seed(seed)
        group = positives + negatives
        self.rows, self.group = rows, group
        self.query = torch.nn.functional.normalize(
            torch.randn(rows, dim, generator=generator, dtype=torch.float64) + 0.5, dim=1)
        self.document = torch.nn.functional.normalize(
            torch.randn(rows * group, dim, generator=generator, dtype=torch.float64) + 0.5, dim=1)
        self.document_query = torch.repeat_interleave(torch.arange(rows), group)
        self.is_positive = torch.arange(group).repeat(rows) < positives
        self.query_ids = torch.arange(rows) + 100
        self.query_ids[rows - 1] = self.query_ids[0]
        self.document_ids = torch.arange(rows * group) + 1000
        self.document_ids[group] = self.document_ids[2 * group]  # queries 1 and 2 share their positive
        self.document_ids[4 * group + 1] = self.document_ids[3 * group]  # 4's hard negative is the positive of 3
        self.given = torch.stack([self.query_ids[self.document_query[self.is_positive]],
                                  self.document_ids[self.is_positive]], dim=1)

    def candidates(self, directions, *, private=False, masked=False, own_only=None):
        """(each row's query, what it is compared with)."""
        positive = self.is_positive.nonzero()[:, 0]
        row_query = self.document_query[positive]
        ignored = IgnoredColumns(
            row_query=row_query, positive_index=positive, document_query=self.document_query,
            is_positive=self.is_positive, num_queries=self.rows, directions=directions, private=private,
            own_negatives_only=None if own_only is None else own_only[row_query])
        documents = duplicate_mask(self.query_ids[row_query], positive, self.document_ids, self.given)
        answers = answered_queries(self.document_ids[positive], row_query, self.query_ids, self.given)
        excluded = duplicates_over(directions, documents, ignored.first_positive, answers)
        return row_query, Candidates(
            document=self.document, positive_index=positive, query=self.query, query_index=row_query,
            ignored=ignored.tile, excluded=excluded if masked else None, own=ignored.own)


def both_ways(groups, settings, *, weights=None, total=7.0, dtype=torch.float64, **choices):
    """(loss by autograd, closed form): each (value, gradients of queries and documents)."""
    row_query, candidates = groups.candidates(settings.directions, **choices)
    leaves = groups.query.clone().requires_grad_(), groups.document.clone().requires_grad_()
    loss = contrastive_loss(leaves[0][row_query], replaced(candidates, *leaves), settings, total=total, weights=weights)
    expected = (loss.detach(), *torch.autograd.grad(loss, leaves))
    query, document = groups.query.to(dtype), groups.document.to(dtype)
    result = contrastive_gradients(query[row_query], replaced(candidates, query, document), settings, total=total,
                               weights=None if weights is None else weights.to(dtype))
    grad_query = torch.zeros_like(query).index_add_(0, row_query, result.anchor) + result.query
    return expected, (result.sums.loss / total, grad_query, result.document), result


def replaced(candidates, query, document):
    return Candidates(**{**vars(candidates), "query": query, "document": document})


def assert_close(expected, results, tolerance):
    torch.testing.assert_close(results[0].double(), expected[0], rtol=tolerance, atol=0)
    for ours, wanted in zip(results[1:], expected[1:], strict=True):
        assert wanted.norm() > 1e-3
        assert (ours.double() - wanted).norm() <= tolerance * wanted.norm()


ALL_SETTINGS = [ContrastiveSettings(temperature=0.2, directions=directions, **more) for directions, more in [
    ((Q2D,), {}), (ALL, {}), ((Q2D, Q2Q, D2D), {"mask_margin": 0.1}), (ALL, {"mask_margin": 0.2, "relative": True}),
    ((Q2D, D2Q), {"joint": False}), ((Q2D, D2Q), {"joint": False, "mask_margin": -0.05, "relative": True}),
    ((Q2D,), {"hardness": "in_batch_negatives", "hardness_strength": 9.0}),
    ((Q2D, Q2Q), {"hardness": "hard_negatives", "hardness_strength": 5.0}),
    ((Q2D,), {"hardness": "all_negatives", "hardness_strength": 2.0}), ((Q2D,), {"bias": -2.0})]]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("tile", [None, 50])
@pytest.mark.parametrize("private, masked", [(False, False), (True, True)])
@pytest.mark.parametrize("index", range(len(ALL_SETTINGS)))
def test_closed_form_of_every_variant_equals_autograd(monkeypatch, index, private, masked, tile, dtype, tolerance):
    if tile is not None:
        monkeypatch.setattr(module, "LOSS_TILE_ELEMENTS", tile)
    groups, own_only = Groups(positives=2 if masked else 1), torch.tensor([False, True, False, False, True, False])
    weights = torch.linspace(0.3, 1.2, int(groups.is_positive.sum()), dtype=torch.float64)
    expected, results, _ = both_ways(groups, ALL_SETTINGS[index], weights=weights, dtype=dtype, private=private,
                                   masked=masked, own_only=own_only if masked else None)
    assert_close(expected, results, tolerance)


@pytest.mark.parametrize("index", range(len(ALL_SETTINGS)))
def test_gradient_of_the_scale_equals_a_difference(index):
    groups = Groups()
    bias = ALL_SETTINGS[index].bias

    def loss(log_scale, shift=0.0):
        settings = ContrastiveSettings(**{**vars(ALL_SETTINGS[index]), "temperature": 0.2 * math.exp(-log_scale),
                               "bias": None if bias is None else bias + shift})
        return float(both_ways(groups, settings)[0][0])

    *_, result = both_ways(groups, ALL_SETTINGS[index])
    step = 1e-5
    assert float(result.log_scale) == pytest.approx((loss(step) - loss(-step)) / (2 * step), rel=1e-6)
    assert abs(float(result.log_scale)) > 1e-3
    wanted = 0.0 if bias is None else (loss(0.0, step) - loss(0.0, -step)) / (2 * step)
    assert float(result.bias) == pytest.approx(wanted, rel=1e-6)


DIRECTIONS = [(Q2D,), (Q2D, Q2Q), (Q2D, D2Q), (Q2D, D2D), ALL]


@pytest.mark.parametrize("directions, joint, hardness", [
    *[(directions, True, None) for directions in DIRECTIONS], ((Q2D, D2Q), False, None),
    *[((Q2D,), True, name) for name in ("in_batch_negatives", "hard_negatives", "all_negatives")]])
def test_directions_and_hardness_are_those_of_sentence_transformers(directions, joint, hardness):
    groups, names = Groups(), {Q2D: "query_to_doc", Q2Q: "query_to_query", D2Q: "doc_to_query", D2D: "doc_to_doc"}
    peer = MultipleNegativesRankingLoss(
        model=None, scale=5.0, directions=tuple(names[direction] for direction in directions),
        partition_mode="joint" if joint else "per_direction", hardness_mode=hardness,
        hardness_strength=0.0 if hardness is None else 4.0)
    leaves = groups.query.clone().requires_grad_(), groups.document.clone().requires_grad_()
    loss = peer.compute_loss_from_embeddings([leaves[0], *(leaves[1][offset::3] for offset in range(3))], None)
    theirs = torch.autograd.grad(loss, leaves)
    settings = ContrastiveSettings(temperature=0.2, directions=directions, joint=joint, hardness=hardness,
                        hardness_strength=0.0 if hardness is None else 4.0)
    _, (value, *ours), _ = both_ways(groups, settings, total=6.0)
    assert value == pytest.approx(loss.item(), rel=1e-12)
    assert_tangents_agree(ours, theirs, (groups.query, groups.document), 1e-12)


def qwen3_loss(groups, temperature, margin):
    """The formula of the Qwen3-Embedding report (Zhang et al. 2025, arXiv:2506.05176, section 3), term by term, with
    d_j the positives of the batch: m_ij is 0 if s_ij > s(q_i, d_i+) + 0.1 or d_j is d_i+; s_ij is the score of q_i with
    d_j or q_j."""
    query, document = groups.query, groups.document
    positive = [row * groups.group for row in range(groups.rows)]
    text = [int(groups.document_ids[index]) for index in range(len(document))]
    total, kept, dropped = 0.0, 0, 0
    for i in range(groups.rows):
        # q_0 and q_5 are one query: the positives of both are right for either.
        right = {text[positive[j]] for j in range(groups.rows) if groups.query_ids[j] == groups.query_ids[i]}
        own = float(query[i] @ document[positive[i]])
        terms = [own]

        def add(mask_score, is_right, score, own=own, terms=terms):
            masked = mask_score > own + margin or is_right
            if not masked:
                terms.append(score)
            return masked

        masked = []
        for index in range(positive[i] + 1, positive[i] + groups.group):  # d_{i,k}^-
            score = float(query[i] @ document[index])
            masked.append(add(score, text[index] in right, score))
        for j in range(groups.rows):
            if j == i:
                continue
            is_right = text[positive[j]] in right
            asked, answered = float(query[i] @ query[j]), float(query[i] @ document[positive[j]])
            masked.append(add(asked, is_right, asked))
            masked.append(add(answered, is_right, answered))
            masked.append(add(answered, is_right, float(document[positive[i]] @ document[positive[j]])))
        kept, dropped = kept + len(masked) - sum(masked), dropped + sum(masked)
        total += math.log(sum(math.exp(term / temperature) for term in terms)) - own / temperature
    return total / groups.rows, kept, dropped


def test_five_terms_with_masks_are_the_formula_of_the_qwen3_embedding_report():
    groups = Groups(rows=8, negatives=3, dim=4)
    expected, kept, dropped = qwen3_loss(groups, 0.2, 0.1)
    settings = ContrastiveSettings(temperature=0.2, directions=(Q2D, Q2Q, D2D), mask_margin=0.1)
    (loss, *_), (value, *_), result = both_ways(groups, settings, total=8.0, private=True, masked=True)
    assert dropped > 10
    assert float(value) == pytest.approx(expected, rel=1e-12)
    assert float(loss) == pytest.approx(expected, rel=1e-12)
    assert (result.sums.negatives, result.sums.masked) == (kept, dropped)
    unmasked = both_ways(groups, ContrastiveSettings(temperature=0.2, directions=(Q2D, Q2Q, D2D)), total=8.0,
                         private=True)
    assert float(unmasked[1][0]) > expected + 0.01


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_a_duplicated_positive_costs_nothing_with_the_mask(directions):
    """Another row with the same query and positive, and another whose positive is the same, change no row's loss."""
    groups, settings = Groups(), ContrastiveSettings(temperature=0.2, directions=directions)
    repeated = Groups()
    for name in ("query", "query_ids"):
        setattr(repeated, name, torch.cat([getattr(groups, name), getattr(groups, name)[3:4]]))
    for name in ("document", "document_ids", "is_positive"):
        setattr(repeated, name, torch.cat([getattr(groups, name), getattr(groups, name)[9:10]]))
    repeated.document_query = torch.cat([groups.document_query, torch.tensor([6])])
    repeated.rows = 7
    repeated.given = torch.cat([groups.given, groups.given[3:4]])

    def first_rows(which):
        row_query, candidates = which.candidates(directions, masked=True)
        weights = (row_query == 3).double()
        return float(contrastive_loss(which.query[row_query], candidates, settings, total=1.0, weights=weights))

    assert first_rows(repeated) == pytest.approx(first_rows(groups), rel=1e-12)
    row_query, candidates = repeated.candidates(directions)
    weights = (row_query == 3).double()
    assert float(contrastive_loss(repeated.query[row_query], candidates, settings, total=1.0,
                               weights=weights)) > first_rows(groups) + 0.05


def test_private_hard_negatives_and_queries_that_stand_own_only_by_loops():
    groups, own_only = Groups(positives=2), torch.tensor([False, False, True, False, False, False])
    logits = groups.query @ groups.document.T / 0.2
    expected, terms = 0.0, 0
    for i, index in itertools.product(range(6), range(2)):
        row = [float(logits[i, column]) for column in range(len(groups.document))
               if column == 4 * i + index or (groups.document_query[column] == i and not groups.is_positive[column])
               or (not own_only[i] and groups.document_query[column] != i and groups.is_positive[column])]
        assert len(row) == (3 if own_only[i] else 13)
        expected += 0.5 * (math.log(sum(map(math.exp, row))) - float(logits[i, 4 * i + index]))
        terms += 1
    _, (value, *_), result = both_ways(groups, ContrastiveSettings(temperature=0.2), total=6.0, private=True,
                                      own_only=own_only, weights=torch.full((terms,), 0.5, dtype=torch.float64))
    assert float(value) == pytest.approx(expected / 6, rel=1e-12)
    assert result.sums.masked == 0
    assert result.sums.negatives == 10 * 12 + 2 * 2


def test_sigmoid_is_the_pseudocode_of_siglip():
    """Zhai et al. 2023 (arXiv:2303.15343), algorithm 1."""
    groups = Groups(negatives=0)
    logits = groups.query @ groups.document.T / 0.2 - 3.0
    labels = 2 * torch.eye(6, dtype=torch.float64) - torch.ones(6, 6, dtype=torch.float64)
    expected = -torch.nn.functional.logsigmoid(labels * logits).sum() / 6
    (loss, *_), (value, *_), _ = both_ways(groups, ContrastiveSettings(temperature=0.2, bias=-3.0), total=6.0)
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
