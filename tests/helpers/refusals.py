"""Calls of the program on ranks, and the checks of an error message."""

import contextlib
import io
import time
from pathlib import Path

import pytest

from tests.helpers.toys import MAX_LENGTH, MINI_EN, save_model

SECONDS = 20

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", tokenizer=True)


def command(arguments):
    """(exit code, stdout, stderr, seconds) of one call of the program in this worker."""
    from megatron_embed.__main__ import main

    out, err, started = io.StringIO(), io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return code, out.getvalue(), err.getvalue(), time.monotonic() - started


def settings(model, directory):
    return {
        "model": {"path": model, "dtype": "float32"},
        "embedding": {"pooling": "mean"},
        "data": {"train": [str(MINI_EN)], "query_max_length": MAX_LENGTH, "document_max_length": MAX_LENGTH},
        "training": {"global_batch_size": 8, "micro_batch_size": 4, "train_steps": 2},
        "checkpoint": {"directory": str(directory)},
        "logging": {"every_steps": 1, "tensorboard": False}}


def assert_refused(results, *words):
    for rank, (code, out, err, seconds) in enumerate(results):
        assert code == 2, err
        assert out == ""
        assert seconds < SECONDS
        if rank:
            assert err == ""
    lines = [line for line in results[0][2].splitlines() if line.startswith("megatron-embed: error: ")]
    assert len(lines) == 1, results[0][2]
    assert "Traceback" not in results[0][2]
    for word in words:
        assert word in lines[0], lines[0]


def line_of(path, text):
    """Number of the line of a file that holds the text."""
    return next(line_number for line_number, line in enumerate(Path(path).read_text().splitlines(), 1) if text in line)
