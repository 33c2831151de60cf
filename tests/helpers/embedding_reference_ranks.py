"""The ranks' part of a case of the exactness matrix: one real step, its gradients compared shard by shard."""

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_embed.batch import EmbedBatch
from megatron_embed.config.schema import RunConfig
from megatron_embed.config.vector_format import JointFormat, with_format
from megatron_embed.data.dataset import open_records
from megatron_embed.data.packing import DocumentsPerQuery, PackingSpec
from megatron_embed.data.tokenizer import RoleTokenizer, TextFormat
from tests.helpers.exactness_cases import NUM_NEGATIVES, ROWS, Case, Rows, Sabotage, run_config
from tests.helpers.gradient_errors import SquaredErrors, gather_shards, squared_errors, squared_errors_of_adapters
from tests.helpers.other_models import fixed_vectors


def tokenizer_of(directory: Path, rows: Rows, joint: JointFormat | None = None) -> RoleTokenizer:
    """The model's tokenizer; its own special tokens, no further EOS. `joint`: the rows of a joint model."""
    vectors = None
    if (directory / "modules.json").is_file():
        from megatron_embed.models.saved_settings import read_saved_settings

        vectors = read_saved_settings(directory).vectors
    return RoleTokenizer(str(directory), add_eos=False, query_max_length=rows.max_length,
                         document_max_length=rows.max_length, text_format=TextFormat(vectors=vectors, joint=joint))


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """One rank's result of one case."""

    squared_errors: list[SquaredErrors]
    """Per repeat."""
    losses: list[float]
    norm: float
    tokens: int
    bins: int
    """Micro-batches of this rank before the ranks agreed."""
    shared: int
    """Rows of this rank that share the vector of another row's text."""


def run_cases(cases: Sequence[Case], folder: str) -> list[RankResult]:
    """Build the groups once, then run each case. Called by all ranks."""
    from megatron_embed.parallel.topology import initialize

    topology = initialize(run_config(cases[0], Path(folder)).parallel)
    with _kernels(cases[0].kernel):
        return [_run_case(case, Path(folder), topology) for case in cases]


def _kernels(name: str) -> contextlib.AbstractContextManager[Any]:
    """The pretend device's flash kernels without the limits of real ones, which compute in bfloat16."""
    if name != "flash":
        return contextlib.nullcontext()
    from megatron_embed.platform.compat import HAS_CUDA
    from tests.pretend_cuda import flash

    assert HAS_CUDA, "no pretend device"
    return mock.patch.multiple(flash, DTYPES=(torch.float32,), HEAD_DIM_UNIT=4)


