"""A training step of a toy model under a layout, and its reference: Transformers' model in float64, plain autograd."""

import dataclasses
import math
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from megatron_embed.config.schema import ObjectiveConfig
from tests.helpers.gradient_errors import gather_shards, save_gradients, squared_errors
from tests.helpers.toys import Opened, batch_of, open_model, real_records, toy_tokenizer

ROWS = 12
NUM_NEGATIVES = 1
TEMPERATURE = 0.3


@dataclasses.dataclass(frozen=True)
class Reference:
    """Loss and gradients of one process."""

    loss: float
    gradients: str
    """Model directory whose "weights" are the gradients; see gradient_errors.py."""


def reference(directory, folder, groups=None):
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
    save_gradients(model, folder, unused=("pooler",))
    return Reference(loss=float(loss.detach()), gradients=str(folder))


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


def build(config, rows=ROWS):
    """The model in DDP with its GradCache, and this rank's batch of the first rows. Called by all ranks.

    Both passes are whole unless `training.keep_activations` is a number.
    """
    from megatron_embed.models.encoder import attention_kernel
    from megatron_embed.objectives.build import build_objective
    from megatron_embed.parallel.topology import token_alignment
    from megatron_embed.training.first_pass import build_first_pass
    from megatron_embed.training.grad_cache import GradCache
    from megatron_embed.training.kept_activations import build_kept_activations
    from megatron_embed.training.optimizer import wrap_in_ddp
    from megatron_embed.training.step import seed_step

    opened = open_model(config)
    topology = opened.topology
    wrapped = wrap_in_ddp(opened.chunks, config, topology)
    objective = build_objective(config, topology.dp_group, topology.model_parallel_groups)
    shape = opened.chunks[0].shape
    kept = None if config.training.keep_activations == "auto" else build_kept_activations(config, shape, topology)
    gradients = GradCache(chunks=wrapped, models=opened.chunks, topology=topology, objective=objective,
                          kernel=attention_kernel(config, shape), has_dropout=config.has_dropout,
                          first_pass=build_first_pass(config, shape, topology), kept=kept)
    share = rows // topology.dp_size
    records = real_records(rows)[topology.dp_rank * share : (topology.dp_rank + 1) * share]
    batch = batch_of(config.model.path, records, micro_batch_size=config.training.micro_batch_size,
                     num_negatives=NUM_NEGATIVES, alignment=token_alignment(config.parallel),
                     uniform_size=topology.pp_size > 1)
    for chunk in wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    seed_step(7, 0, topology)
    built = Built(config=config, topology=topology, chunks=opened.chunks, wrapped=wrapped, gradients=gradients)
    return built, batch


def gradients_of_step(config, gradients_directory, wrong_factor=1.0):
    """(mean loss, squared errors of every parameter of this rank) of one step's forward and backward passes."""
    import megatron_embed.training.grad_cache as grad_cache

    built, batch = build(config)
    original = grad_cache.surrogate_factor
    grad_cache.surrogate_factor = lambda *sizes: original(*sizes) * wrong_factor
    try:
        sums = built.gradients(batch)
    finally:
        grad_cache.surrogate_factor = original
    gather_shards(built.wrapped)
    return sums.metrics()["loss"], squared_errors(built.chunks, built.topology, Path(gradients_directory))


def both_passes(config, dropout_seed=None, replay=True):
    """(embeddings that the last stage produced, one entry per micro-batch and pass; this rank's gradients)."""
    import megatron_embed.training.grad_cache as grad_cache
    from megatron_embed.training.step import seed_step

    built, batch = build(config)
    if dropout_seed is not None:
        seed_step(dropout_seed, 0, built.topology)
    seen, original = [], grad_cache.set_all_rng_states
    built.chunks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    if not replay:
        grad_cache.set_all_rng_states = lambda *states: None
    try:
        built.gradients(batch)
    finally:
        grad_cache.set_all_rng_states = original
    return seen, {name: parameter.main_grad.clone() for chunk in built.chunks
                  for name, parameter in chunk.global_parameters().items() if parameter.requires_grad}


def both_passes_of_runs(runs):
    return [both_passes(*run) for run in runs]


def difference(gradients, expected):
    """Largest relative difference of two sets of gradients of one rank; see gradient_errors.py."""
    whole = math.sqrt(sum(float(gradient.square().sum()) for gradient in expected.values()))
    return max(float((gradients[name] - gradient).norm()) / max(float(gradient.norm()), 1e-6 * whole)
               for name, gradient in expected.items())


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
