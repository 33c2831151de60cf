"""What each rank does in a case of the exactness matrix: one real step, its gradients compared shard by shard."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_embed.data.dataset import open_records
from megatron_embed.data.packing import DocumentsPerQuery, PackingSpec
from megatron_embed.data.tokenizer import RoleTokenizer
from tests.helpers.cases import NUM_NEGATIVES, ROWS, Case, Rows, Sabotage, run_config


def tokenizer_of(directory: Path, rows: Rows) -> RoleTokenizer:
    """The model's tokenizer; its own special tokens, no further EOS."""
    return RoleTokenizer(str(directory), add_eos=False, query_max_length=rows.max_length,
                         document_max_length=rows.max_length)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one rank found in one case."""

    squares: list[dict[tuple[str, int], tuple[float, float]]]
    """Per repeat, by parameter and shard number: squared norms of (difference to the reference, reference)."""
    losses: list[float]
    norm: float
    tokens: int
    bins: int
    """Micro-batches of this rank before the ranks agreed."""


def run_cases(cases: Sequence[Case], folder: str) -> list[Found]:
    """On every rank: the groups once, then each case."""
    from megatron_embed.parallel.topology import initialize

    topology = initialize(run_config(cases[0], Path(folder)).parallel)
    return [_run_case(case, Path(folder), topology) for case in cases]


def _run_case(case: Case, folder: Path, topology: Any) -> Found:
    from megatron_embed.data.loader import BatchLoader
    from megatron_embed.data.sampler import GlobalBatchSampler
    from megatron_embed.loading.model_directory import find_model, load_model_chunks
    from megatron_embed.models.backbone import check_divisible
    from megatron_embed.objectives.build import build_objective
    from megatron_embed.parallel.topology import check_batch_sizes, check_token_budget, token_alignment
    from megatron_embed.training.bin_sync import agree_on_bins
    from megatron_embed.training.grad_cache import GradCache
    from megatron_embed.training.optimizer import build_optimizer, wrap_in_ddp
    from megatron_embed.training.step import seed_step

    config = run_config(case, folder)
    model = find_model(config.model.path)
    check_divisible(model.shape, config.parallel)
    assert check_batch_sizes(config, topology.dp_size) == (case.micro_batches or None)
    check_token_budget(config)
    chunks = load_model_chunks(model, config, topology)
    wrapped = wrap_in_ddp(chunks, config, topology, bucket_size=3000 if case.overlap else None)
    optimizer = build_optimizer(config, wrapped, topology)
    group = topology.groups.tp if case.sabotage == "group" else topology.dp_group
    split = topology.model_parallel_groups if group is topology.dp_group else None
    objective = build_objective(config, group, topology.device, split)
    gradients = GradCache(chunks=wrapped, models=chunks, topology=topology, objective=objective,
                          kernel="sdpa", has_dropout=False)
    records = open_records(config.data.train)
    sampler = GlobalBatchSampler(records, global_batch_size=config.training.global_batch_size, shuffle=False, seed=1,
                                 num_negatives=NUM_NEGATIVES)
    packing = PackingSpec(
        micro_batch_size=config.training.micro_batch_size, alignment=token_alignment(config.parallel),
        uniform_size=topology.pp_size > 1, micro_batch_tokens=case.tokens,
        keep_groups_together=case.negatives == "micro_batch")
    with BatchLoader(records, sampler, tokenizer_of(folder / case.model, ROWS[case.rows]), packing,
                     DocumentsPerQuery(negatives=NUM_NEGATIVES), dp_rank=topology.dp_rank,
                     dp_size=topology.dp_size) as loader:
        batch = loader.batch(0)
    bins = len(batch.micro_batches)
    if case.tokens is not None:
        batch = agree_on_bins(batch, topology, keep_groups_together=case.negatives == "micro_batch")
    squares, losses = [], []
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
        squares.append((compare_adapters if case.adapters else compare)(
            chunks, topology, folder / f"truth-{case.truth}"))
    return Found(squares=squares, losses=losses, norm=norm,
                  tokens=max(part.num_tokens for part in batch.micro_batches), bins=bins)


def _with_sabotage(sabotage: Sabotage | None, gradients: Any, batch: Any) -> Any:
    """A step's gradients, with a deliberate mistake if asked for."""
    import megatron_embed.objectives.contrastive as objective
    import megatron_embed.training.grad_cache as module

    factor, schedule, gather = module.surrogate_factor, module.run_schedule, objective.gather_ids

    def swapped(chunks: Any, batches: Any, topology: Any, loss_of: Any, *, forward_only: bool) -> Any:
        order = [1, 0, *range(2, len(batches))]
        return schedule(chunks, batches, topology, lambda number: loss_of(order[number]), forward_only=forward_only)

    def ids_of_another_rank(*args: Any, **kwargs: Any) -> Any:
        ids = gather(*args, **kwargs)
        return dataclasses.replace(ids, document_ids=ids.document_ids.roll(int(ids.num_documents[0])))

    try:
        if sabotage == "mask":
            objective.gather_ids = ids_of_another_rank
        if sabotage == "factor":
            module.surrogate_factor = lambda *sizes: 1.001 * factor(*sizes)
        if sabotage == "order":
            module.run_schedule = lambda *args, forward_only: (
                schedule if forward_only else swapped)(*args, forward_only=forward_only)
        return gradients(batch)
    finally:
        module.surrogate_factor, module.run_schedule, objective.gather_ids = factor, schedule, gather


