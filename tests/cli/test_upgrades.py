"""Upgrades that keep the index: runs against the vectors of an old model, maps, and evaluations of both."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.commands import BEIR, small_beir  # noqa: F401
from tests.helpers.foreign_directories_helpers import save_directory
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import assert_refused, command
from tests.helpers.runs import train
from tests.helpers.toys import MINI_EN, layout

ROWS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`model`, rows.jsonl, their documents in texts.jsonl (in another order), and the vectors of these in index/."""
    folder = tmp_path_factory.mktemp("upgrade")
    save_directory(folder / "model")
    rows = [json.loads(line) for line in MINI_EN.read_text(encoding="utf-8").splitlines()[:ROWS]]
    for row, other in zip(rows, rows[5:] + rows[:5], strict=True):
        row["negatives"] = other["positive"][:1]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = dict.fromkeys(text for row in reversed(rows) for text in row["positive"])
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    encoded(folder / "model", folder / "texts.jsonl", folder / "index")
    return folder


def called(*arguments, ranks=1):
    results = run_on_ranks(command, ranks, list(map(str, arguments)))
    assert all(code == 0 for code, *_ in results), results[0][2]
    assert all(out == "" for _, out, *_ in results[1:])
    return results[0][1]


def encoded(model, texts, output):
    called("encode", "--model", model, "--input", texts, "--output", output, "--role", "document")
    return output


def run_of(folder, directory, *, training=None, evaluation=None, data=None, parallel=None, steps=2, **objective):
    return {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "objective": {"temperature": 0.3, **{key: str(value) if isinstance(value, Path) else value
                                             for key, value in objective.items()}},
        "data": {"train": [str(folder / "rows.jsonl")], "num_negatives": 1, "shuffle": False, **(data or {})},
        "training": {"global_batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-3, "train_steps": steps,
                     **(training or {})},
        "parallel": parallel or layout(), "evaluation": evaluation or {},
        "checkpoint": {"directory": str(directory)}, "logging": {"every_steps": 1, "tensorboard": False}}


def trained(values, ranks=1):
    """The metrics of the steps, by step; those of evaluations among them."""
    run_on_ranks(train, ranks, values)
    lines = (Path(values["checkpoint"]["directory"]) / "metrics.jsonl").read_text().splitlines()
    found = {}
    for row in map(json.loads, lines):
        found.setdefault(row["step"], {}).update(row)
    return found


@pytest.mark.slow
def test_the_first_step_compares_with_the_documents_as_they_are(folder, tmp_path):
    """The old model is that in training before its first step: three sources of the same vectors, one loss."""
    cache = tmp_path / "cache"
    plain = trained(run_of(folder, tmp_path / "plain"))
    by_model = trained(run_of(folder, tmp_path / "model", compatible_with=folder / "model", compatible_weight=0.5,
                              vector_cache=cache))
    (kept,) = cache.iterdir()
    written = kept.stat().st_mtime_ns
    by_vectors = trained(run_of(folder, tmp_path / "vectors", compatible_with=folder / "index", compatible_weight=0.5))
    query_side = trained(run_of(folder, tmp_path / "query", training={"query_side_only": True}, vector_cache=cache))
    assert kept.stat().st_mtime_ns == written
    assert list(cache.iterdir()) == [kept], "another run with the same texts computes nothing"
    for run in (by_model, by_vectors):
        assert run[1]["compatible_loss"] == pytest.approx(plain[1]["loss"], rel=1e-5)
        assert run[1]["loss"] == pytest.approx(1.5 * plain[1]["loss"], rel=1e-5)
    assert by_vectors[2]["loss"] == pytest.approx(by_model[2]["loss"], rel=1e-5)
    assert query_side[1]["loss"] == pytest.approx(plain[1]["loss"], rel=1e-5)
    assert query_side[2]["loss"] != pytest.approx(plain[2]["loss"], rel=1e-3)
    assert query_side[1]["grad_norm"] < plain[1]["grad_norm"]


@pytest.mark.slow
@pytest.mark.parametrize("sizes, ranks", [({}, 2), ({"tp": 2}, 2), ({"pp": 2}, 2), ({"cp": 2}, 2)])
def test_runs_in_layouts_are_those_of_one_process(folder, tmp_path, sizes, ranks):
    for name, settings in (("compatible", {"compatible_with": folder / "model"}),
                           ("vectors", {"compatible_with": folder / "index"}),
                           ("query", {"training": {"query_side_only": True}}),
                           ("guided", {"guide_model": folder / "model", "mask_margin": -0.02}),
                           ("teacher", {"loss": "embedding_distillation", "teacher_model": folder / "model",
                                        "temperature": 0.02, "teacher_distance": "mse", "teacher_projection": True})):
        cache = {} if name == "vectors" else {"vector_cache": tmp_path / "cache"}
        one, several = (trained(run_of(folder, tmp_path / f"{name}{count}", parallel=shape, steps=3, **cache,
                                       **settings), count)
                        for count, shape in ((1, None), (ranks, layout(**sizes))))
        for step in (1, 2, 3):
            assert several[step]["loss"] == pytest.approx(one[step]["loss"], rel=1e-4), name
        assert one[3]["loss"] != pytest.approx(one[1]["loss"], rel=1e-3), name


