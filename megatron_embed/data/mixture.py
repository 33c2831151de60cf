"""Several data sets, one of them per global batch: a step's data set follows from the step and the shares alone."""

from collections.abc import Sequence

from megatron_embed.config.data import DataConfig
from megatron_embed.data.dataset import RecordSet
from megatron_embed.data.epoch_sampler import EpochSampler
from megatron_embed.data.records import ANY_NUMBER, AnyRecord, Records
from megatron_embed.data.sampler import ORDER_VERSION, GlobalBatchSampler, Sampler
from megatron_embed.data.turns import EarliestDeadline, FurthestBehind, Turns
from megatron_embed.errors import ConfigError


def turn_shares(sizes: Sequence[int], weights: Sequence[float], sampling_temperature: float,
                sampling_cap: int | None = None) -> list[float]:
    """Fraction of the steps for each data set: weight * rows^(1/sampling_temperature), scaled to a sum of 1.

    The temperature is that of multilingual pretraining (Devlin et al. 2019, multilingual BERT; Conneau et al. 2020,
    arXiv:1911.02116, there as the exponent alpha), the cap that of T5 (Raffel et al. 2020, arXiv:1910.10683, there as
    the artificial data set size limit): a set counts as of so many rows at most.
    """
    counted = [size if sampling_cap is None else min(size, sampling_cap) for size in sizes]
    raw = [weight * size ** (1 / sampling_temperature) for size, weight in zip(counted, weights, strict=True)]
    return [value / sum(raw) for value in raw]


class MixtureSampler(Sampler):
    """Row indices of every optimizer step, all of one data set, which takes its turns by its share.

    The turns are those of EarliestDeadline: after any number of steps each set has had its share to within one turn.
    Each set has a `GlobalBatchSampler` of its own, whose steps are its turns.

    Args:
        shares: of the steps, by set.
        order: the ORDER_VERSION that the run began with.
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
        most_turns = [None if file.file.max_epochs is None else max(1, int(
            file.file.max_epochs * len(file) / global_batch_size)) for file in records.files]
        self._turns: Turns = FurthestBehind(shares)
        self.num_steps = None
        if order > 2:
            self._turns = EarliestDeadline(shares, most_turns)
            self.num_steps = self._turns.num_steps

    def set_of_step(self, step: int) -> int:
        """Index of the data set that step `step` >= 0 takes its rows from."""
        return self._turns.of_step(step)[0]

    def rows_of_step(self, step: int) -> list[int]:
        if self.num_steps is not None and step >= self.num_steps:
            raise ConfigError(f"data.train.max_epochs: no data set has rows left after {self.num_steps} steps",
                              key="data.train.max_epochs")
        data_set, turn = self._turns.of_step(step)
        first = self._first_rows[data_set]
        return [first + row for row in self._samplers[data_set].rows_of_step(turn)]


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
                         config.sampling_temperature, config.sampling_cap)
    return MixtureSampler(records, shares=shares, global_batch_size=global_batch_size, seed=seed,
                          num_negatives=num_negatives, order=order)
