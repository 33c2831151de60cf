"""What cannot be written, or would be another model elsewhere, is refused, and nothing half-written is left."""

import contextlib
import errno
import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer

from megatron_embed.checkpoint.files import step_directories
from megatron_embed.export import embedding as export
from megatron_embed.export.embedding import stock_runs_causally
from megatron_embed.models.families import model_shape
from tests.helpers.ranks import run_on_ranks
from tests.helpers.refusals import assert_refused, command, settings
from tests.helpers.toys import MINILM, layout, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", tokenizer=True)


def config_file(folder, directory, /, **sections):
    values = settings(directory, folder / "run")
    for section, keys in sections.items():
        values[section] = values.get(section, {}) | keys
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "run.yaml")


def full():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def disk_full_at(part, rank):
    """On one rank, once there is a checkpoint, the writing of this part of the next one finds no space."""
    import torch.distributed as dist

    from megatron_embed.checkpoint import save
    from megatron_embed.platform.compat import dist_checkpointing  # noqa: F401  loads the module patched below

    if part == "tensors":
        from megatron.core.dist_checkpointing.strategies import filesystem_async as owner

        name = "_write_item"
    else:
        owner, name = save, part
    original = getattr(owner, name)

    def fail(*args, **options):
        second = (Path(os.environ["RUN"]) / "latest").is_file()
        if second and dist.get_rank() == rank:
            raise full()
        return original(*args, **options)

    setattr(owner, name, functools.wraps(original)(fail))
    try:
        yield
    finally:
        setattr(owner, name, original)


def train_on_full_disk(arguments, run, part, rank):
    os.environ["RUN"] = run
    with disk_full_at(part, rank):
        return command(arguments)


@pytest.mark.parametrize("part, rank, background", [
    pytest.param("tensors", 1, False, marks=pytest.mark.slow), ("tensors", 0, True),
    pytest.param("write_atomically", 0, False, marks=pytest.mark.slow),
    pytest.param("link_tree", 0, False, marks=pytest.mark.slow),
    pytest.param("make_folder_on_free_disk", 0, False, marks=pytest.mark.slow)])
def test_disk_that_fills_up_during_a_save_ends_all_ranks_alike(model, tmp_path, part, rank, background):
    path = config_file(tmp_path, model, training={"train_steps": 4},
                       checkpoint={"save_every_steps": 2, "async_save": background},
                       parallel=layout(2))  # data-parallel replicas leave the writing to the first of them
    results = run_on_ranks(train_on_full_disk, 2, ["train", path], str(tmp_path / "run"), part, rank)
    assert [code for code, *_ in results] == [2, 2]
    errors = [[line for line in err.splitlines() if "megatron-embed: error" in line] for _, _, err, _ in results]
    ((line,), others) = errors
    assert others == []
    for words in ("checkpoint.directory = ", "step_000004 could not be written (", "No space left on device",
                  "another disk"):
        assert words in line, line
    assert not [entry.name for entry in (tmp_path / "run").iterdir() if entry.name.endswith(".tmp")]
    assert (tmp_path / "run" / "latest").read_text() == "step_000002\n"
    results = run_on_ranks(command, 2, ["train", path])
    assert [code for code, *_ in results] == [0, 0], results[0][2]
    assert list(step_directories(tmp_path / "run")) == [2, 4]


@pytest.mark.parametrize("target, reason", [
    ("/dev/full", "No space left"), ("metrics.jsonl", "is a link to another file")])
def test_metrics_that_cannot_be_written_end_all_ranks_alike(model, tmp_path, target, reason):
    path = config_file(tmp_path, model, training={"train_steps": 3}, logging={"directory": str(tmp_path / "log"),
                                                                               "every_steps": 1})
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "metrics.jsonl").symlink_to(target)
    assert_refused(run_on_ranks(command, 2, ["train", path]), f"logging.directory = {str(tmp_path / 'log')!r}", reason)


def test_two_runs_do_not_write_one_log(model, tmp_path):
    import fcntl

    path = config_file(tmp_path, model, logging={"directory": str(tmp_path / "log")})
    (tmp_path / "log").mkdir()
    with (tmp_path / "log" / ".lock").open("a+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        assert_refused(run_on_ranks(command, 2, ["train", path]), f"logging.directory = {str(tmp_path / 'log')!r}",
                       "another run writes there")


def train_without_room_for_the_lock(arguments):
    import os

    original = os.ftruncate

    def ftruncate(descriptor, length):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".lock"):
            raise full()
        return original(descriptor, length)

    os.ftruncate = ftruncate
    try:
        return command(arguments)
    finally:
        os.ftruncate = original


def test_a_lock_that_finds_no_room_is_refused_on_all_ranks(model, tmp_path):
    path = config_file(tmp_path, model)
    assert_refused(run_on_ranks(train_without_room_for_the_lock, 2, ["train", path]),
                   f"checkpoint.directory = {str(tmp_path / 'run')!r}", ".lock cannot be written", "free disk space")


def test_a_lock_that_leads_elsewhere_is_not_followed(model, tmp_path):
    path = config_file(tmp_path, model)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "elsewhere")
    assert_refused(run_on_ranks(command, 2, ["train", path]), f"checkpoint.directory = {str(tmp_path / 'run')!r}",
                   ".lock cannot be opened")
    assert not (tmp_path / "elsewhere").exists()


