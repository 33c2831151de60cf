"""Causes of other rows than sampler and seed give."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_embed.audit.case import Case, Cause
from megatron_embed.data.mixture import MixtureSampler, build_sampler
from megatron_embed.errors import ConfigError
from megatron_embed.platform.terminal_text import counted
from megatron_embed.training.fingerprints import hash_of, in_order, row_hashes

_STEPS_AROUND = 2000
"""Steps before and after whose rows are looked at."""
_STEPS_AFTER = 4
"""Steps after the different one that tell a shift of all steps from another choice among data sets."""
_MODULUS = 2**64
_SEEDS = (0, 1, 2, 3, 7, 42, 123, 1234, 12345, 2024, 2025, 2026)
"""Seeds that people choose."""


def explain(case: Case) -> list[Cause]:
    """The causes that give the logged hashes of rows."""
    if case.difference.values and all(name.startswith("data.train") for name in case.difference.values):
        return [Cause(name="changed data", text="data.train holds other rows than when the run was started: "
                      + ", ".join(f"{name} {logged} then, {now} now"
                                  for name, (logged, now) in case.difference.values.items()))]
    return next(([cause] for cause in _candidates(case)), [])


def _candidates(case: Case) -> Iterator[Cause]:
    sampler, record = case.replay.inputs.sampler, case.record
    rows = np.array(sampler.rows_of_step(case.step - 1), dtype=np.int64)
    yield from _other_step(case, rows)
    if hash_of(record, "row_set") == _set(rows):
        yield from _other_order(case, rows)
        return
    yield from _one_row(case, rows)
    yield from _shares(case, rows)
    unshuffled = np.arange((case.step - 1) * len(rows), case.step * len(rows)) % sampler.num_rows
    for seed in dict.fromkeys((*_SEEDS, case.replay.inputs.config.training.seed + 1)):
        inputs = case.replay.inputs
        sampler = build_sampler(inputs.records, inputs.config.data, seed=seed, order=inputs.order,
                                global_batch_size=inputs.config.training.global_batch_size)
        if _set(np.array(sampler.rows_of_step(case.step - 1))) == hash_of(record, "row_set"):
            yield Cause(name="wrong seed", text=f"the rows are those of training.seed = {seed}, not of "
                        f"{inputs.config.training.seed}")
            return
    if _set(unshuffled) == hash_of(record, "row_set"):
        yield Cause(name="rows not shuffled", text="the step took the rows in the order of the files, without "
                    "data.shuffle")


def _set(rows: NDArray[np.int64]) -> int:
    return int(row_hashes(rows).sum())


def _order(rows: NDArray[np.int64]) -> int:
    return int(in_order(row_hashes(rows), np.arange(len(rows))))


def _other_step(case: Case, rows: NDArray[np.int64]) -> Iterator[Cause]:
    """The rows are those of another step."""
    wanted, sampler = hash_of(case.record, "row_set"), case.replay.inputs.sampler
    for distance in range(1, _STEPS_AROUND):
        for step in (case.step - distance, case.step + distance):
            if step > 0 and _set_of_step(case, step) == wanted:
                resumed = max(done for done in case.log.starts if done < case.step)
                since = f" since the resume after step {resumed}" if resumed else ""
                if isinstance(sampler, MixtureSampler) and not _are_shifted(case, step - case.step):
                    taken, due = (case.replay.inputs.records.files[sampler.set_of_step(number - 1)].path
                                  for number in (step, case.step))
                    yield Cause(name="other shares of the data sets", text=f"the rows are of {taken} (those that it "
                                f"has at step {step}), and it is the turn of {due}: the steps from here on are divided "
                                f"among the data sets otherwise, as by other weights{since}")
                    return
                apart = counted(abs(distance), "step")
                yield Cause(name="wrong order of rows", text=f"the rows are those of step {step}, {apart} "
                            f"{'before' if step < case.step else 'after'} the right ones{since}")
                return


def _set_of_step(case: Case, step: int) -> int | None:
    """Hash of the set of rows of a step, from 1; None: there is no such step."""
    try:
        return _set(np.array(case.replay.inputs.sampler.rows_of_step(step - 1)))
    except ConfigError:
        return None  # behind the last one of data sets with max_epochs


def _are_shifted(case: Case, distance: int) -> bool:
    """Whether the steps that the log has next took the rows of the step so many places away as well."""
    following = [case.log.steps[step] for step in range(case.step + 1, case.step + 1 + _STEPS_AFTER)
                 if step in case.log.steps]
    return all(hash_of(record, "row_set") == _set_of_step(case, record["step"] + distance) for record in following)


def _other_order(case: Case, rows: NDArray[np.int64]) -> Iterator[Cause]:
    """The right rows in another order within the global batch."""
    shares, wanted = np.split(rows, case.dp_size), hash_of(case.record, "row_order")
    for turn in range(1, case.dp_size):
        if _order(np.concatenate([*shares[turn:], *shares[:turn]])) == wanted:
            yield Cause(name="shares of ranks exchanged", text=f"data-parallel rank r trained on the rows of rank r + "
                        f"{turn}")
            return
    yield Cause(name="rows in another order", text="the rows are the right ones, in another order within the step")


def _one_row(case: Case, rows: NDArray[np.int64]) -> Iterator[Cause]:
    """A row is missing, there twice, or another one in its place."""
    hashes, record = row_hashes(rows), case.record
    difference = (hash_of(record, "row_set") - _set(rows)) % _MODULUS
    positions = {int(value): position for position, value in enumerate(hashes)}
    source = case.replay.inputs.records
    missing = record["rows"] - len(rows)
    if missing == -1 and (position := positions.get(-difference % _MODULUS)) is not None:
        yield Cause(name="dropped row", text=f"{_name(case, rows, position)} was left out of the step")
    if missing == 1:
        for row, value in _all_rows(len(source)):
            if value == difference:
                twice = " a second time" if row in rows.tolist() else ""
                yield Cause(name="duplicated row" if twice else "additional row",
                            text=f"row {row} ({source[row].source}) was taken{twice} besides the step's own")
    if missing:
        return
    wanted = {(difference + int(value)) % _MODULUS: position for position, value in enumerate(hashes)}
    for value, position in positions.items():
        if (lost := wanted.get(value)) is not None:
            yield Cause(name="duplicated row", text=f"{_name(case, rows, position)} was taken twice, and "
                        f"{_name(case, rows, lost)} was dropped for it")
            return
    for row, value in _all_rows(len(source)):
        if (lost := wanted.get(value)) is not None:
            yield Cause(name="wrong row", text=f"row {row} ({source[row].source}) was taken in place of "
                        f"{_name(case, rows, lost)}")
            return


def _shares(case: Case, rows: NDArray[np.int64]) -> Iterator[Cause]:
    """A rank trained on the rows of another one."""
    shares, wanted = np.split(rows, case.dp_size), hash_of(case.record, "row_set")
    for rank in range(case.dp_size):
        if _set(rows) - _set(shares[rank]) - wanted in (0, -_MODULUS):
            yield Cause(name="rank without rows", text=f"the rows of data-parallel rank {rank} are missing")
        for other in range(case.dp_size):
            taken = [shares[other] if index == rank else share for index, share in enumerate(shares)]
            if rank != other and _set(np.concatenate(taken)) == wanted:
                yield Cause(name="rank with another rank's rows", text=f"data-parallel rank {rank} trained on the rows "
                            f"of rank {other} instead of its own")
                return
    yield from _micro_batch(case, rows)
    if _set(np.concatenate([shares[0]] * case.dp_size)) == wanted and case.dp_size > 1:
        yield Cause(name="rank with another rank's rows", text="all data-parallel ranks trained on the rows of rank 0")


def _micro_batch(case: Case, rows: NDArray[np.int64]) -> Iterator[Cause]:
    """The rows of a micro-batch were taken in place of another one's."""
    training = case.replay.inputs.config.training
    if training.micro_batch_tokens is None:
        parts = [_set(part) for part in np.split(rows, len(rows) // training.micro_batch_size)]
        yield from repeated_micro_batch(case, parts, hash_of(case.record, "row_set"))


def repeated_micro_batch(case: Case, parts: Sequence[int], wanted: int) -> Iterator[Cause]:
    """A micro-batch of a rank, or of every rank, in place of another one of its own, or of another rank's.

    Args:
        parts: hash of each micro-batch of all ranks.
        wanted: hash of the step as it was.
    """
    per_rank, total = len(parts) // case.dp_size, sum(parts)
    of_all = [sum(parts[index::per_rank]) % _MODULUS for index in range(per_rank)]
    for values, every in ((parts, False), (of_all, True)):
        places = {value: index for index, value in enumerate(values)}
        for lost, value in enumerate(values):
            if (taken := places.get((wanted - total + value) % _MODULUS, lost)) != lost:
                rank = "every data-parallel rank" if every else f"data-parallel rank {taken // per_rank}"
                other = "" if every else f" of data-parallel rank {lost // per_rank}"
                yield Cause(name="duplicated micro-batch", text=f"micro-batch {taken % per_rank + 1} of {rank} was "
                            f"there twice, in place of micro-batch {lost % per_rank + 1}{other}")
                return


def _all_rows(count: int) -> Iterator[tuple[int, int]]:
    """(row, its hash) of all rows of the data, computed in blocks."""
    for first in range(0, count, 1 << 16):
        block = np.arange(first, min(count, first + (1 << 16)))
        yield from zip(block.tolist(), row_hashes(block).tolist(), strict=True)


def _name(case: Case, rows: NDArray[np.int64], position: int) -> str:
    row = int(rows[position])
    return (f"row {row} ({case.replay.inputs.records[row].source}, of data-parallel rank "
            f"{position // (len(rows) // case.dp_size)})")
