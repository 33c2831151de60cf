"""A step of every loss under a layout, and its reference: one process, where Transformers embeds text by text in
float64 and Sentence Transformers, or the formula written out, computes the loss."""

import copy
import dataclasses
import math
from pathlib import Path

import torch
import torch.nn.functional as functional
import transformers
from sentence_transformers.sentence_transformer import losses as peers
from sentence_transformers.sentence_transformer.losses.matryoshka import shrink

from tests.helpers.gradient_errors import gather_shards, largest_error, save_gradients, squared_errors
from tests.helpers.ranks import run_on_ranks
from tests.helpers.step_reference import ROWS, build
from tests.helpers.toys import batch_of, layout, real_records, run_config, save_model, toy_tokenizer

SCORES = torch.tensor([0.5, 0.125, 1.0, 0.75, 0.25, 0.0, 1.0, 0.375, 0.625, 0.875, 0.5, 0.25], dtype=torch.float64)
BINARY = (SCORES > 0.45).double()
TEACHER = torch.sin(torch.arange(2.0 * ROWS, dtype=torch.float64) * 1.7)
"""Teacher's scores of each row's positive, then of its hard negative."""
ALL = ("query_to_document", "query_to_query", "document_to_document", "document_to_query")
PEER_NAMES = ("query_to_doc", "query_to_query", "doc_to_doc", "doc_to_query")
LAYOUTS = {
    "one rank": (1, layout(), 12), "one rank, 3 micro-batches": (1, layout(), 5), "DP=2": (2, layout(), 3),
    "TP=2": (2, layout(2), 4), "PP=2": (2, layout(pp=2), 3)}
"""Ranks, sizes and queries per micro-batch."""
VALUE_BOUND, GRADIENT_BOUND = 2e-6, 1e-5


def of_pairs(peer, label):
    return lambda query, positive, negative: peer.compute_loss_from_embeddings([query, positive], label)


def nested(query, positive, negative):
    peer = peers.MultipleNegativesRankingLoss(None, scale=20.0, directions=PEER_NAMES)
    return sum(weight * peer.compute_loss_from_embeddings([shrink(query, dim), shrink(positive, dim)], None)
               for dim, weight in ((32, 1.0), (8, 0.5)))


def sigmoid(query, positive, negative):
    logits = query @ torch.cat([positive, *negative.values()]).T / 0.2 - 3.0
    signs = torch.full_like(logits, -1.0)
    signs[torch.arange(ROWS), torch.arange(ROWS)] = 1.0
    return -functional.logsigmoid(signs * logits).sum() / ROWS


def learned_info_nce(query, positive, negative, log_scale):
    """InfoNCE over two dimensions, with CLIP's scale: logits = exp(log_scale) * similarity."""
    return sum(weight * functional.cross_entropy(log_scale.exp() * shrink(query, dim) @ shrink(positive, dim).T,
                                                 torch.arange(ROWS)) for dim, weight in ((32, 1.0), (8, 0.5)))


def learned_sigmoid(query, positive, negative, log_scale, bias):
    """SigLIP, algorithm 1: logits = exp(log_scale) * similarity + bias."""
    logits = log_scale.exp() * query @ torch.cat([positive, *negative.values()]).T + bias
    return functional.softplus(logits).sum() / ROWS - logits.diagonal().sum() / ROWS


def triplets(query, positive, negative):
    rows = list(negative)
    return functional.triplet_margin_loss(query[rows], positive[rows], torch.cat(list(negative.values())), margin=0.4,
                                          eps=0.0)


def margins(query, positive, negative):
    terms = [((query[row] * (positive[row] - vector[0])).sum() - (TEACHER[2 * row] - TEACHER[2 * row + 1])) ** 2
             for row, vector in negative.items()]
    return torch.stack(terms).mean()


