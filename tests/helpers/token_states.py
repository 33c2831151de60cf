"""Helpers of tests/models/test_encoder.py and other tests."""

import torch

from tests.helpers.toys import open_model, pack_all


def token_states(config, ids, tokens):
    """(tp rank, cp rank, this rank's token states after the last layer), null before the last stage."""
    from megatron_embed.models.encoder import to_device
    from megatron_embed.models.passes import run_schedule

    opened = open_model(config)
    for chunk in opened.chunks:
        chunk.eval()
        chunk.forward = chunk.token_states
    causal = opened.chunks[0].causal
    batch = to_device(pack_all(ids, config, tokens), opened.topology, "mean", kernel="sdpa", causal=causal,
                      shape=opened.chunks[0].shape)
    with torch.no_grad():
        rounds = opened.topology.pp_size if len(opened.chunks) > 1 else 1  # an interleaved pipeline takes no fewer
        outputs = run_schedule(opened.chunks, [batch] * rounds, opened.topology, lambda number: keep_output,
                               forward_only=True)
    topology = opened.topology
    return (topology.tp_rank, topology.cp_rank, outputs[0].squeeze(1)) if topology.is_last_stage else None


def keep_output(output, non_loss_data):
    return output


def whole_bin(parts, config, tokens):
    """[tokens, hidden] from the parts of `token_states`."""
    from megatron_embed.models.attention import context_chunks
    from megatron_embed.parallel.topology import uses_sequence_parallel

    tp, cp = config.parallel.tensor_model_parallel_size, config.parallel.context_parallel_size
    whole = torch.full((tokens, parts[-1][2].shape[1]), torch.nan)
    for tp_rank, cp_rank, states in filter(None, parts):
        held = torch.cat([torch.arange(*chunk) for chunk in context_chunks(tokens, cp_rank, cp)])
        whole[held.chunk(tp)[tp_rank] if uses_sequence_parallel(config.parallel) else held] = states
    return whole
