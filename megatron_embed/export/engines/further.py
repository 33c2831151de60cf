"""The files of the formats that a run exports to besides its own, by their names in `checkpoint.export_formats`."""

from typing import cast

from megatron_embed.export.calibration import CalibrationRows
from megatron_embed.export.engines.files import ENGINE_FILES, EngineFiles
from megatron_embed.export.engines.int8 import int8_files
from megatron_embed.export.verified_write import ExportOptions
from megatron_embed.names import ExportFormat, FurtherExport, GgufType


def further_files(kind: FurtherExport, rows: CalibrationRows) -> EngineFiles:
    """The files that a format adds to an export.

    Args:
        rows: to calibrate 8-bit integers on.
    """
    name, _, weights = kind.partition("-")
    engine = cast(ExportFormat, name)
    if weights == "int8":
        return int8_files(engine, ExportOptions(), rows)
    return ENGINE_FILES[engine](ExportOptions(gguf_type=cast(GgufType, weights)) if weights else ExportOptions())
