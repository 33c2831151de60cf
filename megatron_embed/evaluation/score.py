"""Pairs of query and document to a reranker's scores over all ranks, as encode.py makes vectors of texts."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_embed.batch import MicroBatch
from megatron_embed.data.packing import PackingSpec
from megatron_embed.data.pair_batches import build_score_batches
from megatron_embed.data.pair_tokenizer import Pair, PairTokenizer
from megatron_embed.evaluation.encode import RowRunner, require_finite
from megatron_embed.models.encoder import AttentionKernel
from megatron_embed.names import Pooling
from megatron_embed.parallel.topology import Topology, token_alignment

Activation = Literal["sigmoid", "identity"]


class PairScorer(RowRunner):
    """A loaded reranker with its tokenizer. Every method is called by all ranks together."""

    def __init__(self, chunks: Sequence[torch.nn.Module], topology: Topology, tokenizer: PairTokenizer, *,
                 pooling: Pooling, kernel: AttentionKernel, causal: bool, activation: Activation,
                 micro_batch_tokens: int = 8192) -> None:
        """
        Args:
            activation: what `score` applies to the head's own scores.
            micro_batch_tokens: of one packed bin, padding included; a longer pair gets a bin of its own.
        """
        super().__init__(chunks, topology, pooling=pooling, dim=1, kernel=kernel, causal=causal)
        self.tokenizer = tokenizer
        self.activation = activation
        self.micro_batch_tokens = micro_batch_tokens

    def raw_scores(self, pairs: Sequence[Pair], *, show_progress: bool = False) -> Tensor:
        """[pairs] float32 on the CPU of every rank: the head's own scores, log odds. For ranking, since different
        scores may have one probability in float32. Communicates as `rows_of` does.

        Raises:
            DataError: a query leaves no room for its document, on every rank alike.
            UserError: a score that is not finite, on every rank alike.
        """
        self.tokenizer.check_query_length(pairs)
        bar: tqdm[Any] = tqdm(total=len(pairs), unit="pair", desc="score", disable=None if show_progress else True)
        return require_finite(self.rows_of(pairs, self._pack, bar), "scores of pairs")[:, 0]

    def score(self, pairs: Sequence[Pair], *, show_progress: bool = False) -> Tensor:
        """The same behind the reranker's activation: probabilities, for sigmoid."""
        scores = self.raw_scores(pairs, show_progress=show_progress)
        return scores.sigmoid() if self.activation == "sigmoid" else scores

    def _pack(self, pairs: Sequence[Pair]) -> tuple[tuple[MicroBatch, ...], None]:
        """This rank's bins. A pair has tokens: those of the template, or an encoder's special ones."""
        packing = PackingSpec(micro_batch_tokens=self.micro_batch_tokens,
                              alignment=token_alignment(self.topology.sizes), uniform_size=self.topology.pp_size > 1)
        return build_score_batches(pairs, self.tokenizer, packing), None
