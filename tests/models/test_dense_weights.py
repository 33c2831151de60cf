"""First weights of a new Dense module."""

import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Dense

from megatron_embed.models.dense import semi_orthogonal


def generator():
    return torch.Generator().manual_seed(3)


def test_a_wider_layer_keeps_every_cosine():
    layer = Dense(24, 64, bias=False, activation_function=torch.nn.Identity())
    layer.linear.weight.data = semi_orthogonal(64, 24, generator())
    vectors = torch.nn.functional.normalize(torch.randn(50, 24, generator=generator()))
    wide = layer({"sentence_embedding": vectors})["sentence_embedding"]
    assert torch.allclose(wide @ wide.T, vectors @ vectors.T, atol=2e-4)


def test_a_narrower_layer_projects_onto_a_subspace():
    weight = semi_orthogonal(16, 48, generator())
    assert torch.allclose(weight @ weight.T, torch.eye(16), atol=2e-4)


@pytest.mark.parametrize("outputs, inputs", [(64, 24), (16, 48)])
def test_values_follow_from_the_generator_and_lie_on_a_grid(outputs, inputs):
    weight = semi_orthogonal(outputs, inputs, generator())
    assert weight.dtype == torch.float32 and weight.shape == (outputs, inputs)
    assert torch.equal(weight, semi_orthogonal(outputs, inputs, generator()))
    assert torch.equal(weight * 2**16, torch.round(weight * 2**16))
    assert weight.std() == pytest.approx(max(outputs, inputs)**-0.5, rel=0.05)
