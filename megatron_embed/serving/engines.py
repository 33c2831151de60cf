"""Engines of a server: this package's own model, or the ONNX graph in the directory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from megatron_embed.batch import MicroBatch
from megatron_embed.data.packing import pack_bins, pack_longest_first
from megatron_embed.evaluation.encode import TextEncoder
from megatron_embed.evaluation.score import PairScorer
from megatron_embed.export.engines.onnx_runtime import Graph, OnnxRuntime, OpenVino
from megatron_embed.serving.batching import Engine, Tokens

EngineName = Literal["torch", "onnx", "openvino"]
GRAPH_ENGINES = {"onnx": OnnxRuntime, "openvino": OpenVino}
MOST_PADDING = 1.2
"""Padded tokens of a graph's batch per token of its texts, at most."""


class TorchEngine(Engine):
    """The model as `encode` and `evaluate` run it: packed micro-batches, nothing padded."""

    def __init__(self, runner: TextEncoder | PairScorer) -> None:
        self._runner = runner
        self._pad_token_id = runner.tokenizer.pad_token_id

    def rows(self, items: Sequence[Tokens]) -> np.ndarray:
        rows: np.ndarray = self._runner.run(items, self._pack, tqdm(disable=True)).numpy()
        return rows

    def _pack(self, items: Sequence[Tokens]) -> tuple[tuple[MicroBatch, ...], None]:
        packing = self._runner.packing
        bins = pack_longest_first([len(item.ids) for item in items], packing)
        types = None if items[0].types is None else [item.types or [] for item in items]
        return pack_bins(bins, [item.ids for item in items], packing, self._pad_token_id, token_types=types), None


class GraphEngine(Engine):
    """The ONNX graph in ONNX Runtime or OpenVINO: texts of similar lengths together, padded at the right."""

    def __init__(self, graph: Graph, output: str, pad_token_id: int) -> None:
        """`output`: sentence_embedding, or logits of a reranker."""
        self._graph, self._output, self._pad_token_id = graph, output, pad_token_id

    def rows(self, items: Sequence[Tokens]) -> np.ndarray:
        order = sorted(range(len(items)), key=lambda position: len(items[position].ids))
        rows: np.ndarray | None = None
        while order:
            longest, tokens = len(items[order[-1]].ids), 0
            part: list[int] = []
            while order and (not part or longest * (len(part) + 1)
                             <= MOST_PADDING * (tokens + len(items[order[-1]].ids))):
                part.append(order.pop())
                tokens += len(items[part[-1]].ids)
            output = self._graph(self._padded([items[position] for position in part], longest))[self._output]
            rows = np.empty((len(items), output.shape[-1]), dtype=np.float32) if rows is None else rows
            rows[part] = output
        assert rows is not None, "a batch is not empty"
        return rows

    def _padded(self, items: Sequence[Tokens], longest: int) -> dict[str, np.ndarray]:
        """Inputs [items, longest] int64; the graph takes those that it has."""
        ids = np.full((len(items), longest), self._pad_token_id, dtype=np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for row, item in enumerate(items):
            ids[row, : len(item.ids)] = item.ids
            mask[row, : len(item.ids)] = 1
            if item.types is not None:
                types[row, : len(item.ids)] = item.types
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def open_graph_engine(name: EngineName, directory: Path, output: str, pad_token_id: int) -> GraphEngine:
    """The directory's graph. Raises CheckpointError without one, ConfigError without the engine's package."""
    return GraphEngine(GRAPH_ENGINES[name]().open_graph(directory), output, pad_token_id)
