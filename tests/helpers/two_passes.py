"""Helpers of tests/training/test_grad_cache.py and other tests."""

import math

from tests.helpers.exactness import build


def both_passes(config, dropout_seed=None, replay=True):
    """(embeddings that the last stage produced, one entry per micro-batch and pass; this rank's gradients)."""
    import megatron_embed.training.grad_cache as grad_cache
    from megatron_embed.training.step import seed_step

    built, batch = build(config)
    if dropout_seed is not None:
        seed_step(dropout_seed, 0, built.topology)
    seen, original = [], grad_cache.set_all_rng_states
    built.chunks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    if not replay:
        grad_cache.set_all_rng_states = lambda *states: None
    try:
        built.gradients(batch)
    finally:
        grad_cache.set_all_rng_states = original
    return seen, {name: parameter.main_grad.clone() for chunk in built.chunks
                  for name, parameter in chunk.global_parameters().items() if parameter.requires_grad}


def both_passes_of_runs(runs):
    return [both_passes(*run) for run in runs]


def difference(gradients, expected):
    whole = math.sqrt(sum(float(gradient.square().sum()) for gradient in expected.values()))
    return max(float((gradients[name] - gradient).norm()) / max(float(gradient.norm()), 1e-6 * whole)
               for name, gradient in expected.items())
