"""Texts that several rows of a step have, encoded once: the gradients of encoding each, in less work."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from megatron_embed.batch import EmbedBatch
from megatron_embed.data.packing import DocumentsPerQuery, PackingSpec, build_embed_batch
from megatron_embed.data.repeated_texts import encoded_rows, first_rows
from megatron_embed.data.tokenized import TokenizedRows
from megatron_embed.errors import ConfigError
from megatron_embed.loading.model_directory import find_model
from megatron_embed.run.embedding_task import EmbeddingTask
from megatron_embed.training.fingerprints import fingerprint
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command, settings
from tests.helpers.step_reference import NUM_NEGATIVES, build, objective_settings
from tests.helpers.toys import copy_tokenizer, layout, real_records, run_config, save_model, save_toy, toy_tokenizer


def tokenized(ids, **fields):
    return TokenizedRows(token_ids=ids, num_truncated=0, **fields)


def test_rows_share_the_first_of_their_role():
    assert first_rows(tokenized([[1], [2], [1]]), tokenized([[1], [1], [2], [3]])) == [0, 1, 0, 3, 3, 5, 6]
    masks = [[True, True], [True, False], [True, True]]
    assert first_rows(tokenized([[1, 2]] * 3, kept=masks)) == [0, 1, 0]
    assert first_rows(tokenized([[1, 2]] * 3, key_lengths=[2, 1, 1])) == [0, 1, 1]
    assert encoded_rows([0, 1, 2]) is None
    assert encoded_rows([0, 0, 2]).tolist() == [0, 0, 2]


def repeated_records(count):
    """Rows of which every third has the query of the one before, every second its positive and all the same last
    negative."""
    records = real_records(count)
    changed = []
    for index, record in enumerate(records):
        if index % 3 == 1:
            record = dataclasses.replace(record, query=changed[-1].query)
        if index % 2:
            record = dataclasses.replace(record, positive=changed[-1].positive)
        changed.append(dataclasses.replace(record, negatives=records[1].negatives[:1]))
    return changed


@pytest.mark.parametrize("budget", [None, 256])
def test_a_text_is_in_one_micro_batch(tmp_path, budget):
    tokenizer, records = toy_tokenizer(save_model(tmp_path / "bert", "bert", tokenizer=True)), repeated_records(12)
    each, once = (build_embed_batch(records, tokenizer, PackingSpec(
        micro_batch_size=1, micro_batch_tokens=budget, encode_once=encode_once), DocumentsPerQuery(negatives=1))
        for encode_once in (False, True))
    assert each.encoded_row is None and each.num_texts == once.num_texts == 36
    # 8 of 12 queries, 6 of 12 positives and one of 12 negatives. A rank without a budget makes as many micro-batches
    # as every other, so it encodes a query again if all of its row's texts are repeated.
    again = 2 if budget is None else 0
    assert sum(micro.num_sequences for micro in once.micro_batches) == 8 + 6 + 1 + again
    assert len(once.micro_batches) == 12 if budget is None else len(once.micro_batches) < len(each.micro_batches)
    texts = {int(row): micro.token_ids[first:last].tolist() for micro in each.micro_batches
             for row, first, last in zip(micro.rows, micro.cu_seqlens, micro.cu_seqlens[1:], strict=False)}
    held = {int(row) for micro in once.micro_batches for row in micro.rows}
    assert held == set(once.encoded_row.tolist())
    for row, other in enumerate(once.encoded_row.tolist()):
        assert texts[row] == texts[other]
    assert (fingerprint(each, 3) == fingerprint(once, 3)).all()


def steps(config):
    """(sums, gradients, texts that were encoded) of a step with each text and with texts once, over repeated rows."""
    from megatron_embed.parallel.topology import token_alignment

    results = []
    for encode_once in (False, True):
        built, _ = build(config)
        topology = built.topology
        share = 12 // topology.dp_size
        records = repeated_records(12)[topology.dp_rank * share : (topology.dp_rank + 1) * share]
        batch = build_embed_batch(
            records, toy_tokenizer(config.model.path), PackingSpec(
                micro_batch_size=config.training.micro_batch_size, alignment=token_alignment(config.parallel),
                uniform_size=topology.pp_size > 1, encode_once=encode_once),
            DocumentsPerQuery(negatives=NUM_NEGATIVES))
        assert isinstance(batch, EmbedBatch)
        sums = built.gradients(batch)
        evaluated = built.gradients.evaluate(batch)
        gradients = {name: parameter.main_grad.clone() for chunk in built.chunks
                     for name, parameter in chunk.global_parameters().items() if parameter.requires_grad}
        results.append((sums, evaluated, gradients, sum(micro.num_sequences for micro in batch.micro_batches)))
    return results


def error(gradients, expected):
    """Norm of the difference of two sets of gradients, relative to the expected one's. The matrix of test_exactness.py
    compares them with float64, parameter by parameter."""
    differences = [(gradients[name] - gradient).square().sum() for name, gradient in expected.items()]
    return math.sqrt(sum(differences) / sum(gradient.square().sum() for gradient in expected.values()))


@pytest.mark.parametrize(("sizes", "micro_batch_size", "ranks"), [
    (layout(), 12, 1), (layout(), 3, 1), (layout(), 3, 2), (layout(2, pp=2), 3, 4), (layout(cp=2), 3, 2)],
    ids=["one pass", "two passes", "dp2", "tp2 pp2", "cp2"])
def test_gradients_equal_those_of_encoding_each(tmp_path, sizes, micro_batch_size, ranks):
    model = save_model(tmp_path / "bert", "bert", tokenizer=True)
    config = run_config(model, parallel=sizes, objective=objective_settings(mask_duplicates=True), distributed=False,
                        training={"global_batch_size": 12, "micro_batch_size": micro_batch_size})
    for (sums, evaluated, gradients, texts), (sums2, evaluated2, gradients2, fewer) in run_on_ranks(
            steps, ranks, config):
        assert fewer < 0.7 * texts
        assert any(gradient.any() for gradient in gradients.values())
        torch.testing.assert_close(sums2.values, sums.values, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(evaluated2.values, sums.values, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(evaluated.values, sums.values, rtol=1e-5, atol=1e-6)
        assert error(gradients2, gradients) < 5e-6


@pytest.mark.parametrize(("sections", "words"), [
    ({"training": {"hidden_dropout": 0.1}}, "differs between copies"),
    ({"lora": {"rank": 4, "dropout": 0.1}}, "differs between copies"),
    ({"objective": {"negatives": "micro_batch"}}, "has its own texts")])
def test_what_cannot_share_is_refused(sections, words):
    training = sections.get("training", {}) | {"encode_repeated_texts": "once"}
    with pytest.raises(ConfigError, match=f"training.encode_repeated_texts = 'once': .*{words}") as raised:
        run_config("model", **sections | {"training": training})
    assert raised.value.key == "training.encode_repeated_texts"


@pytest.mark.parametrize(("kind", "sections", "shares"), [
    ("BertModel", {}, True), ("BertModel", {"training": {"encode_repeated_texts": "each"}}, False),
    ("BertModel", {"training": {"attention_dropout": 0.1}}, False),
    ("BertModel", {"objective": {"negatives": "micro_batch"}}, False),
    ("Qwen3MoeModel", {}, False), ("Qwen3MoeModel", {"training": {"moe_aux_loss_coefficient": 0.0}}, True),
    ("Qwen3MoeModel", {"training": {"encode_repeated_texts": "once"}}, True)])
def test_when_texts_share(tmp_path, kind, sections, shares):
    directory = str(save_toy(tmp_path / "model", kind, vocab_size=30522))
    copy_tokenizer(Path(directory))
    task = EmbeddingTask(run_config(directory, **sections), find_model(directory), None)
    assert task.packing.encode_once is shares


def test_a_run_with_repeated_texts_has_the_same_losses(tmp_path):
    rows = tmp_path / "rows.jsonl"
    lines = [{"query": record.query, "positive": list(record.positive), "negatives": list(record.negatives)}
             for record in repeated_records(24)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    losses, shares = {}, {}
    for encode in ("auto", "each"):
        values = settings(save_model(tmp_path / encode, "bert", tokenizer=True), tmp_path / f"{encode}-run")
        values["data"] |= {"train": [str(rows)], "shuffle": False, "num_negatives": 1}
        values["training"] |= {"global_batch_size": 8, "micro_batch_size": 2, "train_steps": 3, "learning_rate": 1e-3,
                               "encode_repeated_texts": encode}
        values["checkpoint"] = {}
        values["logging"] |= {"directory": str(tmp_path / f"{encode}-run")}
        (tmp_path / f"{encode}.yaml").write_text(yaml.safe_dump(values))
        results = run_on_ranks(command, 2, ["train", str(tmp_path / f"{encode}.yaml")])
        assert [code for code, *_ in results] == [0, 0], results[0][2]
        file = Path(values["logging"]["directory"]) / "metrics.jsonl"
        metrics = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        losses[encode] = [line["loss"] for line in metrics if "loss" in line]
        shares[encode] = [line.get("repeated_fraction", 0.0) for line in metrics if "loss" in line]
    assert losses["auto"] == pytest.approx(losses["each"], rel=1e-4)
    assert not any(shares["each"])
    assert 0.2 < min(shares["auto"]) <= max(shares["auto"]) < 0.7
