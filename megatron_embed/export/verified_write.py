"""The order of every export: written beside its name, completed, verified, noted, and then given its name."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_embed.errors import CheckpointError, UserError
from megatron_embed.export.verify import available_memory, weight_bytes
from megatron_embed.names import GgufType, GraphQuantization, ModelDtype
from megatron_embed.parallel.collectives import raise_on_all_ranks

if TYPE_CHECKING:
    from megatron_embed.export.engines.files import EngineFiles

logger = logging.getLogger(__name__)

_WORKING_COPIES = 2.5
"""Memory, in sizes of the export, that comparing takes: our model while it is loaded, then the library's."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How `convert megatron-to-hf` writes, whatever the format."""

    max_shard_size: str = "5GB"
    """Largest weight file."""
    dtype: ModelDtype | None = None
    """Dtype of the written weights; None: the checkpoint's."""
    compare: bool = True
    """Load the result with the stock library and compare it with the checkpoint on texts."""
    merge_lora: bool = False
    """Write the checkpoint's adapters into the weights; the vectors compared are those of the model with adapters."""

    gguf_type: GgufType = "f32"
    """Weights of --format gguf."""
    dim: int | None = None
    """Components of the vector in an ONNX graph, matryoshka's cut; None: all."""
    quantize: GraphQuantization | None = None
    """Numbers that the graph multiplies in; None: float32."""
    calibration: str | None = None
    """File of rows that a quantized graph is calibrated on; None: the training rows of the run."""

    @property
    def weights(self) -> dict[str, Any]:
        """The arguments of `megatron_to_hf` that say how weights are written."""
        return {"max_shard_size": self.max_shard_size, "dtype": self.dtype, "merge_lora": self.merge_lora}


@dataclass(frozen=True, kw_only=True)
class WantedExport:
    """A directory that a run exports to."""

    destination: str
    note: Callable[[Path], None]
    """See `export`."""
    addition: "EngineFiles | None" = None
    """Files of another engine, whose results are compared as well."""

    def complete(self, directory: Path) -> None:
        """Adds the engine's files."""
        if self.addition is not None:
            self.addition.write(directory)

    def finish(self, directory: Path) -> None:
        """Takes out what the engine does not need, and adds the card."""
        if self.addition is not None:
            self.addition.tidy(directory)
        self.note(directory)


def export(write: Callable[..., object], *, verify: Callable[[Path], Sequence[str]], note: Callable[[Path], None],
           complete: Callable[[Path], None] = lambda directory: None) -> list[str]:
    """Writes one export; the lines of its report, the last one about what was written.

    Args:
        write: `megatron_to_hf` or `write_peft` with all arguments but `finish`, which it calls with the directory
            before that gets its name. If anything raises there, nothing is left behind.
        complete: adds the files of the stock library.
        verify: compares the complete directory with the trained model; the lines of the report about it. Raises
            CheckpointError for another model.
        note: adds the model card, when nothing is left to do but to give the export its name.
    """
    lines: list[str] = []

    def finish(directory: Path) -> None:
        complete(directory)
        lines.extend(verify(directory))
        note(directory)

    written = str(write(finish=finish))
    return [*lines, written]


def export_on_rank_0(exports: Mapping[str, Callable[[], list[str]]]) -> None:
    """Logs the report of every export, which rank 0 alone makes, in order. Called by all ranks; every rank raises the
    first error, after which no further export is made.

    Args:
        exports: by destination.
    Raises:
        CheckpointError: an export differs from the model, or cannot be written; nothing of it is left behind.
    """
    failure: UserError | None = None
    if dist.get_rank() == 0:
        for destination, run_export in exports.items():
            failure = failure or _error_of(destination, run_export)
    raise_on_all_ranks(failure)


def _error_of(destination: str, run_export: Callable[[], list[str]]) -> UserError | None:
    """Makes one export and logs its report; what was wrong with it, if anything."""
    try:
        *comparisons, written = run_export()
    except UserError as error:
        return error
    except OSError as error:
        return CheckpointError(f"{destination}: the export cannot be written ({error.strerror or error}); look "
                               "at the disk, then start the run again: it resumes from its checkpoint")
    for line in comparisons:
        logger.info("%s", line)
    logger.info("exported %s", written)
    return None


def why_not_compared(directory: Path, options: ExportOptions) -> str:
    """The line of the report that says why an export is not loaded; empty if it is."""
    if not options.compare:
        return "not loaded with the stock library and compared on texts (--no-compare)"
    from megatron_embed.data.vocabulary import has_tokenizer_files

    if not has_tokenizer_files(directory):
        return "not compared on texts: there are no tokenizer files"
    return why_no_memory(directory)


def why_no_memory(directory: Path) -> str:
    """The line of the report that says that a model cannot be loaded twice; empty if it can."""
    needed, available = _WORKING_COPIES * weight_bytes(directory), available_memory()
    if needed > available:
        return (f"not loaded with the stock library and compared on texts: that takes {needed / 1e9:.1f} GB of memory, "
                f"{available / 1e9:.1f} GB are available")
    return ""