def gather_shards(wrapped: Sequence[Any]) -> None:
    """With the distributed optimizer each rank holds its shard of the summed gradients; afterwards all of them."""
    for chunk in wrapped:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            data_parallel = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                shard = bucket.grad_data.chunk(data_parallel.size())[data_parallel.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=data_parallel)


def compare(chunks: Sequence[Any], topology: Any, truth: Path) -> dict[tuple[str, int], tuple[float, float]]:
    """By parameter of this rank and shard number: squared norms of (difference to the reference, reference).

    Rows that pad the vocabulary are compared with 0.
    """
    from megatron_embed.convert.hf_directory import HFDirectory, hf_weight_shards
    from megatron_embed.models.encoder import padded_vocabulary

    found, etp = {}, topology.groups.expt_tp
    with HFDirectory(truth) as source:
        padded = padded_vocabulary(source.shape.vocab_size, topology.tp_size)
        for chunk in chunks:
            parameters = chunk.global_parameters()
            whole = dict(hf_weight_shards(source, names=parameters, tp_rank=0, tp_size=1,
                                          padded_vocab_size=padded))
            for name, shard in hf_weight_shards(
                    source, names=parameters, tp_rank=topology.tp_rank, tp_size=topology.tp_size,
                    padded_vocab_size=padded, etp_rank=etp.rank(), etp_size=etp.size()):
                assert parameters[name].shape == shard.shape, name
                split = shard.numel() < whole[name].numel()
                place = (etp.rank() if "local_experts" in name else topology.tp_rank) if split else 0
                difference = parameters[name].main_grad.double() - shard.double()
                found[name, place] = (float(difference.square().sum()), float(shard.double().square().sum()))
            assert {name for name, _ in found} >= parameters.keys()
    return found


def compare_adapters(chunks: Sequence[Any], topology: Any, truth: Path) -> dict[tuple[str, int], tuple[float, float]]:
    """The same of the adapters, against a PEFT directory of gradients; nothing else may have any."""
    from megatron_embed.convert.peft import PeftAdapter
    from megatron_embed.convert.tables.lookup import rules_for

    found, etp = {}, topology.groups.expt_tp
    for chunk in chunks:
        parameters = chunk.global_parameters()
        trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        assert all(".lora." in name for name in trained)
        assert all(parameter.grad is None and not hasattr(parameter, "main_grad")
                   for name, parameter in parameters.items() if name not in trained)
        with PeftAdapter(truth, rules_for(chunk.shape.family), chunk.shape) as source:
            whole = dict(source.shards(trained, tp_rank=0, tp_size=1, etp_rank=0, etp_size=1))
            for name, shard in source.shards(trained, tp_rank=topology.tp_rank, tp_size=topology.tp_size,
                                             etp_rank=etp.rank(), etp_size=etp.size()):
                assert trained[name].shape == shard.shape, name
                place = (etp.rank() if "experts" in name else topology.tp_rank) if (
                    shard.numel() < whole[name].numel()) else 0
                difference = trained[name].main_grad.double() - shard.double()
                found[name, place] = (float(difference.square().sum()), float(shard.double().square().sum()))
    return found
