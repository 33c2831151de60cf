"""The files of engines that an export gets beside Hugging Face's, each with the comparison of the engine's results."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.export.engines.base import Engine
from megatron_embed.export.engines.graph import write_graph
from megatron_embed.export.engines.llama_cpp import LlamaCpp, fits, gguf_file, write_gguf
from megatron_embed.export.engines.onnx_runtime import OnnxRuntime, OpenVino, write_openvino
from megatron_embed.export.verified_write import ExportOptions
from megatron_embed.export.verify import Report, compare_vectors, relative_errors
from megatron_embed.models.saved_settings import read_saved_settings
from megatron_embed.names import EngineName, ExportFormat, GgufType, Role

if TYPE_CHECKING:
    from megatron_embed.export.reranker import PairProbes

CutPairs = Literal["all", "texts", "none"]
"""texts: two texts lose tokens of the longer one, but a prompt loses its end; none: pairs of the model's length or more
are refused."""
GGUF_COSINE = {"f32": 0.9999, "f16": 0.9999, "bf16": 0.999, "q8_0": 0.999}
"""Between the engine's and the model's vector in memory, for every text, by the weights' type."""
GGUF_SCORE = 0.3
"""Largest difference of a score of weights that are not float32, relative to max(1, |score|)."""


@dataclass(frozen=True, kw_only=True)
class EngineFiles:
    """What one format adds to an export."""

    engine: Engine
    write: Callable[[Path], None]
    """Adds the files to the complete directory."""
    limits: EngineName = "onnxruntime"
    """The engine's name in limits.py."""
    tidy: Callable[[Path], None] = lambda directory: None
    """Takes out what the format does not need, after the comparison."""
    minimum_cosine: float = 1.0
    """That the engine must reach where the weights are coarser than the model's."""
    score_tolerance: float = 0.0
    """Difference of a score, relative to max(1, |score|), that the engine may have where it computes more coarsely."""
    dim: int | None = None
    """Components of the engine's vectors; None: all."""
    fits: Callable[[Path, Sequence[str], Role | None], list[bool]] = lambda directory, texts, role: [True] * len(texts)
    """Whether the engine takes texts of this length; what is too long, llama.cpp refuses."""
    cuts: CutPairs = "all"
    """The pairs of more tokens than the model's length that the engine cuts as we do."""

    def compare_vectors(self, directory: Path, texts: Sequence[str], ours: Tensor, role: Role | None,
                        minimum_cosine: float) -> Report:
        """The report on the engine's vectors of texts of a role or none. Raises CheckpointError for another model."""
        minimum = min(minimum_cosine, self.minimum_cosine)
        chosen = [index for index, fits in enumerate(self.fits(directory, texts, role)) if fits]
        texts, ours = [texts[index] for index in chosen], ours[chosen]
        if self.dim is not None:
            ours = ours[:, : self.dim]
            if read_saved_settings(directory).normalize is not False:
                ours = ours / ours.norm(dim=1, keepdim=True)
        return compare_vectors(directory, self.engine.name, texts, self.engine.vectors(directory, texts, role), ours,
                               minimum)

    def compare_scores(self, directory: Path, probes: "PairProbes", tolerance: float) -> str:
        """The report on the engine's scores, before and after the activation. Raises CheckpointError for another
        model."""
        asked = probes
        if self.cuts == "none":
            asked = probes.without(probes.is_full)
        elif self.cuts == "texts" and probes.in_template:
            asked = probes.without(probes.is_cut)
        pairs = [(pair.query, pair.document) for pair in asked.pairs]
        theirs, name = self.engine.scores(directory, pairs), self.engine.name
        tolerance = max(tolerance, self.score_tolerance)
        errors = relative_errors(directory, name, theirs.raw, asked.raw)
        if theirs.rounding is not None:
            rounding = theirs.rounding / asked.raw.double().abs().clamp(min=1)
            errors = torch.where(rounding.isinf(), 0, (errors - rounding).clamp(min=0))
        if theirs.final is not None:
            errors = torch.maximum(errors, relative_errors(directory, name, theirs.final, asked.final))
        if not errors.max() <= tolerance:
            worst = int(errors.argmax())
            raise CheckpointError(f"{directory}: {name}'s score of pair {worst} ({pairs[worst][0][:40]!r}) differs by "
                                  f"{float(errors[worst]):.2e}, more than {tolerance}; the export must not be used")
        report = Report(library=name, results="scores", count=len(pairs), max_difference=float(errors.max()))
        return f"{report}{'' if theirs.final is not None else ', before the activation'}"


def _onnx(options: ExportOptions) -> EngineFiles:
    return EngineFiles(engine=OnnxRuntime(), write=lambda directory: write_graph(directory, options.dim),
                       dim=options.dim)


def _openvino(options: ExportOptions) -> EngineFiles:
    def write(directory: Path) -> None:
        write_graph(directory, options.dim)
        write_openvino(directory)

    return EngineFiles(engine=OpenVino(), write=write, dim=options.dim)


def _gguf(options: ExportOptions) -> EngineFiles:
    if options.dim is not None:
        raise ConfigError("--dim: llama.cpp returns all components; cut them where the vectors are used, or use "
                          "--format onnx")
    kind = options.gguf_type
    return gguf_files(kind, lambda directory: write_gguf(directory, gguf_file(directory, kind), kind))


def gguf_files(kind: GgufType | None, write: Callable[[Path], None] = lambda directory: None) -> EngineFiles:
    """llama.cpp with the bounds of a type of weights; None, another one: those of float32."""
    return EngineFiles(engine=LlamaCpp(), limits="llama.cpp", tidy=_without_weights, fits=fits, cuts="none",
                       write=write, minimum_cosine=GGUF_COSINE[kind or "f32"],
                       score_tolerance=0.0 if kind in (None, "f32") else GGUF_SCORE)


def _without_weights(directory: Path) -> None:
    """Leave the GGUF file with what says how it is used: prompts, lengths, pooling, tokenizer."""
    for file in (*directory.glob("*.safetensors"), *directory.glob("*.safetensors.index.json")):
        file.unlink()


ENGINE_FILES: Mapping[ExportFormat, Callable[[ExportOptions], EngineFiles]] = {
    "onnx": _onnx, "openvino": _openvino, "gguf": _gguf}
