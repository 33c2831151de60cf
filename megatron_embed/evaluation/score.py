"""Score pairs of query and document with a reranker on all ranks, as encode.py embeds texts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_embed.batch import MicroBatch
from megatron_embed.data.pair_batches import build_score_batches
from megatron_embed.data.pair_tokenizer import Pair, PairTokenizer
from megatron_embed.evaluation.encode import ModelRunner
from megatron_embed.evaluation.finite import require_finite
from megatron_embed.models.encoder import AttentionKernel
from megatron_embed.names import Activation, Pooling
from megatron_embed.parallel.topology import Topology
from megatron_embed.platform.cpu_linear import Libraries


class PairScorer(ModelRunner):
    """A loaded reranker with its tokenizer. Every method is called by all ranks together."""

    def __init__(self, chunks: Sequence[torch.nn.Module], topology: Topology, tokenizer: PairTokenizer, *,
                 pooling: Pooling, kernel: AttentionKernel, causal: bool, activation: Activation,
                 libraries: Libraries | None = None) -> None:
        """`activation`: what `score` applies to the head's raw scores."""
        super().__init__(chunks, topology, pooling=pooling, dim=1, kernel=kernel, causal=causal, libraries=libraries)
        self.tokenizer = tokenizer
        self.activation = activation

    def raw_scores(self, pairs: Sequence[Pair], *, show_progress: bool = False) -> Tensor:
        """Raw scores of the head (log odds), [pairs] float32 on the CPU of every rank. Communicates as `run` does.

        Ranking uses these, because different scores may have the same probability in float32.

        Raises:
            DataError: a query leaves no room for its document, on every rank alike.
            UserError: a score that is not finite, on every rank alike.
        """
        self.tokenizer.check_query_length(pairs)
        bar: tqdm[Any] = tqdm(total=len(pairs), unit="pair", desc="score", disable=None if show_progress else True)
        return require_finite(self.run(pairs, self._pack, bar), "scores of pairs")[:, 0]

    def score(self, pairs: Sequence[Pair], *, show_progress: bool = False) -> Tensor:
        """`raw_scores` through the activation: probabilities, if it is a sigmoid."""
        scores = self.raw_scores(pairs, show_progress=show_progress)
        return scores.sigmoid() if self.activation == "sigmoid" else scores

    def _pack(self, pairs: Sequence[Pair]) -> tuple[tuple[MicroBatch, ...], None]:
        """This rank's micro-batches. No pair is empty: each has template or special tokens."""
        return build_score_batches(pairs, self.tokenizer, self.packing), None
