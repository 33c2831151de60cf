"""The files of engines that an export gets beside Hugging Face's, each with the comparison of the engine's results."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_embed.errors import CheckpointError, ConfigError
from megatron_embed.export.engines.base import Engine
from megatron_embed.export.engines.graph import write_graph
from megatron_embed.export.engines.llama_cpp import LlamaCpp, fits, gguf_file, write_gguf
from megatron_embed.export.engines.onnx_runtime import OnnxRuntime, OpenVino, write_openvino
from megatron_embed.export.verified_write import ExportOptions
from megatron_embed.export.verify import Report, compare_vectors, relative_errors
from megatron_embed.names import ExportFormat, Role

GGUF_COSINE = {"f32": 0.9999, "f16": 0.9999, "bf16": 0.999, "q8_0": 0.999}
"""Between the engine's and the model's vector in memory, for every text, by the weights' type."""


@dataclass(frozen=True, kw_only=True)
class EngineFiles:
    """What one format adds to an export."""

    engine: Engine
    write: Callable[[Path], None]
    """Adds the files to the complete directory."""
    tidy: Callable[[Path], None] = lambda directory: None
    """Takes out what the format does not need, after the comparison."""
    minimum_cosine: float = 1.0
    """That the engine must reach where the weights are coarser than the model's."""
    maximum_error: float = 0.0
    """Difference of a score, relative to max(1, |score|), that the engine may have where it computes more coarsely."""
    dim: int | None = None
    """Components of the engine's vectors; None: all."""
    fits: Callable[[Path, str, Role], bool] = lambda directory, text, role: True
    """Whether the engine takes a text of this length; what is too long, llama.cpp refuses."""

    def compare_vectors(self, directory: Path, texts: Sequence[str], ours: Tensor, role: Role,
                        minimum_cosine: float) -> Report:
        """The report on the engine's vectors of texts of a role. Raises CheckpointError for another model."""
        minimum = min(minimum_cosine, self.minimum_cosine)
        chosen = [index for index, text in enumerate(texts) if self.fits(directory, text, role)]
        texts, ours = [texts[index] for index in chosen], ours[chosen]
        if self.dim is not None:
            ours = ours[:, : self.dim]
            ours = ours / ours.norm(dim=1, keepdim=True)
        return compare_vectors(directory, self.engine.name, texts, self.engine.vectors(directory, texts, role), ours,
                               minimum)

    def compare_scores(self, directory: Path, pairs: Sequence[tuple[str, str]], ours: Tensor, tolerance: float) -> str:
        """The report on the engine's scores. Raises CheckpointError for another model."""
        tolerance = max(tolerance, self.maximum_error)
        errors = relative_errors(directory, self.engine.name, self.engine.scores(directory, pairs), ours)
        if not errors.max() <= tolerance:
            worst = int(errors.argmax())
            raise CheckpointError(f"{directory}: {self.engine.name}'s score of pair {worst} ({pairs[worst][0][:40]!r}) "
                                  f"differs by {float(errors[worst]):.2e}, more than {tolerance}; the export must not "
                                  "be used")
        return str(Report(library=self.engine.name, results="scores", count=len(pairs),
                          max_difference=float(errors.max())))


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
    return EngineFiles(engine=LlamaCpp(), tidy=_without_weights, minimum_cosine=GGUF_COSINE[kind], fits=fits,
                       write=lambda directory: write_gguf(directory, gguf_file(directory, kind), kind))


def _without_weights(directory: Path) -> None:
    """Leave the GGUF file with what says how it is used: prompts, lengths, pooling, tokenizer."""
    for file in (*directory.glob("*.safetensors"), *directory.glob("*.safetensors.index.json")):
        file.unlink()


ENGINE_FILES: Mapping[ExportFormat, Callable[[ExportOptions], EngineFiles]] = {
    "onnx": _onnx, "openvino": _openvino, "gguf": _gguf}
