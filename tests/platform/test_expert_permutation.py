"""Permutations by indices equal Megatron's own, in value and gradient."""

import pytest
import torch

from megatron_embed.platform.compat import moe_utils, token_dispatcher
from megatron_embed.platform.expert_permutation import Places

TOKENS, EXPERTS, CHOSEN, HIDDEN = 13, 6, 3, 8


def routed(dtype=torch.float32):
    """(tokens, routing map, weights); one expert is chosen by none."""
    torch.manual_seed(4)
    scores = torch.randn(TOKENS, EXPERTS)
    scores[:, 2] = -9.0
    routing_map = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter_(1, scores.topk(CHOSEN).indices, value=True)
    tokens = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    return tokens, routing_map, (scores.softmax(1) * routing_map).detach().requires_grad_()


def there_and_back(module, dtype=torch.float32):
    """(rows, their weights, tokens again, gradients of tokens and weights)."""
    tokens, routing_map, weights = routed(dtype)
    rows, chosen, indices, *_ = module.permute(tokens, routing_map, probs=weights, num_out_tokens=TOKENS * CHOSEN)
    back = module.unpermute((rows * chosen[:, None]).to(dtype), indices, restore_shape=tokens.shape,
                            routing_map=routing_map)
    torch.manual_seed(5)
    (back * torch.randn(back.shape)).sum().backward()
    return rows, chosen, back, tokens.grad, weights.grad


def test_rows_and_gradients_are_megatrons():
    ours, megatrons = there_and_back(token_dispatcher), there_and_back(moe_utils)
    assert megatrons[3].any() and megatrons[4].any()
    for value, expected in zip(ours, megatrons, strict=True):
        assert torch.equal(value, expected)


def test_sums_in_bfloat16_are_rounded_once():
    exact = there_and_back(moe_utils)[2]
    ours, megatrons = (there_and_back(module, torch.bfloat16)[2] for module in (token_dispatcher, moe_utils))
    assert (ours - exact).norm() < (megatrons - exact).norm() < 0.02 * exact.norm()


def test_the_permutation_is_ours():
    tokens, routing_map, weights = routed()
    places = token_dispatcher.permute(tokens, routing_map, probs=weights, num_out_tokens=TOKENS * CHOSEN)[2]
    assert isinstance(places, Places)
    for token in range(TOKENS):
        assert places.experts[token].tolist() == routing_map[token].nonzero().flatten().tolist()


@pytest.mark.parametrize("order", [[2, 0, 3, 1], [0, 1, 2, 3]])
def test_chunks_are_sorted_as_by_megatron(order):
    results = []
    for module in (token_dispatcher, moe_utils):
        torch.manual_seed(6)
        rows, weights = torch.randn(9, HIDDEN, requires_grad=True), torch.randn(9, requires_grad=True)
        arguments = torch.tensor([4, 0, 2, 3]), torch.tensor(order)
        sorted_rows, sorted_weights = module.sort_chunks_by_idxs(rows, *arguments, probs=weights)
        assert torch.equal(module.sort_chunks_by_idxs(rows, *arguments)[0], sorted_rows)
        (sorted_rows * torch.randn(9, HIDDEN) * sorted_weights[:, None]).sum().backward()
        results.append((sorted_rows, sorted_weights, rows.grad, weights.grad))
    assert all(map(torch.equal, *results))