@pytest.mark.slow
def test_evaluations_of_a_query_side_run_search_the_index(folder, small_beir, tmp_path):
    evaluation = {"retrieval": [str(small_beir)], "every_steps": 2}
    values = run_of(folder, tmp_path / "run", training={"query_side_only": True}, evaluation=evaluation,
                    vector_cache=tmp_path / "cache")
    values["checkpoint"]["export_at_end"] = str(tmp_path / "export")
    run = trained(values)
    assert "For queries alone: documents keep the vectors of model," in (tmp_path / "export" / "README.md").read_text()
    found = json.loads(called("evaluate", "--model", tmp_path / "run", "--data", small_beir, "--documents-from",
                              folder / "model"))
    assert run[2]["eval/ndcg@10"] == pytest.approx(found["ndcg@10"], abs=1e-6)
    assert run[0]["eval/ndcg@10"] == pytest.approx(
        json.loads(called("evaluate", "--model", folder / "model", "--data", small_beir))["ndcg@10"], abs=1e-6)
    del values["checkpoint"]["export_at_end"]
    resumed = trained({**values, "training": {**values["training"], "train_steps": 3}})
    assert resumed[3]["loss"] > 0


@pytest.mark.slow
def test_rows_name_the_documents_of_an_index_by_id(folder, tmp_path):
    """Texts that were changed since, but have their ids."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    texts = [json.loads(line)["text"] for line in (folder / "texts.jsonl").read_text().splitlines()]
    named = [{"_id": f"d{index}", "text": text} for index, text in enumerate(texts)]
    (tmp_path / "named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    for row in rows:
        for side in ("positive", "negatives"):
            row[f"{side.removesuffix('s')}_ids"] = [f"d{texts.index(text)}" for text in row[side]]
    rows[3]["positive"] = ["another text"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": [str(tmp_path / "rows.jsonl")]}
    found = trained(run_of(folder, tmp_path / "named", compatible_with=folder / "index",
                           compatible_texts=tmp_path / "named.jsonl", data=data))
    plain = trained(run_of(folder, tmp_path / "plain", compatible_with=folder / "index"))
    assert found[1]["compatible_loss"] == pytest.approx(plain[1]["compatible_loss"], rel=1e-5)
    assert found[1]["loss"] != pytest.approx(plain[1]["loss"], rel=1e-4)


@pytest.mark.slow
def test_what_a_run_cannot_keep_is_refused(folder, tmp_path):
    narrow = tmp_path / "narrow.npy"
    np.save(narrow, np.ones((ROWS, 8), np.float32))
    some = tmp_path / "some.jsonl"
    some.write_text("".join(f"{line}\n" for line in (folder / "texts.jsonl").read_text().splitlines()[1:]))
    encoded(folder / "model", some, tmp_path / "some")
    texts = folder / "texts.jsonl"
    shutil.copytree(folder / "index", tmp_path / "moved")
    summary = json.loads((tmp_path / "moved" / "vectors.json").read_text())
    (tmp_path / "moved" / "vectors.json").write_text(json.dumps({**summary, "texts": ["gone.jsonl", 1, 1]}))
    for settings, words in (
            ({"compatible_with": narrow}, ("objective.compatible_with", "does not say which texts")),
            ({"compatible_with": narrow, "compatible_texts": texts}, ("8 components", "32", "migrate")),
            ({"compatible_with": tmp_path / "moved"}, ("gone.jsonl", "compatible_texts")),
            ({"compatible_with": tmp_path / "some"}, ("rows.jsonl:", "is not in the index", "1 documents")),
            ({"compatible_with": folder / "index", "compatible_texts": some}, (f"{ROWS} vectors for the", "texts of")),
            ({"compatible_with": tmp_path / "nothing"}, ("objective.compatible_with",)),
            ({"compatible_with": folder / "model", "embedding": {"embedding_dim": 16}},
             ("32 components", "training 16; remove embedding.embedding_dim"))):
        embedding = {"embedding": settings.pop("embedding", {})}
        values = run_of(folder, tmp_path / "run", **settings) | embedding
        arguments = [f"{section}.{key}={json.dumps(value)}" for section, keys in values.items()
                     for key, value in keys.items() if section != "model"]
        config = tmp_path / "run.yaml"
        config.write_text(f"model: {{path: {folder / 'model'}, dtype: float32}}\n")
        assert_refused(run_on_ranks(command, 2, ["train", str(config), *arguments]), *words)


def corpus_vectors(model, output):
    return encoded(model, BEIR / "corpus.jsonl", output)


@pytest.mark.slow
def test_a_map_brings_an_index_to_another_model(folder, tmp_path):
    """The new model's vectors are the old ones, rotated: a map finds them, and the search does what it did."""
    old = corpus_vectors(folder / "model", tmp_path / "old")
    before = np.concatenate([np.load(file) for file in sorted(old.glob("*.npy"))])
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((32, 32)))[0].astype(np.float32)
    np.save(tmp_path / "rotated.npy", before @ rotation)
    for kind in ("orthogonal", "affine", "mlp", "auto"):
        report = json.loads(called("migrate", "--old", tmp_path / "rotated.npy", "--new", old, "--kind", kind,
                                   "--output", tmp_path / kind))
        assert report["cosine"] > 0.999, report
        assert report["cosine_before"] < 0.5
        assert report["pairs"] == len(before)
    arguments = ["evaluate", "--model", folder / "model", "--data", BEIR]
    plain, mapped, raw = (json.loads(called(*arguments, *further, ranks=2)) for further in (
        [], ["--documents-from", tmp_path / "rotated.npy", "--map", tmp_path / "orthogonal"],
        ["--documents-from", tmp_path / "rotated.npy"]))
    assert mapped == pytest.approx(plain, abs=1e-3)
    assert raw["ndcg@10"] < 0.5 * plain["ndcg@10"]
    called("migrate", "--old", tmp_path / "rotated.npy", "--map", tmp_path / "orthogonal", "--output", tmp_path / "new")
    written = np.concatenate([np.load(file) for file in sorted((tmp_path / "new").glob("*.npy"))])
    np.testing.assert_allclose(written, before, atol=1e-4)
    again = called("evaluate", "--model", folder / "model", "--data", BEIR, "--vectors", tmp_path / "new")
    assert json.loads(again) == pytest.approx(mapped, abs=1e-5)


