"""A request to stop: what was accepted is answered, and the server ends."""

import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from megatron_embed.serving import server
from megatron_embed.serving.app import create_app
from megatron_embed.serving.guard import ServerState
from tests.helpers.served import SECONDS, CountingEngine, counting_models


def ask_in_threads(address, count, answers):
    """Requests of two texts each, at once; `answers` gets the status of each, or the error's type."""

    def ask():
        try:
            answers.append(httpx.post(f"{address}/v1/embeddings", json={"input": ["a b", "c"]},
                                      timeout=SECONDS).status_code)
        except httpx.HTTPError as error:
            answers.append(type(error).__name__)

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def serve_until_stopped(monkeypatch, engine, *, answer_seconds, after_stop=lambda: None):
    """(statuses of 20 requests that were accepted before the stop, seconds from the stop to the end)."""
    monkeypatch.setattr(server, "ANSWER_SECONDS", answer_seconds)
    monkeypatch.setattr(server, "LISTEN_SECONDS", 0.2)
    models, state, answers, seconds = counting_models(engine), ServerState(), [], []
    stopper, bound = server.Stopper(models, state), server.bind("127.0.0.1", 0)
    engine.gate.clear()

    def client():
        while True:
            try:
                httpx.get(f"{server.address_of(bound)}/health")
                break
            except httpx.HTTPError:
                time.sleep(0.01)
        threads = ask_in_threads(address, 20, answers)
        while models.queue.waiting_texts < 40:
            time.sleep(0.001)
        seconds.append(time.monotonic())
        stopper.ask()
        while not state.stopping:
            time.sleep(0.001)
        after_stop()
        for thread in threads:
            thread.join(SECONDS)

    address = server.address_of(bound)
    client_thread = threading.Thread(target=client)
    client_thread.start()
    ended = server.serve(create_app(models, state=state), models, bound, state, stopper)
    seconds.append(time.monotonic())
    client_thread.join(SECONDS)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health")
    return answers, seconds[1] - seconds[0], ended


def test_accepted_requests_are_answered(monkeypatch):
    engine = CountingEngine(seconds_a_token=0.005)
    answers, seconds, ended = serve_until_stopped(monkeypatch, engine, answer_seconds=SECONDS,
                                                  after_stop=engine.gate.set)
    assert answers == [200] * 20 and ended
    assert seconds < 15


def test_what_cannot_be_computed_in_time_is_answered_503(monkeypatch):
    engine = CountingEngine()
    monkeypatch.setattr(server, "THREAD_SECONDS", 0.05)
    answers, seconds, ended = serve_until_stopped(monkeypatch, engine, answer_seconds=0.5)
    assert answers == [503] * 20 and not ended
    assert 0.4 < seconds < 15
    engine.gate.set()


def test_client_can_connect_as_soon_as_the_address_is_logged(monkeypatch):
    monkeypatch.setattr(server, "LISTEN_SECONDS", 0.2)
    models, state, connected = counting_models(CountingEngine()), ServerState(), []
    stopper, bound = server.Stopper(models, state), server.bind("127.0.0.1", 0)

    def info(message, *values):
        if message.startswith("listening at"):
            assert values == (server.address_of(bound),)
            with socket.create_connection(bound.getsockname(), SECONDS):
                connected.append(True)
            stopper.ask()

    monkeypatch.setattr(server.logger, "info", info)
    assert server.serve(create_app(models, state=state), models, bound, state, stopper) and connected


LATE = """
import os, signal, threading
from megatron_embed.platform import stop_signal as stop
stop.start()
asked, outer = threading.Event(), threading.Event()
with stop.stopping_by(outer.set):
    with stop.stopping_by(asked.set):
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.wait(10) and not outer.is_set()
        assert stop.asked() and stop.reason() == "SIGTERM" and not stop.held()
os.kill(os.getpid(), signal.SIGTERM)  # the exit code is decided
threading.Event().wait(0.2)
print("ended by itself")
"""


def test_signal_is_answered_by_the_server_alone():
    made = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (made.returncode, made.stdout) == (0, "ended by itself\n"), made.stderr
    ended = subprocess.run([sys.executable, "-c", LATE.replace("with stop.stopping_by(asked.set):", "if True:")
                            .replace("outer.set", "lambda: os._exit(3)")], timeout=SECONDS, check=False)
    assert ended.returncode == 3
    unasked = LATE.split("    with stop.stopping_by(asked.set)")[0] + (
        "    with stop.stopping_by(asked.set):\n        pass\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    assert outer.wait(10) and not asked.is_set()\n")
    assert subprocess.run([sys.executable, "-c", unasked], timeout=SECONDS, check=False).returncode == 0
