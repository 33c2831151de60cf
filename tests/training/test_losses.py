"""Every loss under data, tensor and pipeline ranks: value and gradients of the model's parameters are those of one
process, where Transformers embeds text by text and Sentence Transformers, or the formula written out, is the loss."""

import copy
import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as functional
import transformers
from sentence_transformers.sentence_transformer import losses as peers
from sentence_transformers.sentence_transformer.losses.matryoshka import shrink

from tests.ranks import run_on_ranks
from tests.toys import batch_of, layout, real_records, run_config, save_model, toy_tokenizer
from tests.training.exactness import ROWS, build, gather_shards, relative_error, squares

SCORES = torch.tensor([0.5, 0.125, 1.0, 0.75, 0.25, 0.0, 1.0, 0.375, 0.625, 0.875, 0.5, 0.25], dtype=torch.float64)
BINARY = (SCORES > 0.45).double()
TEACHER = torch.sin(torch.arange(2.0 * ROWS, dtype=torch.float64) * 1.7)
"""Of each row's positive, then of its hard negative."""
ALL = ("query_to_document", "query_to_query", "document_to_document", "document_to_query")
PEER_NAMES = ("query_to_doc", "query_to_query", "doc_to_doc", "doc_to_query")


def of_pairs(peer, label):
    return lambda query, positive, negative: peer.compute_loss_from_embeddings([query, positive], label)


def nested(query, positive, negative):
    peer = peers.MultipleNegativesRankingLoss(None, scale=5.0, directions=PEER_NAMES)
    return sum(weight * peer.compute_loss_from_embeddings([shrink(query, dim), shrink(positive, dim)], None)
               for dim, weight in ((32, 1.0), (8, 0.5)))


def sigmoid(query, positive, negative):
    logits = query @ torch.cat([positive, *negative.values()]).T / 0.2 - 3.0
    signs = torch.full_like(logits, -1.0)
    signs[torch.arange(ROWS), torch.arange(ROWS)] = 1.0
    return -functional.logsigmoid(signs * logits).sum() / ROWS


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
        found = torch.log_softmax(documents @ query[row] / 0.5, dim=0)
        terms.append(functional.kl_div(found, wanted, reduction="sum") * 0.25)
    return torch.stack(terms).mean()


@dataclasses.dataclass(frozen=True)
class Loss:
    objective: dict
    reference: object
    scores: torch.Tensor | None = None
    dims: tuple[int, ...] = ()

    @property
    def num_negatives(self):
        return 0 if self.scores is not None or self.dims else 1


LOSSES = {
    "info_nce": Loss({"temperature": 0.2, "directions": ALL, "matryoshka_weights": (1.0, 0.5)}, nested, dims=(32, 8)),
    "sigmoid": Loss({"temperature": 0.2, "bias": -3.0}, sigmoid),
    "cosine_similarity": Loss({}, of_pairs(peers.CosineSimilarityLoss(None), SCORES), SCORES),
    "contrastive": Loss({"margin": 0.9}, of_pairs(peers.ContrastiveLoss(None, margin=0.9), BINARY), BINARY),
    "online_contrastive": Loss({"margin": 0.9}, of_pairs(peers.OnlineContrastiveLoss(None, margin=0.9), BINARY),
                               BINARY),
    "cosent": Loss({"temperature": 0.1}, of_pairs(peers.CoSENTLoss(None, scale=10.0), SCORES), SCORES),
    "angle": Loss({"temperature": 0.2}, of_pairs(peers.AnglELoss(None, scale=5.0), SCORES), SCORES),
    "triplet": Loss({"margin": 0.4}, triplets),
    "margin_mse": Loss({}, margins),
    "kl_distillation": Loss({"temperature": 0.5, "teacher_temperature": 0.7}, divergences)}


BOUNDS = {"triplet": 1e-4, "margin_mse": 1e-4, "kl_distillation": 1e-4}
"""Of the largest relative error of a parameter's gradient; 1e-5 else. These take differences of nearly equal distances
or similarities of an untrained model, of which float32 keeps fewer digits (measured: 2.1e-5 for triplet, one rank)."""


def settings_of(name):
    return {"loss": name, **LOSSES[name].objective}


def embedded(model, tokenizer, texts, role):
    """[texts, dim], one at a time, mean pooling, unit length."""
    rows = [model(torch.tensor([ids])).last_hidden_state[0].mean(dim=0)
            for ids in tokenizer.tokenize(texts, role).token_ids]
    return functional.normalize(torch.stack(rows), dim=1)


