"""SPLADE's pooling, in tiles of any size, against Sentence Transformers' module."""

from types import SimpleNamespace

import pytest
import torch
from sentence_transformers.sparse_encoder.modules import SpladePooling

from megatron_embed.models import splade_pooling
from megatron_embed.models.pooling import PoolingPlan, pieces_of

LENGTHS, HIDDEN, VOCABULARY = (3, 1, 7, 4, 2), 6, 33


def stock(states, weight, bias):
    """[texts, vocabulary]."""
    logits = [torch.nn.functional.linear(part, weight, bias) for part in states.split(LENGTHS)]
    features = {"token_embeddings": torch.nn.utils.rnn.pad_sequence(logits, batch_first=True),
                "attention_mask": torch.nn.utils.rnn.pad_sequence(
                    [torch.ones(length) for length in LENGTHS], batch_first=True)}
    return SpladePooling().train()(features)["sentence_embedding"]


def ours(states, weight, bias):
    sequences = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    tokens = torch.arange(len(sequences))
    plan = PoolingPlan(tokens=tokens, sequences=sequences, weights=torch.ones(len(tokens)), one_token=False,
                       num_sequences=len(LENGTHS), places=tokens, pieces=pieces_of(sequences))
    return splade_pooling.splade_max(states, weight, bias, plan, SimpleNamespace(size=lambda: 1))


@pytest.mark.parametrize("tile", [1, 3 * VOCABULARY, 5 * VOCABULARY, 1 << 24])
@pytest.mark.parametrize("has_bias", [True, False])
def test_values_and_gradients_equal_the_stock_module(tile, has_bias, monkeypatch):
    monkeypatch.setattr(splade_pooling, "LOGIT_TILE_ELEMENTS", tile)
    generator = torch.Generator().manual_seed(2)
    leaves = [torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()
              for size in ((sum(LENGTHS), HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,))]
    bias = leaves.pop() if not has_bias else leaves[2]
    results = []
    for pool in (stock, ours):
        rows = pool(leaves[0], leaves[1], bias if has_bias else None)
        upstream = torch.randn(rows.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        results.append((rows.detach(), *torch.autograd.grad((rows * upstream).sum(), leaves)))
    assert 0.1 < float((results[0][0] == 0).double().mean()) < 0.9
    for own, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)