def encode_on_full_disk(arguments):
    import numpy

    original = numpy.save

    def save(file, array):
        file.write(b"half")
        raise full()

    numpy.save = save
    try:
        return command(arguments)
    finally:
        numpy.save = original


def test_disk_that_fills_up_under_the_vectors(model, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n')
    output = tmp_path / "vectors.npy"
    output.write_bytes(b"of yesterday")
    arguments = ["encode", "--model", model, "--input", str(tmp_path / "texts.jsonl"), "--output", str(output)]
    assert_refused(run_on_ranks(encode_on_full_disk, 2, arguments), f"--output {output}: could not be written",
                   "No space left on device")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["texts.jsonl", "vectors.npy"]
    assert output.read_bytes() == b"of yesterday"


def test_tokenizer_that_cannot_pad_ends_all_ranks_alike(model, tmp_path):
    other = Path(shutil.copytree(model, tmp_path / "other"))
    (other / "vocab.txt").unlink()
    values = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(values | {"padding": None}))
    (other / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (other / "special_tokens_map.json").unlink(missing_ok=True)
    results = run_on_ranks(command, 2, ["train", config_file(tmp_path, str(other))])
    assert_refused(results, f"model.path = {str(other)!r}: ", "names neither pad_token nor eos_token",
                   "tokenizer_config.json")


def test_bidirectional_decoder_is_exported_and_the_stock_library_runs_it_so(model, tmp_path):
    path = config_file(tmp_path, model, model={"bidirectional": True},
                       checkpoint={"export_at_end": str(tmp_path / "st")})
    ((code, _, err, _),) = run_on_ranks(command, 1, ["train", path])
    assert code == 0, err  # both exports compare vectors before they get their names
    target = tmp_path / "again"
    arguments = ["convert", "megatron-to-hf", str(tmp_path / "run"), str(target), "--format", "sentence-transformers"]
    ((code, _, err, _),) = run_on_ranks(command, 1, arguments)
    assert code == 0, err
    vectors = []
    for is_causal in (False, True):
        config = json.loads((target / "config.json").read_text())
        assert config["is_causal"] is False or is_causal
        (target / "config.json").write_text(json.dumps(config | {"is_causal": is_causal}))
        vectors.append(SentenceTransformer(str(target)).encode(["What is the capital of France?"]))
    assert abs(vectors[0] - vectors[1]).max() > 1e-3


def test_old_transformers_that_would_run_a_bidirectional_decoder_causally_is_told_from_a_new_one(model, monkeypatch):
    shape = model_shape(model)
    for installed, expected in (("5.1.3", True), ("5.2.0", False), ("5.23.0", False)):
        monkeypatch.setattr(export, "version", lambda name, installed=installed: installed)
        assert stock_runs_causally(shape, True) is expected
        assert not stock_runs_causally(shape, False)
        assert not stock_runs_causally(model_shape(MINILM), True)


@pytest.mark.parametrize("values", [
    {"model_type": "t5", "d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48, "vocab_size": 100},
    {"model_type": "gemma3_text", "use_bidirectional_attention": True, "hidden_size": 32, "num_hidden_layers": 2,
     "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 100, "max_position_embeddings": 64}],
    ids=lambda values: values["model_type"])
def test_old_transformers_runs_models_that_are_bidirectional_by_themselves(tmp_path, monkeypatch, values):
    (tmp_path / "config.json").write_text(json.dumps(values))
    monkeypatch.setattr(export, "version", lambda name: "5.0.0")
    assert model_shape(tmp_path).bidirectional
    assert not stock_runs_causally(model_shape(tmp_path))


def test_bfloat16_run_resumes_bit_for_bit_and_tensorboard_holds_its_curve(model, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses = {}
    for name, stops in (("straight", [4]), ("resumed", [2, 4])):
        for steps in stops:
            path = config_file(tmp_path, model, model={"dtype": "bfloat16"}, logging={"tensorboard": True},
                               training={"train_steps": steps, "lr_decay_style": "constant", "learning_rate": 1e-3},
                               checkpoint={"directory": str(tmp_path / name)})
            ((code, _, err, _),) = run_on_ranks(command, 1, ["train", path])
            assert code == 0, err
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["loss"] for line in lines]
        events = EventAccumulator(str(tmp_path / name / "tensorboard"))
        events.Reload()
        scalars = events.Scalars("train/loss")
        assert [event.step for event in scalars] == [1, 2, 3, 4]
        torch.testing.assert_close([event.value for event in scalars], losses[name], rtol=1e-6, atol=0)
    assert len(set(losses["straight"])) == 4
    assert losses["resumed"] == losses["straight"]


def test_epochs_are_steps_over_all_rows(model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"query": f"question {n}", "positive": [f"answer {n}"]}) + "\n"
                            for n in range(20)))
    path = config_file(tmp_path, model, data={"train": [str(rows)]}, training={"train_steps": None, "epochs": 1.5})
    assert run_on_ranks(command, 1, ["train", path])[0][0] == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]  # 1.5 x 20 rows / 8, rounded up
