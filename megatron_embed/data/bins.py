"""Which rows share a micro-batch under a token budget."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def bins_of_rows(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Rows in bins of at most `tokens`: the longest first, each into the fullest bin that still holds it.

    Args:
        lengths: tokens of each row, none above `tokens`.
        tokens: of a bin.
    Returns:
        Row numbers per bin, ascending; the same for the same lengths.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        place = bisect_left(room, (lengths[row], 0))
        left, number = room.pop(place) if place < len(room) else (tokens, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(row)
        insort(room, (left - lengths[row], number))
    return [sorted(rows) for rows in bins]


def bins_of_groups(groups: Sequence[Sequence[int]], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Whole groups of rows in bins of at most `tokens`, in order: a bin ends where the next group does not fit.

    Not sorted by length, which would make the texts of a bin alike and so choose its negatives.
    """
    bins: list[list[int]] = []
    filled = 0
    for group in groups:
        size = sum(lengths[row] for row in group)
        if not bins or filled + size > tokens:
            bins.append([])
            filled = 0
        bins[-1] += group
        filled += size
    return [sorted(rows) for rows in bins]