def divergences(query, positive, negative):
    terms = []
    for row in range(ROWS):
        documents = torch.cat([positive[row : row + 1], *([negative[row]] if row in negative else [])])
        wanted = torch.softmax(TEACHER[2 * row : 2 * row + len(documents)] / 0.7, dim=0)
        predicted = torch.log_softmax(documents @ query[row] / 0.5, dim=0)
        terms.append(functional.kl_div(predicted, wanted, reduction="sum") * 0.25)
    return torch.stack(terms).mean()


@dataclasses.dataclass(frozen=True)
class Loss:
    objective: dict
    reference: object
    scores: torch.Tensor | None = None
    dims: tuple[int, ...] = ()
    scale: tuple[float, ...] = ()
    """Values that the loss trains: log(1 / temperature), and the bias if there is one."""

    @property
    def num_negatives(self):
        return 0 if self.scores is not None or self.dims else 1

    def leaves(self):
        """The numbers that the loss trains."""
        return [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in self.scale]


LOSSES = {
    "info_nce": Loss({"temperature": 0.05, "directions": ALL, "matryoshka_weights": (1.0, 0.5)}, nested, dims=(32, 8)),
    "sigmoid": Loss({"temperature": 0.2, "bias": -3.0}, sigmoid),
    "cosine_similarity": Loss({}, of_pairs(peers.CosineSimilarityLoss(None), SCORES), SCORES),
    "contrastive": Loss({"margin": 0.9}, of_pairs(peers.ContrastiveLoss(None, margin=0.9), BINARY), BINARY),
    "online_contrastive": Loss({"margin": 0.9}, of_pairs(peers.OnlineContrastiveLoss(None, margin=0.9), BINARY),
                               BINARY),
    "cosent": Loss({"temperature": 0.1}, of_pairs(peers.CoSENTLoss(None, scale=10.0), SCORES), SCORES),
    "angle": Loss({"temperature": 0.2}, of_pairs(peers.AnglELoss(None, scale=5.0), SCORES), SCORES),
    "triplet": Loss({"margin": 0.4}, triplets),
    "margin_mse": Loss({}, margins),
    "kl_distillation": Loss({"temperature": 0.5, "teacher_temperature": 0.7}, divergences),
    "info_nce, learnable_temperature": Loss(
        {"temperature": 0.4, "learnable_temperature": True, "matryoshka_weights": (1.0, 0.5)}, learned_info_nce,
        dims=(32, 8), scale=(-math.log(0.4),)),
    "sigmoid, learnable_temperature": Loss({"temperature": 0.2, "bias": -3.0, "learnable_temperature": True},
                                           learned_sigmoid, scale=(-math.log(0.2), -3.0))}


def reference_rows():
    """Real rows; two of three with another row's positive as hard negative, less alike than the sample's own."""
    records = real_records(ROWS)
    return [dataclasses.replace(record, negatives=records[(row + 4) % ROWS].positive[:1] if record.negatives else ())
            for row, record in enumerate(records)]


def settings_of(name):
    return {"loss": name.partition(",")[0], **LOSSES[name].objective}


def embedded(model, tokenizer, texts, role):
    """[texts, dim], one at a time, mean pooling, unit length."""
    rows = [model(torch.tensor([ids])).last_hidden_state[0].mean(dim=0)
            for ids in tokenizer.tokenize(texts, role).token_ids]
    return functional.normalize(torch.stack(rows), dim=1)


@dataclasses.dataclass(frozen=True)
class Reference:
    """Loss and gradients of one process."""

    value: float
    gradients: str
    """Model directory whose "weights" are the gradients; see gradient_errors.py."""
    scale_gradients: list[float]
    """Gradients of the numbers that the loss trains itself."""


