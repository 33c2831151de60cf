"""Several data sets, one of them per global batch: whose turn a step is follows from the step and the shares alone."""

import math
from array import array
from collections.abc import Sequence

import numpy as np

from megatron_embed.config.data import DataConfig
from megatron_embed.data.dataset import RecordSet
from megatron_embed.data.records import ANY_NUMBER
from megatron_embed.data.sampler import GlobalBatchSampler
from megatron_embed.errors import ConfigError


def turn_shares(sizes: Sequence[int], weights: Sequence[float], sampling_temperature: float) -> list[float]:
    """Share of the steps of each data set: weight * rows^(1/sampling_temperature), scaled to a sum of 1.

    The temperature is that of multilingual pretraining (Devlin et al. 2019, multilingual BERT; Conneau et al. 2020,
    arXiv:1911.02116, there as the exponent alpha).
    """
    raw = [weight * size ** (1 / sampling_temperature) for size, weight in zip(sizes, weights, strict=True)]
    return [value / sum(raw) for value in raw]


class MixtureSampler:
    """Row numbers of every optimizer step, all of one data set, which takes its turns by its share.

    A step goes to the data set that is furthest behind its share, the first of these where several are: after any
    number of steps each has had its share to within one turn or two. Each set has a `GlobalBatchSampler` of its own,
    whose steps are its turns.

    Raises:
        ConfigError: the global batch is larger than one of the sets.
    """

    def __init__(self, records: RecordSet, *, shares: Sequence[float], global_batch_size: int, seed: int,
                 num_negatives: int = 0) -> None:
        for file in records.files:
            if global_batch_size > len(file):
                raise ConfigError(f"training.global_batch_size = {global_batch_size} is larger than the {len(file)} "
                                  f"rows of {file.path}, and a global batch is of one data set; lower it, add rows, or "
                                  "set data.mixed_batches: true", key="training.global_batch_size")
        self.num_rows = len(records)
        self.global_batch_size = global_batch_size
        self._samplers = [GlobalBatchSampler(file, global_batch_size=global_batch_size, shuffle=True, seed=seed,
                                             num_negatives=num_negatives) for file in records.files]
        self._first_rows = [records.first_row(number) for number in range(len(records.files))]
        self._shares = np.array(shares)
        self._turns = np.zeros(len(shares))
        self._sets, self._steps = array("H"), array("q")

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that take as many rows as there are, the last incomplete one counted whole."""
        return math.ceil(self.num_rows / self.global_batch_size)

    def steps_of_epochs(self, epochs: float) -> int:
        """Optimizer steps that take so many times the rows there are, rounded up once at the end, >= 1."""
        return max(1, math.ceil(round(epochs * self.num_rows / self.global_batch_size, 6)))

    @property
    def num_forced_duplicates(self) -> int:
        """Rows put beside an equal text because nothing else was left, in the epochs reached so far."""
        return sum(sampler.num_forced_duplicates for sampler in self._samplers)

    def set_of_step(self, step: int) -> int:
        """Number of the data set whose turn step `step` >= 0 is."""
        while len(self._sets) <= step:
            behind = self._shares * (len(self._sets) + 1) - self._turns
            number = int(np.argmax(np.round(behind, 9)))
            self._sets.append(number)
            self._steps.append(int(self._turns[number]))
            self._turns[number] += 1
        return self._sets[step]

    def rows_of_step(self, step: int) -> list[int]:
        """The `global_batch_size` row numbers, in the whole data, of optimizer step `step` >= 0."""
        number = self.set_of_step(step)
        first = self._first_rows[number]
        return [first + row for row in self._samplers[number].rows_of_step(self._steps[step])]


Sampler = GlobalBatchSampler | MixtureSampler


def build_sampler(records: RecordSet, config: DataConfig, *, global_batch_size: int, seed: int) -> Sampler:
    """The order in which a run takes its rows.

    Raises:
        ConfigError: the global batch is larger than the data it comes from.
    """
    num_negatives = ANY_NUMBER if config.samples_documents else config.num_negatives
    if len(records.files) == 1 or config.mixed_batches or not config.shuffle:
        return GlobalBatchSampler(records, global_batch_size=global_batch_size, shuffle=config.shuffle, seed=seed,
                                  num_negatives=num_negatives)
    shares = turn_shares([len(file) for file in records.files], [file.file.weight for file in records.files],
                         config.sampling_temperature)
    return MixtureSampler(records, shares=shares, global_batch_size=global_batch_size, seed=seed,
                          num_negatives=num_negatives)