def _run_case(case: Case, folder: Path, topology: Any) -> RankResult:
    from megatron_embed.loading.model_directory import find_model, load_model_chunks
    from megatron_embed.models.backbone import check_divisible
    from megatron_embed.objectives.build import build_objective
    from megatron_embed.parallel.topology import check_batch_sizes, check_token_budget
    from megatron_embed.training.bin_sync import agree_on_bins
    from megatron_embed.training.first_pass import build_first_pass
    from megatron_embed.training.grad_cache import GradCache
    from megatron_embed.training.kept_activations import build_kept_activations
    from megatron_embed.training.optimizer import build_optimizer, wrap_in_ddp
    from megatron_embed.training.step import seed_step

    config = run_config(case, folder)
    model = find_model(config.model.path)
    config = dataclasses.replace(config, embedding=with_format(config.embedding, model.saved.vectors))
    model = model.of_run(config.embedding) if case.sparse or case.joint else model
    check_divisible(model.shape, config.parallel)
    assert check_batch_sizes(config, topology.dp_size) == (case.micro_batches or None)
    check_token_budget(config)
    chunks = load_model_chunks(model, config, topology, new_weights=True)
    wrapped = wrap_in_ddp(chunks, config, topology, bucket_size=3000 if case.overlap else None)
    optimizer = build_optimizer(config, wrapped, topology)
    group = topology.groups.tp if case.sabotage == "group" else topology.dp_group
    split = topology.model_parallel_groups if group is topology.dp_group else None
    objective = build_objective(config, group, split, fixed_vectors(case.others, model.dim(config.embedding)))
    gradients = GradCache(chunks=wrapped, models=chunks, topology=topology, objective=objective,
                          kernel=case.kernel, has_dropout=False,
                          first_pass=build_first_pass(config, model.shape, topology),
                          kept=build_kept_activations(config, model.shape, topology))
    batch = _load_batch(case, config, folder, topology, model.joint)
    bins = len(batch.micro_batches)
    if case.tokens is not None:
        batch = agree_on_bins(batch, topology, budget=case.tokens,
                              keep_groups_together=case.negatives == "micro_batch")
    errors, losses = [], []
    for _ in range(case.repeats):
        for chunk in wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        seed_step(7, 0, topology)
        losses.append(_with_sabotage(case.sabotage, gradients, batch).metrics()["loss"])
        optimizer.prepare_grads()
        norm = float(optimizer.get_grad_norm())
        gather_shards(wrapped)
        compare = squared_errors_of_adapters if case.adapters else squared_errors
        errors.append(compare(chunks, topology, folder / f"gradients-{case.reference}"))
    return RankResult(squared_errors=errors, losses=losses, norm=norm,
                      tokens=max(part.num_tokens for part in batch.micro_batches), bins=bins,
                      shared=batch.num_texts - sum(part.num_sequences for part in batch.micro_batches
                                                   if not part.repeated))


def _load_batch(case: Case, config: RunConfig, folder: Path, topology: Any,
                joint: JointFormat | None) -> EmbedBatch:
    """This rank's share of the rows, by the loader of training."""
    from megatron_embed.data.loader import BatchLoader
    from megatron_embed.data.sampler import GlobalBatchSampler
    from megatron_embed.parallel.topology import token_alignment

    records = open_records(config.data.train)
    sampler = GlobalBatchSampler(records, global_batch_size=config.training.global_batch_size, shuffle=False, seed=1,
                                 num_negatives=NUM_NEGATIVES)
    packing = PackingSpec(
        micro_batch_size=config.training.micro_batch_size, alignment=token_alignment(config.parallel),
        uniform_size=topology.pp_size > 1, micro_batch_tokens=case.tokens,
        keep_groups_together=case.negatives == "micro_batch", encode_once=case.encode_once)
    with BatchLoader(records, sampler, tokenizer_of(folder / case.model, ROWS[case.rows], joint), packing,
                     DocumentsPerQuery(negatives=NUM_NEGATIVES, embedded=case.others != "query side"),
                     dp_rank=topology.dp_rank, dp_size=topology.dp_size) as loader:
        return loader.batch(0)


def _with_sabotage(sabotage: Sabotage | None, gradients: Any, batch: Any) -> Any:
    """A step's gradients, with a deliberate mistake if asked for."""
    import megatron_embed.objectives.contrastive as objective
    import megatron_embed.training.grad_cache as module

    factor, schedule, gather = module.surrogate_factor, module.run_schedule, objective.gather_ids

    def swapped(chunks: Any, batches: Any, topology: Any, loss_of: Any, **settings: Any) -> Any:
        order = [1, 0, *range(2, len(batches))]
        return schedule(chunks, batches, topology, lambda index: loss_of(order[index]), **settings)

    def ids_of_another_rank(*args: Any, **kwargs: Any) -> Any:
        ids = gather(*args, **kwargs)
        return dataclasses.replace(ids, document_ids=ids.document_ids.roll(int(ids.num_documents[0])))

    try:
        if sabotage == "mask":
            objective.gather_ids = ids_of_another_rank
        if sabotage == "factor":
            module.surrogate_factor = lambda *sizes: 1.001 * factor(*sizes)
        if sabotage == "order":
            module.run_schedule = swapped
        return gradients(batch)
    finally:
        module.surrogate_factor, module.run_schedule, objective.gather_ids = factor, schedule, gather