@pytest.fixture(scope="module")
def truths(tmp_path_factory):
    """(the model's directory, by loss: its value and a directory whose "weights" are the gradients)."""
    folder = tmp_path_factory.mktemp("losses")
    directory = save_model(folder / "model", "bert", tokenizer=True)
    model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager").eval()
    records, tokenizer = real_records(ROWS), toy_tokenizer(directory)
    query = embedded(model, tokenizer, [record.query for record in records], "query")
    positive = embedded(model, tokenizer, [record.positive[0] for record in records], "document")
    negative = {row: embedded(model, tokenizer, [record.negatives[0]], "document")
                for row, record in enumerate(records) if record.negatives}
    parameters, found = dict(model.named_parameters()), {}
    for name, loss in LOSSES.items():
        value = loss.reference(query, positive, negative)
        gradients = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
        holder = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, gradient in zip(holder.parameters(), gradients, strict=True):
                parameter.copy_(torch.zeros_like(parameter) if gradient is None else gradient)
        norm = sum(float(gradient.square().sum()) for gradient in gradients if gradient is not None) ** 0.5
        assert norm > 1e-3, f"{name} has no gradient"
        holder.float().save_pretrained(folder / name)
        found[name] = (float(value.detach()), str(folder / name))
    return directory, found


def all_losses_on_rank(config, directories):
    """By loss: (metrics, squares of this rank's parameters) of one step."""
    from megatron_embed.parallel.topology import token_alignment
    from megatron_embed.training.build import build_objective

    built, _ = build(config)
    topology, found = built.topology, {}
    share = ROWS // topology.dp_size
    mine = slice(topology.dp_rank * share, (topology.dp_rank + 1) * share)
    for name, loss in LOSSES.items():
        chosen = run_config(config.model.path, objective=settings_of(name), matryoshka_dims=loss.dims,
                            data={"num_negatives": loss.num_negatives})
        batch = batch_of(config.model.path, real_records(ROWS)[mine],
                         micro_batch_size=config.training.micro_batch_size, num_negatives=loss.num_negatives,
                         alignment=token_alignment(config.parallel), constant_tokens=topology.pp_size > 1)
        place = 2 * (batch.document_query + mine.start) + (~batch.is_positive).long()
        batch = dataclasses.replace(batch, scores=None if loss.scores is None else loss.scores[mine],
                                    teacher_scores=TEACHER[place])
        gradients = dataclasses.replace(built.gradients,
                                        objective=build_objective(chosen, topology.dp_group, topology.device))
        for chunk in built.wrapped:
            chunk.zero_grad_buffer()
        sums = gradients(batch)
        gather_shards(built.wrapped)
        found[name] = (sums.metrics(), squares(built, directories[name]))
    return found


@pytest.mark.parametrize("ranks, sizes, micro_batch_size", [
    (1, layout(), 12), (1, layout(), 5), (2, layout(), 3), (2, layout(2), 4), (2, layout(pp=2), 3)],
    ids=["one", "one_in_parts", "dp2", "tp2", "pp2"])
def test_every_loss_is_that_of_one_process(truths, ranks, sizes, micro_batch_size):
    directory, expected = truths
    config = run_config(directory, parallel=sizes, distributed=False,
                        training={"global_batch_size": ROWS, "micro_batch_size": micro_batch_size})
    per_rank = run_on_ranks(all_losses_on_rank, ranks, config, {name: path for name, (_, path) in expected.items()})
    for name, (value, _) in expected.items():
        for found in per_rank:
            assert found[name][0]["loss"] == pytest.approx(value, rel=2e-6), name
        assert relative_error([found[name][1] for found in per_rank]) <= BOUNDS.get(name, 1e-5), name


def pairs_on_rank(name):
    """(metrics, gradient) of a loss over pairs of which this rank has one or two, ranks differ."""
    from megatron_embed.training.build import build_objective
    from tests.training.test_objective import config_of, variant_batch

    rows, batch = variant_batch(dist.get_rank(), ({}, {}))
    batch = dataclasses.replace(batch, scores=torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)[:batch.num_queries])
    objective = build_objective(config_of({"loss": name}), dist.group.WORLD, torch.device("cpu"))
    return objective(rows, batch, total=objective.total(batch)).sums.metrics()


def test_metrics_of_pairs():
    first, second = run_on_ranks(pairs_on_rank, 2, "online_contrastive")
    assert first == second
    assert set(first) == {"loss", "similarity", "positive_similarity", "negative_similarity"}
    expected = (3 * first["positive_similarity"] + 2 * first["negative_similarity"]) / 5
    assert first["similarity"] == pytest.approx(expected)
