"""The command `plan`: its exit codes, its table of GPUs, and what it counts of the rows."""

import dataclasses
import json
import re

import pytest
import yaml

from megatron_embed.__main__ import main
from megatron_embed.config.load import load_config
from megatron_embed.parallel.open_files import files_of_store_process, files_with_relays
from megatron_embed.planning.hardware import GPUS
from megatron_embed.planning.layouts import candidates, plan_layout
from megatron_embed.planning.shapes import shape_of
from tests.helpers.launcher_variables import _one_rank  # noqa: F401  without a launcher's variables
from tests.helpers.toys import REPOSITORY

LARGE = str(REPOSITORY / "configs" / "qwen3_8b_embed_tp2_8xh100.yaml")


def plan(capsys, *arguments):
    """(exit code, stdout, stderr)"""
    code = main(["plan", *arguments])
    return code, *capsys.readouterr()


def number_after(name, text):
    return float(re.search(rf"^\s+{name}\s+([0-9.]+)", text, re.MULTILINE).group(1))


@pytest.mark.parametrize("name, fits", [("a100", True), ("h100", True), ("h200", True), ("b200", True)])
def test_every_gpu_of_the_table(capsys, name, fits):
    code, out, _ = plan(capsys, LARGE, "--gpus", "8", "--gpu", name)
    assert code == (0 if fits else 2)
    assert f"8 x {GPUS[name].name}, tp2: 4 data-parallel ranks" in out
    assert number_after("of", out) == GPUS[name].memory_gib
    assert ("it fits" in out) == fits
    parts = ("parameters", r"gradients \(float32\)", "optimizer", r"activations \(estimate\)", "embeddings and loss",
             "reserve")
    memory = out[out.index("Memory per GPU"):out.index("One step:")]
    assert sum(number_after(part, memory) for part in parts) == pytest.approx(number_after("total", memory), abs=0.4)
    step = out[out.index("One step:"):]
    assert number_after("total", step) > number_after("matrix products", step) > 0.0
    table = out[out.index("Layouts that fit, fastest first"):].splitlines()[2:]
    seconds = [float(line.split()[-1]) for line in table]
    assert len(seconds) == 5 and seconds == sorted(seconds)
    assert all(float(line.split()[-2]) <= GPUS[name].memory_gib for line in table)


def test_memory_decides_and_the_remedy_works(capsys):
    """A batch that is too large for the H100 and not for the H200; what the advice names makes it fit."""
    wide = [LARGE, "--gpus", "8", "training.micro_batch_tokens=20480"]
    code, out, _ = plan(capsys, *wide, "--gpu", "h100")
    assert code == 2 and "IT DOES NOT FIT" in out and "lower training.micro_batch_tokens" in out
    assert plan(capsys, *wide, "--gpu", "h200")[0] == 0
    assert plan(capsys, *wide, "--gpu", "h100", "training.recompute=full")[0] == 0
    assert "Open files" not in out and files_of_store_process(1024) == 2148 and files_with_relays(1024, 8) == 636
    assert "Open files of the process that hosts the run's store: 1,124" in plan(
        capsys, LARGE, "--gpus", "512", "training.global_batch_size=4096", "--gpu", "h200")[1]
    code, out, _ = plan(capsys, LARGE, "--gpus", "8", "model.path=Qwen/Qwen3-32B",
                        "parallel.tensor_model_parallel_size=1", "training.micro_batch_tokens=1024")
    assert code == 2 and "The model needs most of it" in out


def test_token_budget_that_it_advises_fits(capsys):
    """For a larger GPU a larger budget; none in a layout whose model alone takes the memory."""
    larger = "training.global_batch_size=2048"
    asked, budgets = [LARGE, "--gpus", "8", "training.micro_batch_tokens=null", larger], []
    for gpu in ("h100", "h200"):
        _, out, _ = plan(capsys, *asked, "--gpu", gpu)
        assert "training.micro_batch_size counts queries" in out
        assert "The first pass, which keeps no activations, embeds up to 4 micro-batches as one" in out
        line = re.search(r"micro_batch_tokens = (\d+) \(([0-9.]+) of (\d+) GiB, .* the fastest multiple of 1,024", out)
        tokens, total, memory = line.groups()
        code, out, _ = plan(capsys, LARGE, "--gpus", "8", f"training.micro_batch_tokens={tokens}", larger, "--gpu",
                            gpu)
        assert code == 0 and f"{number_after('total', out):.1f}" == total and "counts queries" not in out
        assert float(total) <= 0.9 * int(memory)
        budgets.append(int(tokens))
    assert budgets == [13312, 16384]
    _, out, _ = plan(capsys, *asked, "model.path=Qwen/Qwen3-32B")
    assert "Token budget of a micro-batch: no multiple of 1,024" in out


def test_first_pass_is_that_of_the_settings(capsys):
    for settings, line in ((["training.hidden_dropout=0.1"], None), (["objective.negatives=micro_batch"], None),
                           (["training.first_pass_micro_batches=2"], "embeds up to 2 micro-batches as one")):
        code, out, _ = plan(capsys, LARGE, "--gpus", "8", *settings)
        assert code == 0 and (line in out if line else "The first pass" not in out)


def test_layout_that_is_impossible_is_told_as_training_tells_it(capsys):
    code, out, err = plan(capsys, LARGE, "--gpus", "8", "parallel.tensor_model_parallel_size=16")
    assert (code, out) == (2, "")
    assert "parallel.tensor_model_parallel_size = 16: world size = 8 is not a multiple" in err


