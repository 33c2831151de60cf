"""`train` with a loss of pairs: the numbers that it logs, and rows of another kind."""

import json

import yaml

from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import assert_refused, command, settings
from tests.helpers.toys import layout, save_model


def test_pairs_train_over_two_ranks_and_other_rows_are_refused(tmp_path):
    model, rows = save_model(tmp_path / "model", "bert", tokenizer=True), tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps({"text_a": f"number {row} is a number", "text_b": f"{row % 3} is none",
                                        "score": row % 3 / 2}) + "\n" for row in range(24)), encoding="utf-8")
    values = settings(model, tmp_path / "run")
    values["embedding"] = {"pooling": "mean", "matryoshka_dims": [32, 8]}
    values["objective"] = {"loss": "cosent", "temperature": 0.05}
    values["data"] |= {"train": [str(rows)], "shuffle": False}
    values["training"] |= {"global_batch_size": 8, "micro_batch_size": 2, "train_steps": 3, "learning_rate": 1e-3}
    values["parallel"] = layout()
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    results = run_on_ranks(command, 2, ["train", str(path)])
    assert [code for code, *_ in results] == [0, 0], results[0][2]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = lines[-1]
    assert {"loss", "similarity", "loss@32", "loss@8", "grad_norm"} <= last.keys()
    assert abs(last["loss"] - last["loss@32"] - last["loss@8"]) < 1e-9 * last["loss"]
    assert last["grad_norm"] > 0.01
    values["objective"] = {"loss": "info_nce"}
    path.write_text(yaml.safe_dump(values))
    assert_refused(run_on_ranks(command, 2, ["train", str(path)]), f"{rows}:1", "pair with a score")
    values["objective"] = {"loss": "cosine_similarity"}
    path.write_text(yaml.safe_dump(values))
    with rows.open("a") as file:
        file.write(json.dumps({"text_a": "a 24", "text_b": "b", "score": 1e39}) + "\n")
    assert_refused(run_on_ranks(command, 2, ["train", str(path)]), f"{rows}:25: score = 1e+39 is not finite in float32")
