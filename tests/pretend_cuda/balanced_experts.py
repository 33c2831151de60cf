"""Experts on fake tensors, which have no values to route by: every expert gets as many rows as any other."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatron_embed.platform.compat import token_dispatcher

DISPATCHER = token_dispatcher.MoEAlltoAllTokenDispatcher


class Counts(list[int]):
    """Rows of each expert, on the host."""

    def tolist(self) -> list[int]:
        return list(self)


@contextlib.contextmanager
def balanced_experts() -> Iterator[None]:
    """Set the dispatchers' numbers of rows, which they would read back from the device, once their own launches for
    them are counted."""
    preprocess = DISPATCHER.preprocess

    def balanced(self: Any, routing_map: Tensor) -> Counts:
        preprocess(self, routing_map)
        rows, ranks = routing_map.shape[0] * self.config.moe_router_topk, self.ep_size * self.tp_size
        each, rest = divmod(rows, self.num_experts)
        assert rest == 0, f"{self.num_experts} experts do not divide {rows} rows; choose other micro_batch_tokens"
        self.input_splits = self.output_splits = [each * self.num_local_experts] * self.ep_size
        self.output_splits_tp = Counts([each * self.num_local_experts * self.ep_size] * self.tp_size)
        self.num_global_tokens_per_local_expert = torch.full((ranks, self.num_local_experts), each)
        return Counts([each * ranks] * self.num_local_experts)

    with mock.patch.object(DISPATCHER, "preprocess", balanced), \
            mock.patch.object(DISPATCHER, "_maybe_dtoh_and_synchronize", lambda self, point, counts=None: counts):
        yield


@register_flop_formula(torch.ops.aten._grouped_mm)  # type: ignore[untyped-decorator]
def grouped_flops(left: tuple[int, ...], right: tuple[int, ...], *args: Any, out_shape: Any = None,
                  **kwargs: Any) -> int:
    """Two per row and element of a weight, whether rows are the outer or, for a weight's gradient, the inner ones."""
    return 2 * left[0] * left[1] * right[-1]
