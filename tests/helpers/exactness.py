"""Gradients of a step under a layout, compared with one process: Transformers' own model in float64, plain autograd."""

import dataclasses
import math
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from megatron_embed.config.schema import ObjectiveConfig
from tests.helpers.toys import Opened, batch_of, open_model, real_records, toy_tokenizer

ROWS = 12
NUM_NEGATIVES = 1
TEMPERATURE = 0.3


@dataclasses.dataclass(frozen=True)
class Truth:
    """What one process finds."""

    loss: float
    gradients: str
    """Directory in the model's own format whose "weights" are the gradients, so that every rank can read its shards."""


def truth(directory, folder, groups=None):
    """Loss and gradients over the first ROWS rows: InfoNCE of whole `groups` of rows (all in one), averaged over them.

    Saves the gradients below `folder` through the Transformers model they belong to.
    """
    records, groups = real_records(ROWS), groups or [range(ROWS)]
    model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager").eval()
    losses = [_group_loss(model, toy_tokenizer(directory), [records[row] for row in group]) for group in groups]
    loss = torch.stack(losses).mean()
    loss.backward()
    candidates = [sum(1 + len(records[row].negatives[:NUM_NEGATIVES]) for row in group) for group in groups]
    assert 0.3 < float(loss.detach()) < sum(map(math.log, candidates)) / len(groups)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    model.float().save_pretrained(folder)
    return Truth(loss=float(loss.detach()), gradients=str(folder))


def _group_loss(model, tokenizer, records):
    documents = [[record.positive[0], *record.negatives[:NUM_NEGATIVES]] for record in records]
    positive = torch.tensor([sum(map(len, documents[:row])) for row in range(len(documents))])
    query = _embed(model, tokenizer.tokenize([record.query for record in records], "query"))
    document = _embed(model, tokenizer.tokenize([text for group in documents for text in group], "document"))
    return torch.nn.functional.cross_entropy(query @ document.T / TEMPERATURE, positive)


def _embed(model, rows):
    """Mean pooling, unit length."""
    states = [model(torch.tensor([ids])).last_hidden_state[0].mean(dim=0) for ids in rows.token_ids]
    return torch.nn.functional.normalize(torch.stack(states), dim=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built(Opened):
    """A model with all that a step's gradients need."""

    wrapped: list
    gradients: object


def build(config):
    """The model in DDP with its GradCache, and this rank's batch of the rows. Called by all ranks."""
    from megatron_embed.models.encoder import attention_kernel
    from megatron_embed.objectives.build import build_objective
    from megatron_embed.parallel.topology import token_alignment
    from megatron_embed.run.assemble import has_dropout
    from megatron_embed.training.grad_cache import GradCache
    from megatron_embed.training.optimizer import wrap_in_ddp
    from megatron_embed.training.step import seed_step

    opened = open_model(config)
    topology = opened.topology
    wrapped = wrap_in_ddp(opened.chunks, config, topology)
    objective = build_objective(config, topology.dp_group, topology.device, topology.model_parallel_groups)
    gradients = GradCache(chunks=wrapped, models=opened.chunks, topology=topology, objective=objective,
                          kernel=attention_kernel(config), has_dropout=has_dropout(config))
    share = ROWS // topology.dp_size
    records = real_records(ROWS)[topology.dp_rank * share : (topology.dp_rank + 1) * share]
    batch = batch_of(config.model.path, records, micro_batch_size=config.training.micro_batch_size,
                     num_negatives=NUM_NEGATIVES, alignment=token_alignment(config.parallel),
                     uniform_size=topology.pp_size > 1)
    for chunk in wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    seed_step(7, 0, topology)
    built = Built(config=config, topology=topology, chunks=opened.chunks, wrapped=wrapped, gradients=gradients)
    return built, batch


def gather_shards(wrapped):
    """With the distributed optimizer each rank holds its shard of the summed gradients; afterwards all of them."""
    for chunk in wrapped:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            data_parallel = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                shard = bucket.grad_data.chunk(data_parallel.size())[data_parallel.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=data_parallel)


def squares(built, gradients_directory):
    """By parameter name: squared L2 norms of (difference to the truth, the truth), this rank's shard."""
    from megatron_embed.convert.hf_directory import HFDirectory, hf_weight_shards
    from megatron_embed.models.encoder import padded_vocabulary

    topology, found = built.topology, {}
    with HFDirectory(Path(gradients_directory)) as source:
        for chunk in built.chunks:
            parameters = chunk.global_parameters()
            shards = hf_weight_shards(
                source, names=parameters, tp_rank=topology.tp_rank, tp_size=topology.tp_size,
                padded_vocab_size=padded_vocabulary(chunk.shape.vocab_size, topology.tp_size))
            for name, shard in shards:
                difference = parameters[name].main_grad.double() - shard.double()
                found[name] = (float(difference.square().sum()), float(shard.double().square().sum()))
            assert parameters.keys() <= found.keys()
    return found


def gradients_of_step(config, gradients_directory, wrong_factor=1.0):
    """(mean loss, squares of every parameter of this rank) of one step's forward and backward passes."""
    import megatron_embed.training.grad_cache as grad_cache

    built, batch = build(config)
    original = grad_cache.surrogate_factor
    grad_cache.surrogate_factor = lambda *sizes: original(*sizes) * wrong_factor
    try:
        sums = built.gradients(batch)
    finally:
        grad_cache.surrogate_factor = original
    gather_shards(built.wrapped)
    return sums.metrics()["loss"], squares(built, gradients_directory)


def relative_error(per_rank):
    """max over tensors of |g - g*| / max(|g*|, 1e-6 |G*|), L2 norms, tensors put together from the ranks' shards.

    A tensor that several ranks hold counts as often in both norms.
    """
    totals: dict[str, list[float]] = {}
    for part in per_rank:
        for name, pair in part.items():
            total = totals.setdefault(name, [0.0, 0.0])
            total[0], total[1] = total[0] + pair[0], total[1] + pair[1]
    whole = math.sqrt(sum(total for _, total in totals.values()))
    assert whole > 0
    nonzero = sum(total > 0 for _, total in totals.values())
    assert nonzero >= 0.9 * len(totals), "gradients that are 0 prove nothing"
    return max(math.sqrt(error) / max(math.sqrt(total), 1e-6 * whole) for error, total in totals.values())


def objective_settings(**settings):
    return dataclasses.asdict(ObjectiveConfig(temperature=TEMPERATURE, **settings))


COLLECTIVES = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_gather", "reduce_scatter", "all_reduce",
               "broadcast")


def counted_step(built, batch):
    """The collectives of one step's gradients: [(name, elements of the larger side, group)], in order."""
    calls, originals = [], {name: vars(dist)[name] for name in COLLECTIVES}

    def count(name, original):
        def call(first, *args, **kwargs):
            tensors = [value for value in (first, *args) if isinstance(value, torch.Tensor)]
            calls.append((name, max(tensor.numel() for tensor in tensors), kwargs.get("group")))
            return original(first, *args, **kwargs)

        return call

    for name, original in originals.items():
        setattr(dist, name, count(name, original))
    try:
        built.gradients(batch)
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return calls
