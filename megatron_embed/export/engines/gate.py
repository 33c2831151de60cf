"""Does an engine serve a directory as we compute it? For any directory, also one that another program wrote."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_embed.data.tokenizer import RoleTokenizer
from megatron_embed.errors import UserError
from megatron_embed.export.embedding import LONGEST_COMPUTED, MINIMUM_COSINE, PROBE_TEXTS, border_texts
from megatron_embed.export.engines.base import BATCH_SIZE, Engine, is_reranker
from megatron_embed.export.engines.files import EngineFiles
from megatron_embed.export.engines.int8 import at_its_bound
from megatron_embed.export.engines.llama_cpp import LlamaCpp, fits
from megatron_embed.export.engines.onnx_runtime import OnnxRuntime, OpenVino
from megatron_embed.export.engines.vllm import Vllm
from megatron_embed.export.verify import library_errors
from megatron_embed.names import ROLES, EngineName, Role


class SentenceTransformers(Engine):
    """The stock library on the CPU, in float32."""

    name = "Sentence Transformers"

    def vectors(self, directory: Path, texts: Sequence[str], role: Role | None) -> Tensor:
        from sentence_transformers import SentenceTransformer

        with library_errors(directory, self.name):
            model = SentenceTransformer(str(directory), device="cpu", local_files_only=True,
                                        model_kwargs={"dtype": "float32"})
            prompt = "" if role is None else (model.prompts or {}).get(role) or ""
            return torch.as_tensor(model.encode(list(texts), prompt=prompt or None, batch_size=BATCH_SIZE,
                                                show_progress_bar=False, convert_to_tensor=True)).float()

    def scores(self, directory: Path, pairs: Sequence[tuple[str, str]]) -> Tensor:
        from sentence_transformers import CrossEncoder

        with library_errors(directory, self.name):
            model = CrossEncoder(str(directory), device="cpu", local_files_only=True, model_kwargs={"dtype": "float32"})
            return torch.as_tensor(model.predict(list(pairs), activation_fn=torch.nn.Identity(), batch_size=BATCH_SIZE,
                                                 show_progress_bar=False, convert_to_tensor=True)).float()


ENGINES: Mapping[EngineName, Callable[[], EngineFiles]] = {
    "sentence-transformers": lambda: _reads(SentenceTransformers()), "onnxruntime": lambda: _reads(OnnxRuntime()),
    "openvino": lambda: _reads(OpenVino()), "vllm": lambda: _reads(Vllm()),
    "llama.cpp": lambda: EngineFiles(engine=LlamaCpp(), write=_nothing, fits=fits)}
"""By the names that `convert --verify-with` takes."""


def verify_directory(directory: Path, engines: Sequence[EngineName]) -> list[str]:
    """The lines of the report on each engine. Raises CheckpointError for the first one that gives other results.

    One process. Short and long texts, texts at the maximum length, Chinese, code, of both roles, or pairs.
    """
    readers = [at_its_bound(ENGINES[name](), directory) for name in engines]
    return (_verify_reranker if is_reranker(directory) else _verify_embedder)(directory, readers)


def _verify_embedder(directory: Path, readers: Sequence[EngineFiles]) -> list[str]:
    from megatron_embed.loading.model_directory import open_encoder

    arguments = argparse.Namespace(model=str(directory), dtype="float32", pooling=None, max_length=None,
                                   no_normalize=False, overrides=[])
    encoder, _, _ = open_encoder(arguments, prompts=True)
    texts = {role: [*PROBE_TEXTS, *_border(encoder.tokenizer, role)] for role in ROLES}
    vectors = {role: encoder.encode(texts[role], role) for role in ROLES}
    del encoder  # its memory goes before an engine takes as much
    return [f"{role}: {reader.compare_vectors(directory, texts[role], vectors[role], role, MINIMUM_COSINE['float32'])}"
            for reader in readers for role in ROLES]


def _border(tokenizer: RoleTokenizer, role: Role) -> tuple[str, ...]:
    limit = tokenizer.max_length(role)
    return () if limit > LONGEST_COMPUTED else border_texts(tokenizer, role, limit).texts


def _verify_reranker(directory: Path, readers: Sequence[EngineFiles]) -> list[str]:
    from megatron_embed.export.reranker import PROBES, TOLERANCE, border_pairs, comparable
    from megatron_embed.loading.reranker import open_scorer

    scorer, _, _ = open_scorer(str(directory), dtype="float32")
    pairs = [*comparable(PROBES, scorer.tokenizer), *border_pairs(scorer.tokenizer)]
    scores = scorer.raw_scores(pairs)
    del scorer
    asked = [(pair.query, pair.document) for pair in pairs]
    return [reader.compare_scores(directory, asked, scores, TOLERANCE["float32"]) for reader in readers]


def _reads(engine: Engine) -> EngineFiles:
    return EngineFiles(engine=engine, write=_nothing)


def _nothing(directory: Path) -> None:
    """The files are there."""


def engine_names(text: str) -> list[EngineName]:
    """The engines of a list with commas. Raises UserError for a name that is none."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in ENGINES:
            raise UserError(f"--verify-with: {name!r} is none of {', '.join(ENGINES)}")
    return [name for name in ENGINES if name in names]
