"""Prompts with a place for an instruction, in a run that is evaluated and exported."""

import json
import shutil

import pytest
import yaml
from sentence_transformers import SentenceTransformer

from tests.helpers.commands import evaluated, small_beir  # noqa: F401  a fixture
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import assert_refused, command, settings
from tests.helpers.scored_pairs import pairs  # noqa: F401  a fixture
from tests.helpers.toys import save_model

TEMPLATE = "Instruct: {instruction}\nQuery:"
DEFAULT, OTHER = "Given a question, find the passage that answers it", "refute the claim with a scientific document"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "bert", "bert", tokenizer=True)


def write(folder, model, **sections):
    values = settings(model, folder / "run")
    values["data"]["query_prompt"] = TEMPLATE
    values["embedding"]["instruction"] = DEFAULT
    values["training"] |= {"train_steps": 1, "learning_rate": 1e-3}
    for section, keys in sections.items():
        values[section] = values.get(section, {}) | keys
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "run.yaml")


@pytest.mark.slow
def test_each_set_is_asked_with_its_instruction_and_the_export_with_the_default(model, small_beir, pairs,
                                                                                tmp_path):
    """What the run logs of a set is what `evaluate` finds with the export, once that has the set's prompt written out;
    the export itself is loaded by Sentence Transformers and compared before it gets its name."""
    export = tmp_path / "export"
    sets = {"retrieval": [str(small_beir), {"path": str(small_beir), "instruction": OTHER, "name": "refuted"}],
            "sts": [{"path": pairs, "instruction": OTHER}], "at_start": False}
    config = write(tmp_path, model, evaluation=sets, checkpoint={"export_at_end": str(export)})
    results = run_on_ranks(command, 2, ["train", config])
    assert [code for code, *_ in results] == [0, 0], results[0][2]
    prompts = SentenceTransformer(str(export)).prompts
    assert prompts["query"] == f"Instruct: {DEFAULT}\nQuery:" and prompts["document"] == ""
    other = tmp_path / "other"
    shutil.copytree(export, other)
    facts = json.loads((other / "config_sentence_transformers.json").read_text())
    facts["prompts"]["query"] = f"Instruct: {OTHER}\nQuery:"
    (other / "config_sentence_transformers.json").write_text(json.dumps(facts))
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    metrics = {}
    for name, prefix, directory, data in (("few", "few/", export, small_beir), ("pairs", "", other, pairs),
                                          ("refuted", "refuted/", other, small_beir)):
        metrics[name] = evaluated(["--model", str(directory), "--data", str(data), "--max-length", "48"], 1)
        for key, value in metrics[name].items():
            assert logged[f"eval/{prefix}{key}"] == pytest.approx(value, abs=1e-6), (name, key)
    assert metrics["few"]["map"] != metrics["refuted"]["map"]
    assert metrics["pairs"] != evaluated(["--model", str(export), "--data", pairs], 1)


@pytest.mark.parametrize("sections, words", [
    ({"evaluation": {"retrieval": ["BEIR"]}}, ["evaluation.retrieval = ", "the set has none",
                                               "instruction: ...}, or set embedding.instruction"]),
    ({"evaluation": {"sts": [{"path": "PAIRS"}]}}, ["evaluation.sts = ", "the set has none"]),
    ({"checkpoint": {"export_at_end": "export"}}, ["checkpoint.export_at_end = ", "set embedding.instruction"]),
    ({"data": {"query_prompt": "query: "}, "evaluation": {"sts": [{"path": "PAIRS", "instruction": "x"}]}},
     ["evaluation.sts.instruction = 'x'", "data.query_prompt does not contain {instruction}"]),
    ({"data": {"query_prompt": ""}, "embedding": {"instruction": "x"}},
     ["embedding.instruction = 'x'", "no prompt contains {instruction}"]),
    ({"evaluation": {"retrieval": [{"path": "BEIR", "instruction": "a " * 50}]}},
     ["evaluation.retrieval = ", "data.query_max_length = 48", "leaves none for text"]),
    ({"embedding": {"instruction": "x"}, "evaluation": {"retrieval": ["BEIR", {"path": "BEIR", "instruction": "y"}]}},
     ["two sets are called 'few'", "name: ...}"]),
    ({"evaluation": {"retrieval": [{"path": "BEIR", "instructions": "x"}]}},
     ["evaluation.retrieval.instructions", "did you mean 'instruction'?"])])
def test_refusals_name_the_way_out(model, small_beir, pairs, tmp_path, sections, words):
    text = json.dumps({"embedding": {"instruction": None}} | sections)
    sections = json.loads(text.replace("BEIR", str(small_beir)).replace("PAIRS", pairs))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"query": f"query {row}", "positive": [f"text {row}"],
                                        "instruction": "find it"}) + "\n" for row in range(16)))
    sections["data"] = {"train": [str(rows)], **sections.get("data", {})}
    assert_refused(run_on_ranks(command, 1, ["train", write(tmp_path, model, **sections)]), *words)
