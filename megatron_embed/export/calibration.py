"""Real texts that 8-bit integers are calibrated on, of a graph or of vectors: rows of the training data, or of a
file."""

from collections.abc import Sequence
from pathlib import Path

from megatron_embed.config.data import TrainFile
from megatron_embed.config.load import load_config
from megatron_embed.convert.checkpoint_directory import is_checkpoint, open_checkpoint
from megatron_embed.data.beir import is_beir_folder
from megatron_embed.data.dataset import BeirFile, RecordFile, RecordSet, open_records
from megatron_embed.data.records import AnyRecord, Record
from megatron_embed.errors import ConfigError, UserError
from megatron_embed.evaluation.encode import TextEncoder
from megatron_embed.evaluation.search import for_similarity
from megatron_embed.evaluation.stored_vectors import CALIBRATION_VECTORS, Ranges, ranges_of
from megatron_embed.names import Similarity

CALIBRATION_ROWS = 256
"""Rows that are taken, evenly spaced."""

CalibrationRows = Sequence[tuple[str, str]]
"""Query and document of each row, without prompts."""

_REMEDY = "give --calibration FILE, rows such as those that a run trains on (docs/data.md)"


def calibration_rows(source: str, file: str | None) -> CalibrationRows:
    """Rows of `file`; None: of `data.train` of the run that wrote the checkpoint `source`.

    Raises:
        ConfigError: there is no such file, or the run's are not there.
        DataError: a row cannot be used.
    """
    if file is not None:
        entry = TrainFile(path=file)
        return sample_rows(RecordSet([BeirFile(entry, None) if is_beir_folder(file) else
                                      RecordFile(entry, None, "--calibration", columns_key=None)]))
    config = open_checkpoint(source).path / "config.yaml" if is_checkpoint(Path(source)) else None
    if config is None or not config.is_file():
        raise ConfigError(f"--quantize: {source} is not the checkpoint of a run, whose training rows would be used to "
                          f"calibrate; {_REMEDY}")
    try:
        return sample_rows(open_records(load_config(str(config), []).data.train, None))
    except UserError as error:
        raise ConfigError(f"--quantize: the rows that {source} was trained on cannot be read ({error}); "
                          f"{_REMEDY}") from error


def ranges_of_documents(encoder: TextEncoder, records: RecordSet, dims: Sequence[int], *, unit_length: bool) -> Ranges:
    """Ranges of the vectors of up to CALIBRATION_VECTORS documents, whole and truncated to each of `dims`.

    Called by all ranks. `unit_length`: truncated vectors are scaled to unit length again.
    """
    vectors = encoder.encode(sample_documents(records, CALIBRATION_VECTORS), "document")
    similarity: Similarity = "cosine" if unit_length else "dot"
    return {width: ranges_of(for_similarity(vectors[:, :width], similarity))
            for width in dict.fromkeys((encoder.dim, *dims))}


def sample_documents(records: RecordSet, most: int) -> list[str]:
    """Up to `most` different documents of rows evenly spaced over the records, as many of each row; one of each, in
    turn, where there are more rows."""
    count = min(len(records), most)
    texts: dict[str, None] = {}
    for index in range(count):
        documents = _documents(records[index * len(records) // count])
        chosen = range(index, index + min(len(documents), most // count))
        texts |= dict.fromkeys(documents[turn % len(documents)] for turn in chosen)
    return list(texts)


def sample_rows(records: RecordSet, most: int = CALIBRATION_ROWS) -> CalibrationRows:
    """Rows evenly spaced over the records."""
    count = min(len(records), most)
    return [_pair(records[index * len(records) // count], index) for index in range(count)]


def _pair(record: AnyRecord, index: int) -> tuple[str, str]:
    """The query and one of its documents, in turn, so that a reranker sees negatives too."""
    documents = _documents(record)
    return record.query, documents[index % len(documents)]


def _documents(record: AnyRecord) -> tuple[str, ...]:
    return (*record.positive, *record.negatives) if isinstance(record, Record) else tuple(record.documents)