@pytest.mark.slow
def test_a_map_is_fitted_to_what_the_new_model_gives_for_a_sample(folder, tmp_path):
    old = corpus_vectors(folder / "model", tmp_path / "old")
    new = save_directory(tmp_path / "new", pooling="cls")
    arguments = ["migrate", "--old", old, "--model", new, "--max-pairs", "200", "--kind", "affine"]
    one, two = (json.loads(called(*arguments, "--data", BEIR, "--output", tmp_path / f"map{ranks}", ranks=ranks))
                for ranks in (1, 2))
    assert one["cosine"] == pytest.approx(two["cosine"], abs=1e-4)
    assert one["pairs"] == 200
    wanted = json.loads(called("evaluate", "--model", new, "--data", BEIR))["ndcg@10"]
    assert one["ndcg@10"]["re_embedded"] == pytest.approx(wanted, abs=1e-6)
    mapped = json.loads(called("evaluate", "--model", new, "--data", BEIR, "--documents-from", old, "--map",
                               tmp_path / "map1"))["ndcg@10"]
    assert one["ndcg@10"]["mapped"] == pytest.approx(mapped, abs=1e-6)
    assert one["retention"] == pytest.approx(mapped / wanted, abs=1e-6)
    by_model = json.loads(called("evaluate", "--model", new, "--data", BEIR, "--documents-from", folder / "model",
                                 "--map", tmp_path / "map1"))["ndcg@10"]
    assert by_model == pytest.approx(mapped, abs=1e-6)
    assert one["cosine"] > one["cosine_before"]


def test_options_that_do_not_go_together_are_refused(folder, tmp_path):
    index, model, out = folder / "index", folder / "model", tmp_path / "out"
    migrate, evaluate = ["migrate", "--old", index], ["evaluate", "--model", model, "--data", BEIR]
    np.save(tmp_path / "few.npy", np.ones((60, 32), np.float32))
    np.save(tmp_path / "wide.npy", np.ones((437, 40), np.float32))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "vector_map.json").write_text("{}")
    for arguments, words in (
            ([*migrate, "--output", out], ("--old", "--new, --model and --map")),
            ([*migrate, "--new", index, "--model", model, "--output", out], ("--new and --model",)),
            ([*migrate, "--new", index, "--pairs", folder / "texts.jsonl", "--output", out], ("--pairs", "--model")),
            ([*migrate, "--model", model, "--output", out], ("--model", "--pairs")),
            ([*migrate, "--new", index, "--output", out], ("vectors; a map needs at least 50 pairs",)),
            (["migrate", "--old", tmp_path / "few.npy", "--new", index, "--output", out], ("for the 60 vectors",)),
            (["migrate", "--old", tmp_path / "few.npy", "--new", index, "--max-pairs", 12, "--output", out],
             ("--max-pairs 12", "at least 50 pairs")),
            ([*migrate, "--map", tmp_path / "broken", "--output", out], ("--map", "no map of vectors")),
            ([*migrate, "--map", out, "--kind", "mlp", "--output", out], ("--kind mlp", "no effect with --map")),
            ([*migrate, "--map", out, "--max-pairs", 90, "--output", out], ("--max-pairs 90", "no effect with --map")),
            ([*evaluate, "--map", tmp_path / "broken"], ("--map", "--documents-from")),
            ([*evaluate, "--documents-from", index, "--vectors", index], ("--documents-from", "--vectors")),
            ([*evaluate, "--documents-from", index], ("--documents-from", "vectors for the 437 rows")),
            ([*evaluate, "--documents-from", tmp_path / "wide.npy"], ("40 components", "32", "migrate"))):
        assert_refused(run_on_ranks(command, 1, list(map(str, arguments))), *words)
    assert not out.exists()
