"""`data.validation_fraction`: the metrics of held-out rows, against the formula, under several layouts."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoModel, AutoTokenizer

from megatron_embed.config.schema import TrainFile
from megatron_embed.data.dataset import hold_out, open_records
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import assert_refused, command, settings
from tests.helpers.toys import MAX_LENGTH, MINI_EN, layout, save_model

FRACTION, SEED, BATCH = 0.033, 7, 16
KEYS = ("loss", "margin", "positive_similarity", "negative_similarity", "in_batch_accuracy")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "bert", "bert", tokenizer=True)


def configured(folder, model, **sections):
    """One step that changes no weight, then an evaluation."""
    values = settings(model, folder / "run")
    values["data"] |= {"num_negatives": 1, "validation_fraction": FRACTION}
    values["training"] = {"global_batch_size": BATCH, "micro_batch_size": 4, "train_steps": 1, "learning_rate": 1e-30,
                          "seed": SEED}
    values["objective"] = {"temperature": 0.1}
    values["checkpoint"], values["evaluation"] = {}, {"at_start": False}
    values["logging"]["directory"] = str(folder / "run")
    for section, keys in sections.items():
        values[section] = values.get(section, {}) | keys
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "run.yaml")


def evaluated(folder, keys=KEYS):
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    (record,) = [line for line in lines if "eval/loss" in line]
    return {key: record[f"eval/{key}"] for key in keys}


def embedded(tokenizer, encoder, texts):
    """Mean pooling, unit length."""
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
    states, mask = encoder(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


@torch.no_grad()
def expected(model):
    """Means over 3 batches of 11 rows: every document of a batch is a candidate for each of its queries."""
    held = hold_out(open_records((TrainFile(path=str(MINI_EN)),)), FRACTION, SEED)[1]
    assert len(held) == 33
    tokenizer, encoder = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()

    sums = dict.fromkeys(KEYS, 0.0)
    for first in (0, 11, 22):
        rows = held[first:first + 11]
        groups = [(row.positive[0], *row.negatives[:1]) for row in rows]
        positive = torch.tensor([sum(len(group) for group in groups[:query]) for query in range(11)])
        query, document = (embedded(tokenizer, encoder, texts) for texts in (
            [row.query for row in rows], [text for group in groups for text in group]))
        similarity = query @ document.T
        right = similarity[range(11), positive]
        wrong = similarity.scatter(1, positive[:, None], float("nan"))
        hardest = wrong.nan_to_num(-9).max(1).values
        sums["loss"] += F.cross_entropy(similarity / 0.1, positive, reduction="sum").item()
        sums["positive_similarity"] += right.sum().item()
        sums["negative_similarity"] += wrong.nanmean(1).sum().item()
        sums["margin"] += (right - hardest).sum().item()
        sums["in_batch_accuracy"] += (right > hardest).sum().item()
    return {key: total / 33 for key, total in sums.items()}


@pytest.mark.parametrize("ranks, sizes, training", [
    pytest.param(1, layout(), {}, marks=pytest.mark.slow), pytest.param(2, layout(), {}, marks=pytest.mark.slow),
    (2, layout(pp=2), {}), pytest.param(2, layout(), {"micro_batch_size": 1}, marks=pytest.mark.slow),
    (2, layout(), {"micro_batch_tokens": 128, "first_pass_micro_batches": 3})],
    ids=["one", "dp2, shares of 6 and 5", "pp2", "dp2, unequal micro-batches", "dp2, token budget"])
def test_metrics_of_held_out_rows_are_the_formulas_under_every_layout(model, tmp_path, ranks, sizes, training):
    truth = expected(model)
    assert truth["loss"] > 0.5
    assert truth["margin"] < 0.5
    path = configured(tmp_path / "case", model, parallel=sizes, training=training)
    results = run_on_ranks(command, ranks, ["train", path])
    assert [code for code, *_ in results] == [0] * ranks, results[0][2]
    assert evaluated(tmp_path / "case") == pytest.approx(truth, rel=1e-4, abs=1e-5)


def test_rows_of_their_own_files_are_validated_as_held_out_ones_are(model, tmp_path):
    lines = MINI_EN.read_text(encoding="utf-8").splitlines(keepends=True)
    held = {row.source.rpartition(":")[2] for row in hold_out(open_records((TrainFile(path=str(MINI_EN)),)), FRACTION,
                                                              SEED)[1]}
    wider = json.dumps({"query": "which?", "positive": [f"answer {index}" for index in range(9)],
                        "negatives": ["no"] * 9}) + "\n"
    for name, mine in (("train", False), ("held", True)):
        text = "".join(line for index, line in enumerate(lines, 1) if (str(index) in held) == mine)
        (tmp_path / f"{name}.jsonl").write_text(text + ("" if mine else wider), encoding="utf-8")
    data = {"train": [str(tmp_path / "train.jsonl")], "validation": [str(tmp_path / "held.jsonl")],
            "validation_fraction": 0.0}
    path = configured(tmp_path / "run", model, data=data)
    assert [code for code, *_ in run_on_ranks(command, 2, ["train", path])] == [0, 0]
    assert evaluated(tmp_path / "run") == pytest.approx(expected(model), rel=1e-4, abs=1e-5)
    # The other way round, validated rows have more documents than any that is trained on.
    path = configured(tmp_path / "wide", model, data=data | {"train": data["validation"], "validation": data["train"],
                                                             "num_positives": 9})
    assert [code for code, *_ in run_on_ranks(command, 2, ["train", path])] == [0, 0]
    assert evaluated(tmp_path / "wide")["loss"] > 0


@pytest.mark.parametrize("data, words", [
    ({"validation": [str(MINI_EN)]}, ["data.validation_fraction = 0.033", "data.validation is set too"]),
    ({"validation": ["gone.jsonl"], "validation_fraction": 0.0}, ["gone.jsonl"]),
    ({"validation": [{"path": str(MINI_EN), "weight": 2.0}], "validation_fraction": 0.0},
     ["data.validation.weight = 2.0", "not trained on"])])
def test_what_cannot_be_validated_on_is_refused(model, tmp_path, data, words):
    path = configured(tmp_path / "run", model, data=data)
    results = run_on_ranks(command, 1, ["train", path])
    assert_refused(results, "", *words)


def test_positions_and_windows_of_a_family_hold_in_validation(tmp_path):
    """RoBERTa numbers positions from behind its padding token; a Mistral token sees a few of those before it."""
    from transformers import MistralConfig, MistralModel, RobertaConfig, RobertaModel

    common = {"vocab_size": 30522, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
              "intermediate_size": 48}
    roberta = RobertaModel(RobertaConfig(**common, max_position_embeddings=130, type_vocab_size=1,
                                         hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    mistral = MistralModel(MistralConfig(**common, num_key_value_heads=2, sliding_window=6))
    for family in (roberta, mistral):
        directory = save_model(tmp_path / family.config.model_type, "bert", tokenizer=True)
        for name in ("config.json", "model.safetensors"):
            (tmp_path / family.config.model_type / name).unlink()
        with torch.no_grad():
            for parameter in family.parameters():
                parameter.mul_(20.0 if parameter.dim() > 1 else 1.0)
        family.save_pretrained(directory)
        path = configured(tmp_path / f"{family.config.model_type}_run", directory)
        ((code, _, err, _),) = run_on_ranks(command, 1, ["train", path])
        assert code == 0, err
        metrics = evaluated(tmp_path / f"{family.config.model_type}_run")
        assert metrics == pytest.approx(expected(directory), rel=1e-3, abs=1e-4), family.config.model_type


def write_scored(path, loss):
    """Rows of the sample: pairs with a score, or with a negative and a teacher's scores."""
    rows = []
    for index, line in enumerate(MINI_EN.read_text(encoding="utf-8").splitlines()[:60]):
        row = json.loads(line)
        score = math.sin(index)
        rows.append({"text_a": row["query"], "text_b": row["positive"][0], "score": score} if loss == "cosent" else
                    {"query": row["query"], "positive": row["positive"][0], "negatives": row["negatives"][:1],
                     "teacher_scores": [score, math.cos(index)]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@torch.no_grad()
def expected_of(model, path, loss):
    """Means over two batches of `cosent`, each one number, or over all queries of `kl_distillation`, written out."""
    held = hold_out(open_records((TrainFile(path=str(path)),), "pairs" if loss == "cosent" else "contrastive"), 0.3,
                    SEED)[1]
    assert BATCH < len(held) <= 2 * BATCH
    tokenizer, encoder = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    query = embedded(tokenizer, encoder, [row.query for row in held])
    positive = embedded(tokenizer, encoder, [row.positive[0] for row in held])
    similarity = (query * positive).sum(dim=1)
    if loss == "cosent":
        label, losses = torch.tensor([row.score for row in held]), []
        for part in torch.arange(len(held)).tensor_split(2):
            gap = (similarity[part][None, :] - similarity[part][:, None]) / 0.1
            above = label[part][:, None] > label[part][None, :]
            losses.append(torch.log1p(gap[above].exp().sum()))
        return torch.stack(losses).mean().item()
    negative = (query * embedded(tokenizer, encoder, [row.negatives[0] for row in held])).sum(dim=1)
    student = torch.stack([similarity, negative], dim=1) / 0.1
    teacher = torch.tensor([row.teacher_scores for row in held]) / 0.1
    return 0.01 * F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean").item()


@pytest.mark.parametrize("loss", ["cosent", "kl_distillation"])
def test_other_losses_on_held_out_rows(model, tmp_path, loss):
    path = tmp_path / "rows.jsonl"
    write_scored(path, loss)
    truth = expected_of(model, path, loss)
    assert truth > 1e-3
    for index, (ranks, sizes) in enumerate([(1, layout()), (2, layout())]):
        config = configured(tmp_path / str(index), model, parallel=sizes, objective={"loss": loss}, data={
            "train": [str(path)], "validation_fraction": 0.3, "num_negatives": int(loss == "kl_distillation")})
        results = run_on_ranks(command, ranks, ["train", config])
        assert [code for code, *_ in results] == [0] * ranks, results[0][2]
        assert evaluated(tmp_path / str(index), ("loss",))["loss"] == pytest.approx(truth, rel=1e-4), ranks


def test_negatives_of_a_micro_batch_stay_there_in_validation(model, tmp_path):
    """Micro-batches of one query and its two documents: fewer negatives, so a smaller loss."""
    path = configured(tmp_path / "run", model, objective={"negatives": "micro_batch", "temperature": 0.1},
                      training={"micro_batch_size": 1})
    ((code, _, err, _),) = run_on_ranks(command, 1, ["train", path])
    assert code == 0, err
    assert 0 < evaluated(tmp_path / "run")["loss"] < 0.6 * expected(model)["loss"]


def test_fewer_held_out_rows_than_ranks_are_refused_on_all(model, tmp_path):
    path = configured(tmp_path / "run", model, data={"validation_fraction": 0.0001})
    assert_refused(run_on_ranks(command, 2, ["train", path]), "", "1 rows of", "raise data.validation_fraction")