@pytest.fixture
def small(tmp_path):
    """Writes rows and a configuration that names them; gives its path."""

    def write(rows, **sections):
        (tmp_path / "config.json").write_text(json.dumps({
            "model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 4, "head_dim": 16, "intermediate_size": 128, "vocab_size": 1000,
            "max_position_embeddings": 512}))
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {"model": {"path": str(tmp_path)}, "data": {"train": [str(tmp_path / "rows.jsonl")],
                  "query_max_length": 32, "document_max_length": 128},
                  "training": {"global_batch_size": 64, "micro_batch_size": 8}}
        for section, keys in sections.items():
            values[section] = {**values.get(section, {}), **keys} if isinstance(keys, dict) else keys
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    return write


def tokens(out):
    """Tokens of the largest micro-batch in the report."""
    return int(re.search(r"micro-batches of up to ([0-9,]+) tokens", out).group(1).replace(",", ""))


def test_documents_are_those_of_the_rows(capsys, small):
    rows = [{"query": "q", "positive": ["a"], "negatives": ["b"] * count} for count in (0, 3, 1)]
    for wanted, counted in ((2, 2), (3, 3), (50, 3)):
        code, out, _ = plan(capsys, small(rows, data={"num_negatives": wanted}), "--gpus", "1")
        assert code == 0
        assert f"3 rows of data.train, with up to 1 positive and {counted} negative documents each in use." in out
        assert tokens(out) == 8 * (32 + (1 + counted) * 128)
    code, out, _ = plan(capsys, small(rows, data={"num_negatives": 50, "train": ["gone.jsonl"]}), "--gpus", "1")
    assert "The rows of data.train are not here: each query is assumed to have 1 positive and 50 negative" in out
    assert tokens(out) == 8 * (32 + 51 * 128)


def test_token_budget_is_compared_with_the_rows(capsys, small):
    rows = [{"query": "q", "positive": ["a"], "negatives": ["b"]}]
    settings = {"data": {"num_negatives": 7}, "objective": {"negatives": "micro_batch"}}
    code, out, _ = plan(capsys, small(rows, training={"micro_batch_tokens": 288}, **settings), "--gpus", "1")
    assert code == 0 and "of up to 288 tokens" in out
    code, _, err = plan(capsys, small(rows, training={"micro_batch_tokens": 287}, **settings), "--gpus", "1")
    assert code == 2 and "nearest valid: 288" in err
    # What is proposed would be taken: four tensor-parallel ranks get equal shares of 4 * 73 tokens, of 289 they do not.
    for budget, is_proposed in ((292, True), (289, False)):
        code, out, _ = plan(capsys, small(rows, training={"micro_batch_tokens": budget}, **settings), "--gpus", "4")
        layouts = re.findall(r"^  (\S.*?)  +\d+ tokens ", out, re.MULTILINE)
        assert code == 0 and any(name.startswith("dp4") for name in layouts)
        assert any(name.startswith("tp4") for name in layouts) == is_proposed, out


def test_lists_of_a_reranker(capsys, small):
    rows = [{"query": "q", "documents": ["a", "b", "c", "d"], "labels": labels}
            for labels in ([1, 0, 0, 0], [1, 1, 0, 0])]
    task = {"task": "reranker", "objective": {"loss": "listwise"}, "reranker": {"max_length": 100}}
    for wanted, documents in ((0, 4), (1, 3), (9, 4)):
        code, out, _ = plan(capsys, small(rows, data={"num_negatives": wanted}, **task), "--gpus", "1")
        assert code == 0, out
        assert f"2 rows of data.train, with up to {documents} documents each in use." in out
        assert tokens(out) == 8 * documents * 100
    code, out, _ = plan(capsys, small(rows, data={"train": ["gone.jsonl"]}, **task), "--gpus", "1")
    assert "assumed to have 1 document, since data.num_negatives = 0 takes all that a row has" in out


def test_stages_need_not_divide_the_layers(capsys):
    """36 layers in stages of 4 and 5: proposed if nothing else is possible, slower than their share."""
    config, shape, gpu = load_config(LARGE, []), shape_of(load_config(LARGE, []).model.path), GPUS["h100"]
    stages = {candidate.parallel.pipeline_model_parallel_size for candidate in candidates(config, shape, 8)}
    assert stages == {1, 2, 4, 8} and shape.num_layers % 8
    assert any(candidate.parallel.virtual_pipeline_model_parallel_size == 2 and
               candidate.parallel.pipeline_model_parallel_size == 8 for candidate in candidates(config, shape, 16))
    even, uneven = (plan_layout(with_stages(config, pp), shape, 8, gpu).time.compute for pp in (4, 8))
    assert uneven / even == pytest.approx(5 * 8 / 36)


def test_context_parallelism_is_tried_for_long_texts():
    config, shape = load_config(LARGE, []), shape_of(load_config(LARGE, []).model.path)
    long = dataclasses.replace(config, data=dataclasses.replace(config.data, document_max_length=32768),
                               training=dataclasses.replace(config.training, micro_batch_tokens=32768))
    for candidate_of, sizes in ((config, {1}), (long, {1, 2, 4, 8})):
        parallels = [candidate.parallel for candidate in candidates(candidate_of, shape, 16)]
        assert {parallel.context_parallel_size for parallel in parallels} == sizes
        assert all(parallel.tensor_model_parallel_size * parallel.context_parallel_size <= 8 for parallel in parallels)
    by_heads = dataclasses.replace(long, parallel=dataclasses.replace(long.parallel, cp_comm_type="a2a"))
    parallels = [candidate.parallel for candidate in candidates(by_heads, shape, 16)]
    assert max(parallel.tensor_model_parallel_size * parallel.context_parallel_size for parallel in parallels) == (
        shape.num_query_groups)


def with_stages(config, size):
    parallel = dataclasses.replace(config.parallel, tensor_model_parallel_size=1, pipeline_model_parallel_size=size)
    return dataclasses.replace(config, parallel=parallel)
