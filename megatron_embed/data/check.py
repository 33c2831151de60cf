"""Counts of training data, to look at before a run: rows, duplicates, lengths in tokens."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_embed.data.dataset import DataEntry, RecordSet
from megatron_embed.data.records import AnyRecord, Record, id_on_both_sides, text_id

_CHUNK_ROWS = 2048
_SMALLEST_BIN = 16
PAIRS = "pair tokens"
"""Name of the lengths of a reranker's pairs."""

Counts = dict[str, Any]


class TokenCounter(Protocol):
    """Lengths, in tokens before truncation, of all that training reads of rows."""

    @property
    def limits(self) -> Mapping[str, int]:
        """By name of the lengths, tokens to which training truncates."""

    def lengths(self, rows: Sequence[AnyRecord]) -> Mapping[str, list[int]]:
        """The lengths, by the same names."""


def check_records(records: RecordSet, *, num_negatives: int = 0, counter: TokenCounter | None = None) -> list[Counts]:
    """Counts of each entry, which `describe` prints; docs/data.md explains them.

    Args:
        records: opened, so every row can be used.
        num_negatives: rows with fewer are counted.
        counter: None: no tokens are counted.
    """
    return [_check_entry(file, num_negatives, counter) for file in records.files]


def _check_entry(file: DataEntry, num_negatives: int, counter: TokenCounter | None) -> Counts:
    hashes: dict[str, list[int]] = {"query": [], "first positive": []}
    limits: Mapping[str, int] = {} if counter is None else counter.limits
    lengths: dict[str, list[int]] = {name: [] for name in limits}
    names = ("pairs with a score", "lists with labels", "rows without negatives",
             "rows with fewer negatives than data.num_negatives", "rows whose positive is one of their negatives",
             "rows with one id for a positive and a negative (training refuses them)")
    counts = {"rows": len(file), **dict.fromkeys(names, 0)}
    for part in _parts(file):
        for record in part:
            hashes["query"].append(text_id(record.query))
            counts[names[-1]] += id_on_both_sides(record) is not None
            if not isinstance(record, Record):
                counts["lists with labels"] += 1
                continue
            hashes["first positive"].append(text_id(record.positive[0]))
            if record.score is not None:
                counts["pairs with a score"] += 1
                continue
            counts["rows without negatives"] += not record.negatives
            counts["rows with fewer negatives than data.num_negatives"] += len(record.negatives) < num_negatives
            counts["rows whose positive is one of their negatives"] += not set(record.positive).isdisjoint(
                record.negatives)
        if counter is not None:
            for name, counted in counter.lengths(part).items():
                lengths[name] += counted
    result: Counts = {"path": file.path, **counts,
                      "rows whose query an earlier row has": _repeated(hashes["query"]),
                      "rows that share their positive with another": _shared(hashes["first positive"])}
    return result | {name: _distribution(np.array(lengths[name], dtype=np.int64), limit)
                     for name, limit in limits.items()}


def _parts(file: Sequence[AnyRecord]) -> Iterator[list[AnyRecord]]:
    rows = iter(file)
    while part := list(islice(rows, _CHUNK_ROWS)):
        yield part


def _repeated(hashes: list[int]) -> int:
    return len(hashes) - len(set(hashes))


def _shared(hashes: list[int]) -> int:
    _, occurrences = np.unique(np.array(hashes, dtype=np.int64), return_counts=True)
    return int(occurrences[occurrences > 1].sum())


def _distribution(lengths: NDArray[np.int64], max_length: int) -> Counts:
    """Statistics of lengths before truncation. Each bin of the histogram is twice as wide as the one before it, and is
    named by its largest length."""
    if not lengths.size:
        return {"texts": 0}
    median, p95, p99 = (int(value) for value in np.percentile(lengths, [50, 95, 99], method="higher"))
    histogram, low, high = {}, -1, _SMALLEST_BIN
    while low < lengths.max():
        histogram[f"<= {high}"] = int(((lengths > low) & (lengths <= high)).sum())
        low, high = high, 2 * high
    return {"texts": len(lengths), "mean": round(float(lengths.mean()), 1), "median": median, "p95": p95, "p99": p99,
            "longest": int(lengths.max()), "cut": int((lengths > max_length).sum()), "at": max_length,
            "without tokens": int((lengths == 0).sum()), "histogram": histogram}


def describe(counts: Counts) -> str:
    """The counts of one entry as lines of text; counts of zero are left out."""
    lines = [f"{counts['path']}: {counts['rows']} rows"]
    for name, value in counts.items():
        if isinstance(value, dict) and value["texts"]:
            what, limit = ("pairs", f"reranker.max_length = {value['at']}") if name == PAIRS else (
                "texts", value["at"])
            lines.append(f"  {name}: mean {value['mean']}, median {value['median']}, 95% {value['p95']}, 99% "
                         f"{value['p99']}, longest {value['longest']}; {value['cut']} of {value['texts']} {what} are "
                         f"cut at {limit}, {value['without tokens']} have no tokens")
            most = max(value["histogram"].values())
            lines += [f"    {bin_:>9} {count:>9} {'#' * -(-40 * count // most)}"
                      for bin_, count in value["histogram"].items()]
        elif name not in ("path", "rows") and not isinstance(value, dict) and value:
            lines.append(f"  {name}: {value} ({value / counts['rows']:.1%})")
    return "\n".join(lines)