def references(folder: Path):
    """(the model's directory, reference of each loss), written below `folder`."""
    # Of 32 dimensions, texts would be so alike (cosine 0.9) that float32 keeps too few digits of their differences.
    directory = save_model(folder / "model", "bert", tokenizer=True, hidden_size=64)
    model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager").eval()
    records, tokenizer = reference_rows(), toy_tokenizer(directory)
    query = embedded(model, tokenizer, [record.query for record in records], "query")
    positive = embedded(model, tokenizer, [record.positive[0] for record in records], "document")
    negative = {row: embedded(model, tokenizer, [record.negatives[0]], "document")
                for row, record in enumerate(records) if record.negatives}
    parameters, references_by_loss = list(model.parameters()), {}
    for name, loss in LOSSES.items():
        leaves = loss.leaves()
        value = loss.reference(query, positive, negative, *leaves)
        gradients = torch.autograd.grad(value, [*parameters, *leaves], retain_graph=True, allow_unused=True)
        holder = copy.deepcopy(model)
        for parameter, gradient in zip(holder.parameters(), gradients[: len(parameters)], strict=True):
            parameter.grad = gradient
        path = folder / name.replace(", ", "-")
        assert save_gradients(holder, path, unused=("pooler",)) > 1e-3, f"{name} has no gradient"
        scale_gradients = [float(gradient) for gradient in gradients[len(parameters) :]]
        assert all(abs(gradient) > 1e-3 for gradient in scale_gradients), name
        references_by_loss[name] = Reference(float(value.detach()), str(path), scale_gradients)
    return directory, references_by_loss


def all_losses_on_rank(config, directories):
    """(metrics, squared errors of this rank's parameters) of one step of each loss."""
    from megatron_embed.objectives.build import build_objective
    from megatron_embed.parallel.topology import token_alignment

    built, _ = build(config)
    topology, results = built.topology, {}
    share = ROWS // topology.dp_size
    mine = slice(topology.dp_rank * share, (topology.dp_rank + 1) * share)
    for name, loss in LOSSES.items():
        chosen = run_config(config.model.path, objective=settings_of(name), matryoshka_dims=loss.dims,
                            data={"num_negatives": loss.num_negatives})
        batch = batch_of(config.model.path, reference_rows()[mine],
                         micro_batch_size=config.training.micro_batch_size, num_negatives=loss.num_negatives,
                         alignment=token_alignment(config.parallel), uniform_size=topology.pp_size > 1)
        teacher_index = 2 * (batch.document_query + mine.start) + (~batch.is_positive).long()
        batch = dataclasses.replace(batch, scores=None if loss.scores is None else loss.scores[mine],
                                    teacher_scores=TEACHER[teacher_index])
        gradients = dataclasses.replace(
            built.gradients, objective=build_objective(chosen, topology.dp_group, topology.model_parallel_groups))
        for chunk in built.wrapped:
            chunk.zero_grad_buffer()
        sums = gradients(batch)
        gather_shards(built.wrapped)
        results[name] = (sums.metrics(), squared_errors(built.chunks, topology, Path(directories[name])))
    return results


@dataclasses.dataclass(frozen=True)
class Error:
    """Error of one loss under one layout, against one process; the worst of all ranks."""

    value: float
    """Relative."""
    gradient: float
    """See docs/exactness.md; relative for the numbers that the loss trains itself."""


def errors_under(directory, expected, ranks, sizes, micro_batch_size):
    """The error of each loss. `ranks`, `sizes`, `micro_batch_size`: see LAYOUTS."""
    config = run_config(directory, parallel=sizes, distributed=False,
                        training={"global_batch_size": ROWS, "micro_batch_size": micro_batch_size})
    per_rank = run_on_ranks(all_losses_on_rank, ranks, config,
                            {name: reference.gradients for name, reference in expected.items()})
    errors = {}
    for name, reference in expected.items():
        metrics = [result[name][0] for result in per_rank]
        gradients = [[values[key] for key in ("log_scale_gradient", "bias_gradient") if key in values]
                     for values in metrics]
        assert all(len(part) == len(reference.scale_gradients) for part in gradients), name
        scale = [abs(gradient - wanted) / abs(wanted) for part in gradients
                 for gradient, wanted in zip(part, reference.scale_gradients, strict=True)]
        gradient_error, _ = largest_error([result[name][1] for result in per_rank])
        errors[name] = Error(max(abs(values["loss"] / reference.value - 1) for values in metrics),
                             max(gradient_error, *scale, 0.0))
    return errors
