"""Several data sets, one of them per global batch: a step's data set follows from the step and the shares alone."""

from array import array
from collections.abc import Sequence

import numpy as np

from megatron_embed.config.data import DataConfig
from megatron_embed.data.dataset import RecordSet
from megatron_embed.data.epoch_sampler import EpochSampler
from megatron_embed.data.records import ANY_NUMBER, AnyRecord, Records
from megatron_embed.data.sampler import ORDER_VERSION, GlobalBatchSampler, Sampler
from megatron_embed.errors import ConfigError


def turn_shares(sizes: Sequence[int], weights: Sequence[float], sampling_temperature: float) -> list[float]:
    """Fraction of the steps for each data set: weight * rows^(1/sampling_temperature), scaled to a sum of 1.

    The temperature is that of multilingual pretraining (Devlin et al. 2019, multilingual BERT; Conneau et al. 2020,
    arXiv:1911.02116, there as the exponent alpha).
    """
    raw = [weight * size ** (1 / sampling_temperature) for size, weight in zip(sizes, weights, strict=True)]
    return [value / sum(raw) for value in raw]


class MixtureSampler(Sampler):
    """Row indices of every optimizer step, all of one data set, which takes its turns by its share.

    A step goes to the data set that is furthest behind its share, the first of these where several are: after any
    number of steps each has had its share to within one turn or two. Each set has a `GlobalBatchSampler` of its own,
    whose steps are its turns.

    Raises:
        ConfigError: the global batch is larger than one of the sets.
    """

    def __init__(self, records: RecordSet, *, shares: Sequence[float], global_batch_size: int, seed: int,
                 num_negatives: int = 0, order: int = ORDER_VERSION) -> None:
        for file in records.files:
            if global_batch_size > len(file):
                raise ConfigError(f"training.global_batch_size = {global_batch_size} is larger than the {len(file)} "
                                  f"rows of {file.path}, and a global batch is of one data set; lower it, add rows, or "
                                  "set data.mixed_batches: true", key="training.global_batch_size")
        self.num_rows = len(records)
        self.global_batch_size = global_batch_size
        self._samplers = [shuffled(file, order, global_batch_size=global_batch_size, seed=seed,
                                   num_negatives=num_negatives, name=file.path) for file in records.files]
        self._first_rows = [records.first_row(index) for index in range(len(records.files))]
        self._shares = np.array(shares)
        self._turns = np.zeros(len(shares))
        self._sets, self._steps = array("H"), array("q")

    def set_of_step(self, step: int) -> int:
        """Index of the data set that step `step` >= 0 takes its rows from."""
        while len(self._sets) <= step:
            behind = self._shares * (len(self._sets) + 1) - self._turns
            data_set = int(np.argmax(np.round(behind, 9)))
            self._sets.append(data_set)
            self._steps.append(int(self._turns[data_set]))
            self._turns[data_set] += 1
        return self._sets[step]

    def rows_of_step(self, step: int) -> list[int]:
        data_set = self.set_of_step(step)
        first = self._first_rows[data_set]
        return [first + row for row in self._samplers[data_set].rows_of_step(self._steps[step])]


def shuffled(records: Records[AnyRecord], order: int, *, global_batch_size: int, seed: int, num_negatives: int,
             name: str = "data.train") -> Sampler:
    """The shuffling sampler of a run that began with this ORDER_VERSION."""
    if order == 1:
        return EpochSampler(records, global_batch_size=global_batch_size, seed=seed, num_negatives=num_negatives)
    return GlobalBatchSampler(records, global_batch_size=global_batch_size, shuffle=True, seed=seed,
                              num_negatives=num_negatives, name=name)


def build_sampler(records: RecordSet, config: DataConfig, *, global_batch_size: int, seed: int,
                  order: int = ORDER_VERSION) -> Sampler:
    """The order in which a run takes its rows.

    Args:
        order: the ORDER_VERSION that the run began with.
    Raises:
        ConfigError: the global batch is larger than the data it comes from.
    """
    num_negatives = ANY_NUMBER if config.samples_documents else config.num_negatives
    if not config.shuffle:
        return GlobalBatchSampler(records, global_batch_size=global_batch_size, shuffle=False, seed=seed)
    if len(records.files) == 1 or config.mixed_batches:
        return shuffled(records, order, global_batch_size=global_batch_size, seed=seed, num_negatives=num_negatives)
    shares = turn_shares([len(file) for file in records.files], [file.file.weight for file in records.files],
                         config.sampling_temperature)
    return MixtureSampler(records, shares=shares, global_batch_size=global_batch_size, seed=seed,
                          num_negatives=num_negatives, order=order)
