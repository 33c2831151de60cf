"""What mining did, in words: the scores of positives and negatives, what each filter skipped, sample rows."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_embed.data.records import Record
from megatron_embed.mining.filters import EXCLUDED, NOT_NEEDED, OUT_OF_RANGE, MiningOptions
from megatron_embed.mining.task import Mined, MinedRows, MiningTask

ROWS = ("count", "mean", "deviation", "minimum", "quantile 25 %", "median", "quantile 75 %", "maximum")
TEXT_WIDTH = 100
"""Characters of a sample's text."""


def report(mined: Sequence[Mined], options: MiningOptions) -> str:
    """A table of the scores over all queries, then what was skipped."""
    positive, negative, difference = _scores(mined)
    columns = {"positive": positive, "negative": negative, "difference": difference}
    lines = ["scores of the queries' positives and negatives; difference: lowest positive of the query minus negative",
             f"{'':<14}" + "".join(f"{name:>12}" for name in columns)]
    lines += [f"{row:<14}" + "".join(f"{cells[index]:>12}" for cells in map(_cells, columns.values()))
              for index, row in enumerate(ROWS)]
    return "\n".join([*lines, *_skipped(mined, options)])


def samples(records: Sequence[Record], task: MiningTask, mined: Sequence[Mined], count: int,
            least_negatives: int = 0) -> str:
    """`count` rows, spread evenly over those that are written, with their positives and negatives and the scores of
    these; rows with fewer negatives than `least_negatives` are not written."""
    lines = []
    rows = [row for row, query in enumerate(task.query_of_row) if len(mined[query].negatives) >= least_negatives]
    for row in np.unique(np.take(rows, np.linspace(0, len(rows) - 1, count).round().astype(int))).tolist():
        record, query = records[row], task.query_of_row[row]
        result = mined[query]
        score_of = {task.documents[document]: score
                    for document, score in zip(task.positives[query], result.positive_scores, strict=True)}
        lines.append(f"{record.source}: {_shortened(record.query)}")
        lines += [f"  + {score_of[text]:.4f}  {_shortened(text)}" for text in record.positive]
        lines += [f"  - {score:.4f}  {_shortened(task.documents[document])}" for document, score in result.negatives]
    return "\n".join(lines)


def _scores(mined: Sequence[Mined]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Scores of all positives, of all negatives, and by how much the query's lowest positive exceeds each negative."""
    positive = np.concatenate([np.asarray(result.positive_scores, dtype=np.float64) for result in mined])
    negatives = [np.asarray([score for _, score in result.negatives], dtype=np.float64) for result in mined]
    difference = np.concatenate([min(result.positive_scores) - own
                                 for result, own in zip(mined, negatives, strict=True)])
    return positive, np.concatenate(negatives), difference


def _cells(values: NDArray[np.float64]) -> list[str]:
    """The cells of a column in the order of ROWS."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    numbers = (values.mean(), values.std(), values.min(), low, middle, high, values.max())
    return [f"{len(values):,}", *(f"{value:.4f}" for value in numbers)]


def _skipped(mined: Sequence[Mined], options: MiningOptions) -> list[str]:
    """A line for each reason to skip candidates, with their number."""
    skipped = mined.skipped if isinstance(mined, MinedRows) else sum((Counter(result.skipped) for result in mined),
                                                                     Counter[str]())
    bounds = {"--max-score": options.max_score, "--absolute-margin": options.absolute_margin,
              "--relative-margin": options.relative_margin, "--min-score": options.min_score,
              "--range-min": options.range_min}
    words = {EXCLUDED: "positives, other forms of them, or the query's own text",
             **{option: f"{option} {bound:g}" for option, bound in bounds.items() if bound is not None},
             OUT_OF_RANGE: "after --range-max", NOT_NEEDED: f"more than --num-negatives {options.num_negatives}"}
    return ["candidates skipped:", *(f"{skipped[reason]:>12,}  {words[reason]}" for reason in words if skipped[reason])]


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= TEXT_WIDTH else line[:TEXT_WIDTH] + " ..."
