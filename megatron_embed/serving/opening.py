"""Model directories to the models of a server."""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_embed.errors import ConfigError
from megatron_embed.loading.model_directory import (
    ModelDirectory,
    error_context,
    find_model,
    open_encoder,
    open_role_tokenizer,
)
from megatron_embed.loading.reranker import is_reranker, open_saved_pair_tokenizer, open_scorer
from megatron_embed.serving.batching import Engine, Tokens
from megatron_embed.serving.engines import EngineName, TorchEngine, open_graph_engine
from megatron_embed.serving.models import KIND_NAMES, Limits, ServedEmbedder, ServedModels, ServedReranker

logger = logging.getLogger(__name__)

KEY = "DIR"
"""What messages call the argument that names a directory."""


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How directories are opened."""

    engine: EngineName = "torch"
    dtype: str | None = None
    """Dtype of --engine torch; None: the model's own setting, else float32."""
    max_length: int | None = None
    """Tokens; None: the model's own setting."""


def open_models(directories: Sequence[str], opening: Opening, limits: Limits) -> ServedModels:
    """The models, each of which has computed one text.

    Raises:
        UserError: a directory that cannot be opened or is named twice, or has no graph for the engine.
    """
    if opening.engine != "torch" and opening.dtype is not None:
        raise ConfigError(f"--dtype {opening.dtype}: a graph has the dtype it was written in; leave it out with "
                          f"--engine {opening.engine}", key="--dtype")
    found = [find_model(directory, KEY) for directory in directories]
    names = names_of([model.name if model.peft is None else str(model.peft.resolve()) for model in found])
    models = [_open_reranker(directory, model, name, opening) if is_reranker(model)
              else _open_embedder(directory, model, name, opening)
              for directory, model, name in zip(directories, found, names, strict=True)]
    for served in models:
        logger.info("%s: %s, %s, texts of at most %d tokens", served.name, KIND_NAMES[served.kind], served.directory,
                    served.max_length)
    return ServedModels(models, limits)


def names_of(paths: Sequence[str]) -> list[str]:
    """Names of models: as many of a path's last parts as are needed to tell it from the others.

    Raises ConfigError if a path is there twice.
    """
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ConfigError(f"{KEY} {twice} is given twice; give it once", key=KEY)
    parts = [Path(path).parts for path in paths]
    names = []
    for own in parts:
        count = 1
        while sum(other[-count:] == own[-count:] for other in parts) > 1:
            count += 1
        names.append("/".join(own[-count:]).replace("//", "/"))
    return names


def _open_embedder(directory: str, model: ModelDirectory, name: str, opening: Opening) -> ServedEmbedder:
    engine: Engine
    if opening.engine == "torch":
        # Vectors before normalization, which a request may ask for.
        args = argparse.Namespace(model=directory, pooling=None, max_length=opening.max_length, dtype=opening.dtype,
                                  no_normalize=True, overrides=[])
        encoder, model, _ = open_encoder(args, prompts=True, key=KEY)
        engine, tokenizer = TorchEngine(encoder), encoder.tokenizer
    else:
        model.require_one_vector(KEY, "requests are for")
        with error_context(KEY, directory):
            tokenizer = open_role_tokenizer(model, pooling=model.pooling(None), max_length=opening.max_length,
                                            prompts=True)
            engine = open_graph_engine(opening.engine, model.hf, "sentence_embedding", tokenizer.pad_token_id)
    dim = _first_row(engine, tokenizer.pad_token_id).shape[0]
    return ServedEmbedder(name, model.peft or model.path, engine, tokenizer, dim=dim,
                          similarity=model.saved.similarity, normalize=model.saved.normalize is not False,
                          raw_vectors=opening.engine == "torch")


def _open_reranker(directory: str, model: ModelDirectory, name: str, opening: Opening) -> ServedReranker:
    engine: Engine
    if opening.engine == "torch":
        scorer, model, _ = open_scorer(directory, key=KEY, max_length=opening.max_length, dtype=opening.dtype)
        engine, tokenizer, activation = TorchEngine(scorer), scorer.tokenizer, scorer.activation
    else:
        tokenizer, settings = open_saved_pair_tokenizer(model, KEY, opening.max_length)
        activation = settings.activation
        with error_context(KEY, directory):
            engine = open_graph_engine(opening.engine, model.hf, "logits", tokenizer.pad_token_id)
    _first_row(engine, tokenizer.pad_token_id)
    return ServedReranker(name, model.peft or model.path, engine, tokenizer, activation=activation)


def _first_row(engine: Engine, token_id: int) -> np.ndarray:
    """[dim] of any text: libraries are loaded and kernels compiled before the first request."""
    row: np.ndarray = engine.rows([Tokens([token_id] * 8, None)])[0]
    return row
