"""The command: what it refuses, and a process that is stopped while it loads and while it answers."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

import megatron_embed
from megatron_embed.__main__ import main
from megatron_embed.cli.serve import api_keys
from megatron_embed.errors import ConfigError
from megatron_embed.serving import server
from megatron_embed.serving.opening import names_of
from tests.helpers.cross_encoders import cross_encoder  # noqa: F401  fixture
from tests.helpers.toys import MINILM, REPOSITORY

STOP_SECONDS = 25


@pytest.mark.parametrize("arguments, words", [
    (["/nowhere"], "DIR = '/nowhere': no such directory"),
    ([str(MINILM), str(MINILM)], f"DIR {MINILM.resolve()} is given twice"),
    ([str(MINILM), "--engine", "onnx"], "onnx/model.onnx: no such file; write it with `megatron-embed convert"),
    ([str(MINILM), "--engine", "openvino"], "openvino/openvino_model.xml: no such file"),
    ([str(MINILM), "--engine", "onnx", "--dtype", "bfloat16"], "--dtype bfloat16: a graph has the dtype"),
    ([str(MINILM), "--host", "nowhere.invalid"], "--host nowhere.invalid: "),
    ([str(MINILM), "--port", "65536"], "'65536' is not a port"),
    ([str(MINILM), "--api-key-file", "/nowhere"], "--api-key-file /nowhere: cannot be read"),
    ([str(MINILM), "--api-key", "secret"], "--api-key: other users of the machine see"),
    ([], "the following arguments are required: DIR"),
])
def test_refusals(arguments, words, capsys):
    port = [] if "--port" in arguments else ["--port", "0"]
    assert main(["serve", *arguments, *port]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("megatron-embed: error: ") and words in error


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_missing_package_names_the_extra(package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["serve", str(MINILM)]) == 2
    assert capsys.readouterr().err.startswith(
        f"megatron-embed: error: serve needs the package {package} (import of {package} halted; None in sys.modules); "
        "pip install 'megatron_embed[serve]'")


def test_port_that_is_taken():
    first = server.bind("127.0.0.1", 0)
    first.listen()
    with first, pytest.raises(ConfigError, match="Address already in use; give another --port"):
        server.bind("127.0.0.1", first.getsockname()[1])


def test_keys_come_from_the_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("MEGATRON_EMBED_API_KEY", raising=False)
    assert api_keys(None) == ()
    monkeypatch.setenv("MEGATRON_EMBED_API_KEY", "of-environment")
    assert api_keys(None) == ("of-environment",)
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    assert api_keys(str(file)) == ("one", "two")
    file.write_text("\n")
    with pytest.raises(ConfigError, match="holds no key"):
        api_keys(str(file))


def test_names_tell_models_apart():
    assert names_of(["/runs/a/best", "/runs/b/best", "/exported"]) == ["a/best", "b/best", "exported"]
    assert names_of(["/best", "/runs/best"]) == ["/best", "runs/best"]


def start(*arguments, wait=True):
    """A process of the command, and its address once it listens."""
    process = subprocess.Popen([sys.executable, "-m", "megatron_embed", "serve", *arguments, "--port", "0"],
                               cwd=REPOSITORY, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    lines = []
    while wait:
        line = process.stderr.readline()
        assert line, f"it ended with {process.wait()}: {''.join(lines)}"
        lines.append(line)
        if match := re.search(r"listening at (http://\S+)", line):
            return process, match[1]
    return process, ""


@pytest.mark.slow
def test_sigterm_under_load_answers_what_was_accepted():
    process, address = start(str(MINILM))
    texts = [f"text {index} " + "and more words " * (index % 40) for index in range(64)]
    wanted = megatron_embed.load(str(MINILM)).encode(texts)
    answers, errors, stopped = [], [], threading.Event()

    def client(index):
        with httpx.Client(base_url=address, timeout=60) as asked:
            while True:
                sent = time.monotonic()
                try:
                    answer = asked.post("/v1/embeddings", json={"input": texts[index]})
                except httpx.HTTPError as error:
                    errors.append((sent, type(error).__name__))
                    return
                answers.append((index, answer))
                if stopped.is_set():
                    return

    threads = [threading.Thread(target=client, args=(index,)) for index in range(len(texts))]
    for thread in threads:
        thread.start()
    while len(answers) < 200:
        assert not errors
        time.sleep(0.01)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(STOP_SECONDS) == 0
    stopped.set()
    for thread in threads:
        thread.join(60)
    process.stderr.close()
    for index, answer in answers:
        assert answer.status_code == 200, answer.text
        vector = np.array(answer.json()["data"][0]["embedding"])
        np.testing.assert_allclose(vector, wanted[index], rtol=0, atol=1e-6)
    # A request that found no server any more was sent after the signal.
    assert all(sent > asked for sent, _ in errors), errors


@pytest.mark.slow
def test_schemathesis_finds_no_server_error(cross_encoder):
    """All of its phases, over the wire."""
    process, address = start(str(MINILM), str(cross_encoder))
    made = subprocess.run([Path(sys.executable).with_name("schemathesis"), "run", f"{address}/openapi.json",
                           "--checks", "not_a_server_error", "--max-examples", "50"], capture_output=True, text=True,
                          timeout=500, check=False)
    assert made.returncode == 0, made.stdout
    process.send_signal(signal.SIGTERM)
    assert process.wait(STOP_SECONDS) == 0
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1.0, 2.5, 4.0])
def test_sigterm_while_it_loads(seconds):
    process, _ = start(str(MINILM), wait=False)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    assert process.wait(STOP_SECONDS) == 0
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()


@pytest.mark.slow
def test_interrupt_ends_it_and_keys_are_asked_for(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    process, address = start(str(MINILM), "--api-key-file", str(keys))
    assert httpx.post(f"{address}/v1/embeddings", json={"input": "a"}).status_code == 401
    headers = {"authorization": "Bearer secret"}
    assert httpx.post(f"{address}/v1/embeddings", json={"input": "a"}, headers=headers).status_code == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(STOP_SECONDS) == 0
    assert "secret" not in process.stderr.read()
    process.stderr.close()
