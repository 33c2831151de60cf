"""The ONNX graph of an export: the stock model with pooling, Dense modules, normalization or a reranker's activation
inside.

Written by `torch.onnx`, from a Sentence Transformers directory, in float32, with both axes of the inputs free.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_embed.export.engines.base import require, stock_features, stock_pair_features
from megatron_embed.export.verify import library_errors, weight_bytes
from megatron_embed.loading.model_directory import find_model
from megatron_embed.loading.reranker import is_reranker
from megatron_embed.models.families import model_shape
from megatron_embed.models.reranker_settings import read_reranker_settings
from megatron_embed.models.saved_settings import read_saved_settings
from megatron_embed.names import Activation, Pooling

GRAPH_FILE = Path("onnx") / "model.onnx"
"""In the directory, where Sentence Transformers and Text Embeddings Inference look for it."""
OPSET = 18
"""The oldest operator set that torch's exporter writes without converting: read by ONNX Runtime since 1.14."""
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""Inputs of a graph in order, [batch, tokens] int64; the last one where the family has it."""
OUTPUTS = {"embedding": ("last_hidden_state", "sentence_embedding"), "score": ("logits", "score")}
"""Outputs of a graph: [batch, tokens, hidden] and [batch, dim], or [batch, 1] and [batch], all float32."""
_EXAMPLES = ("What is the capital of France?", "Paris is the capital and largest city of France, on the Seine.")
"""Texts that the graph is traced with: two, of different lengths, so that neither axis is taken for a constant."""
LARGEST_FILE = 1 << 30
"""Bytes of weights up to which a graph is one file (a protobuf message ends at 2 GiB); larger: model.onnx.data."""


class EmbeddingGraph(torch.nn.Module):
    """[batch, tokens] ids and mask, padded on either side -> token states and one vector per text."""

    def __init__(self, model: torch.nn.Module, pooling: Pooling, normalize: bool, dim: int | None,
                 modules: Sequence[torch.nn.Module] = ()) -> None:
        """`modules`: Dense and Normalize of Sentence Transformers between pooling and the cut to `dim`."""
        super().__init__()
        self.model, self.pooling, self.normalize, self.dim = model, pooling, normalize, dim
        self.after_pooling = torch.nn.ModuleList(modules)

    def forward(self, input_ids: Tensor, attention_mask: Tensor,
                token_type_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden = _call(self.model, input_ids, attention_mask, token_type_ids).last_hidden_state
        features = {"sentence_embedding": pooled(hidden, attention_mask, self.pooling)}
        for module in self.after_pooling:
            features = module(features)
        vectors = features["sentence_embedding"][:, : self.dim]
        return hidden, functional.normalize(vectors, dim=-1) if self.normalize else vectors


class ScoreGraph(torch.nn.Module):
    """[batch, tokens] ids and mask of pairs -> the classifier's logit and the score after the activation."""

    def __init__(self, model: torch.nn.Module, activation: Activation) -> None:
        super().__init__()
        self.model, self.activation = model, activation

    def forward(self, input_ids: Tensor, attention_mask: Tensor,
                token_type_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits = _call(self.model, input_ids, attention_mask, token_type_ids).logits
        return logits, torch.sigmoid(logits[:, 0]) if self.activation == "sigmoid" else logits[:, 0]


def _call(model: torch.nn.Module, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Any:
    types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
    return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **types)


def pooled(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """[batch, tokens, hidden] and [batch, tokens] -> [batch, hidden], as Sentence Transformers' Pooling computes it."""
    if pooling == "cls+mean":
        return torch.cat([pooled(hidden, mask, "cls"), pooled(hidden, mask, "mean")], dim=1)
    positions = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
    if pooling in ("cls", "lasttoken"):
        # Padding may be on either side: the first and the last token are those of the mask.
        row = (mask * positions).argmax(dim=1) if pooling == "lasttoken" else mask.to(torch.int64).argmax(dim=1)
        return hidden.gather(1, row[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]
    weights = mask if pooling == "mean" else mask * mask.cumsum(dim=1)
    weights = weights[:, :, None].to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)


def write_graph(directory: Path, dim: int | None = None) -> None:
    """Add onnx/model.onnx to a Sentence Transformers directory or a cross-encoder's.

    Args:
        dim: components that the vector is cut to before it gets unit length; None: all.
    Raises:
        ConfigError: a package is missing.
        CheckpointError: torch cannot write the model as a graph.
    """
    for package in ("onnx", "onnxscript"):
        require(package, "--format onnx")
    with library_errors(directory, "Sentence Transformers"):
        graph, features, outputs = (_score_graph(directory) if is_reranker(find_model(str(directory)))
                                    else _embedding_graph(directory, dim))
    names = [name for name in INPUTS if name in features]
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    (directory / GRAPH_FILE).parent.mkdir(exist_ok=True)
    with library_errors(directory, "torch.onnx"), _quiet():
        program = torch.onnx.export(
            graph.eval(), tuple(features[name] for name in names), input_names=names, output_names=list(outputs),
            dynamic_shapes=tuple({0: batch, 1: tokens} for _ in names), dynamo=True, opset_version=OPSET, verbose=False)
        assert program is not None
        program.save(directory / GRAPH_FILE, external_data=weight_bytes(directory) > LARGEST_FILE)


def _embedding_graph(directory: Path, dim: int | None) -> tuple[torch.nn.Module, dict[str, Tensor], tuple[str, ...]]:
    from sentence_transformers import SentenceTransformer

    saved = read_saved_settings(directory)
    assert saved.pooling is not None, "the directory was completed"
    # torch 2.13 cannot write its own attention with T5's bias of scores.
    eager = {} if model_shape(directory).relative_positions is None else {"attn_implementation": "eager"}
    model = SentenceTransformer(str(directory), device="cpu", local_files_only=True,
                                model_kwargs={"dtype": "float32", **eager})
    modules = list(model)[2:-1] if saved.normalize is not False else list(model)[2:]
    graph = EmbeddingGraph(model[0].auto_model, saved.pooling, saved.normalize is not False, dim, modules)
    return graph, next(stock_features(directory, list(_EXAMPLES), None)), OUTPUTS["embedding"]


def _score_graph(directory: Path) -> tuple[torch.nn.Module, dict[str, Tensor], tuple[str, ...]]:
    from sentence_transformers import CrossEncoder

    settings = read_reranker_settings(directory)
    model = CrossEncoder(str(directory), device="cpu", local_files_only=True, model_kwargs={"dtype": "float32"})
    features = next(stock_pair_features(directory, [_EXAMPLES, _EXAMPLES[::-1]]))
    return ScoreGraph(model.model, settings.activation), features, OUTPUTS["score"]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress lines and warnings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
