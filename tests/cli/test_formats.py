"""Training on a file of another trainer gives the losses of the same rows in ours."""

import dataclasses
import json

import pytest
import yaml

from tests.helpers.foreign_rows import FORMATS, WITH_INSTRUCTION, lines, our_rows
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import command, settings
from tests.helpers.toys import save_model

TRAINED = ("swift-response", "swift-messages", "flag-embedding", "tevatron-passages", "tevatron-ids", "st-anchor",
           "dpr", "nemo", "beir", "parquet", "saved", "arrow", "gz", "zst", "streamed")
QUICK = ("swift-messages", "tevatron-ids", "beir", "parquet", "zst", "streamed")
"""One of each kind: messages, passages with ids, a folder, a table, compressed, streamed."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "bert", "bert", tokenizer=True)


def configured(folder, model, file, prompt):
    """Three steps of shuffled rows, none of which is a step's whole data."""
    values = settings(model, folder / "run")
    values["data"] |= {"train": [file], "num_negatives": 1, "query_prompt": prompt}
    values["training"] = {"global_batch_size": 4, "micro_batch_size": 2, "train_steps": 3, "learning_rate": 1e-3}
    values["checkpoint"] = {}
    values["logging"]["directory"] = str(folder / "run")
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "run.yaml")


def trained(paths):
    """Exit codes and what the runs said, one after the other in one worker."""
    return [command(["train", path])[::2] for path in paths]


def losses(folder):
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in metrics]


@pytest.mark.parametrize("names", [QUICK, pytest.param([name for name in TRAINED if name not in QUICK],
                                                       marks=pytest.mark.slow)], ids=["quick", "others"])
def test_training_on_every_format_gives_the_losses_of_ours(model, names, tmp_path):
    paths, prompts = [], {"plain": "query: ", "instructed": "Instruct: {instruction}\nQuery:"}
    for name, prompt in prompts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "ours.jsonl").write_bytes(lines(our_rows()))
        paths.append(configured(tmp_path / name, model, str(tmp_path / name / "ours.jsonl"), prompt))
    for name in names:
        (tmp_path / name).mkdir()
        file = {key: value for key, value in dataclasses.asdict(FORMATS[name](tmp_path / name, our_rows())).items()
                if key in ("path", "corpus", "streaming") and value}
        prompt = prompts["instructed" if name in WITH_INSTRUCTION else "plain"]
        paths.append(configured(tmp_path / name, model, file, prompt))
    (results,) = run_on_ranks(trained, 1, paths)
    assert [code for code, _ in results] == [0] * len(paths), results
    assert losses(tmp_path / "plain") != losses(tmp_path / "instructed")
    for name in names:
        ours = losses(tmp_path / ("instructed" if name in WITH_INSTRUCTION else "plain"))
        assert len(set(ours)) == 3
        assert losses(tmp_path / name) == ours, name
