"""What a server refuses, and how it says so."""

import json
import socket
import threading
import time

import httpx
import pytest
from fastapi.testclient import TestClient

from megatron_embed.serving.app import create_app
from tests.helpers.served import SECONDS, CountingEngine, counting_models, served

KEY = {"authorization": "Bearer right"}


def client(engine=None, *, names=("toy",), api_keys=(), hosts=(), **limits):
    models = counting_models(engine or CountingEngine(), names, **limits)
    return TestClient(create_app(models, api_keys=api_keys, hosts=hosts))


def refused(answer, status, *words):
    assert answer.status_code == status, answer.text
    body = answer.json()
    message = body["error"]["message"] if isinstance(body["error"], dict) else body["error"]
    for word in words:
        assert word in message, message
    return body


@pytest.mark.parametrize("body, words", [
    ({"input": [1, 2]}, "input: must be a string or a list of strings; token ids are not accepted"),
    ({"input": [[1, 2]]}, "token ids are not accepted"),
    ({"input": []}, "input: must hold at least one text"),
    ({"input": "a\ud800"}, "input: has an unpaired surrogate at character 2"),
    ({"input": ""}, "text number 1: the text '' has no tokens"),
    ({}, "input: Field required"),
    ({"input": "a", "dimensions": 4}, "dimensions = 4: the vectors of toy have 3"),
    ({"input": "a", "dimensions": 0}, "dimensions: Input should be greater than or equal to 1"),
    ({"input": "a", "encoding_format": "hex"}, "encoding_format: Input should be 'float' or 'base64'"),
    ({"input": "a", "input_type": "passage"}, "input_type: Input should be 'query' or 'document'"),
])
def test_request_that_makes_no_sense_is_422(body, words):
    content = json.dumps(body)
    answer = client().post("/v1/embeddings", content=content, headers={"content-type": "application/json"})
    assert refused(answer, 422, words)["error"]["type"] == "invalid_request_error"


def test_body_that_is_no_json():
    post = client().post
    refused(post("/v1/embeddings", content="{", headers={"content-type": "application/json"}), 422, "is not JSON")
    refused(post("/v1/embeddings", content='{"input": "a"}', headers={"content-type": "text/plain"}), 415, "text/plain")
    refused(client().get("/v1/embeddings"), 405)
    refused(client().get("/v1/nothing"), 404)


def test_texts_and_bytes_are_limited():
    asked = client(max_texts=3, max_bytes=1000)
    assert asked.post("/v1/embeddings", json={"input": ["a"] * 3}).status_code == 200
    refused(asked.post("/v1/embeddings", json={"input": ["a"] * 4}), 413, "4 texts in one request; at most 3")
    answer = asked.post("/embed", json={"inputs": "a" * 1000})
    assert refused(answer, 413, "more than 1000 bytes")["error_type"] == "Validation"
    refused(asked.post("/embed", json={"inputs": "a b c d e f g h i", "truncate": False}), 413, "9 tokens; at most 8")
    assert asked.post("/embed", json={"inputs": "a b c d e f g h i"}).json() == [[8.0, 8.0, 1.0]]


def test_2048_texts_are_accepted_by_default():
    answer = client().post("/v1/embeddings", json={"input": [f"number {index}" for index in range(2048)]})
    assert [row["index"] for row in answer.json()["data"]] == list(range(2048))
    refused(client().post("/v1/embeddings", json={"input": ["a"] * 2049}), 413, "at most 2048")


def test_names_of_models():
    assert client().post("/v1/embeddings", json={"input": "a", "model": "any"}).json()["model"] == "toy"
    two = client(names=("x", "y"))
    assert two.post("/v1/embeddings", json={"input": "a", "model": "y"}).json()["model"] == "y"
    assert two.post("/v1/embeddings", json={"input": "a"}).json()["model"] == "x"
    body = refused(two.post("/v1/embeddings", json={"input": "a", "model": "z"}), 404, "'z' is not served here",
                   "x (embedding model), y (embedding model)")
    assert body["error"]["code"] == "model_not_found"
    refused(two.post("/v1/rerank", json={"query": "a", "documents": ["b"]}), 404, "no reranker is served here")
    assert [model["id"] for model in two.get("/v1/models").json()["data"]] == ["x", "y"]


def test_key_is_needed_but_for_health():
    asked = client(api_keys=("right", "other"))
    assert asked.get("/health").json() == {"status": "ok"}
    for value in ("", "Bearer wrong", "right", "Basic right", "Bearer"):
        headers = {"authorization": value}
        answer = asked.post("/v1/embeddings", json={"input": "a"}, headers=headers)
        refused(answer, 401, "Authorization: Bearer KEY")
        assert answer.headers["www-authenticate"] == "Bearer"
        refused(asked.get("/metrics", headers=headers), 401)
    for headers in (KEY, {"authorization": "bearer other"}):
        assert asked.post("/v1/embeddings", json={"input": "a"}, headers=headers).status_code == 200


def test_another_host_is_refused():
    asked = client(hosts=("localhost", "127.0.0.1", "[::1]"))
    refused(asked.get("/v1/models", headers={"host": "evil.example:8000"}), 403, "evil.example")
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000", "[::1]"):
        assert asked.get("/v1/models", headers={"host": host}).status_code == 200


def test_full_queue_and_slow_model():
    engine = CountingEngine()
    engine.gate.clear()
    models = counting_models(engine, max_waiting_texts=10, max_texts=20, timeout_seconds=0.5)
    with served(models) as address, httpx.Client(base_url=address, timeout=SECONDS) as asked:
        answers, eight = [], {"input": ["a"] * 8}
        thread = threading.Thread(target=lambda: answers.append(asked.post("/v1/embeddings", json=eight)))
        thread.start()
        while models.queue.waiting_texts < 8:
            time.sleep(0.001)
        answer = asked.post("/v1/embeddings", json={"input": ["a"] * 3})
        refused(answer, 429, "8 texts are waiting already, of at most 10")
        assert answer.headers["retry-after"] == "1"
        thread.join(SECONDS)
        refused(answers[0], 504, "not computed within 0.5 s")
        assert models.queue.waiting_texts == 0
        engine.gate.set()
        # An empty queue takes any request that is not too large in itself.
        assert asked.post("/v1/embeddings", json={"input": ["a"] * 20}).status_code == 200
        refused(asked.post("/v1/embeddings", json={"input": ["a " * 8 + "b" * 13, "a" * 13]}), 500, "RuntimeError")
        assert asked.get("/health").status_code == 200
        text = asked.get("/metrics").text
        for line in ('megatron_embed_requests_total{path="/v1/embeddings",status="429"} 1.0',
                     'megatron_embed_texts_total{model="toy"} 20.0', "megatron_embed_waiting_texts 0.0"):
            assert line in text


def test_bytes_of_all_bodies_are_limited():
    engine = CountingEngine()
    engine.gate.clear()
    models = counting_models(engine, max_bytes=100)
    body = {"content": '{"input": "' + "a" * 87 + '"}', "headers": {"content-type": "application/json"}}
    with served(models) as address, httpx.Client(base_url=address, timeout=SECONDS) as asked:
        threads = [threading.Thread(target=asked.post, args=("/v1/embeddings",), kwargs=body) for _ in range(8)]
        for thread in threads:
            thread.start()
        while models.queue.waiting_texts < 8:
            time.sleep(0.001)
        answer = asked.post("/v1/embeddings", **body)
        engine.gate.set()
        for thread in threads:
            thread.join(SECONDS)
        refused(answer, 429, "requests of too many bytes are waiting")
        assert asked.post("/v1/embeddings", **body).status_code == 200


class SpinningEngine(CountingEngine):
    """Computes in Python, holding the interpreter as much as a thread can, until its gate opens."""

    def rows(self, items):
        while not self.gate.is_set():
            pass
        return super().rows(items)


def test_health_is_answered_while_the_model_computes():
    engine = SpinningEngine()
    engine.gate.clear()
    models = counting_models(engine)
    with served(models) as address, httpx.Client(base_url=address, timeout=SECONDS) as asked:
        threads = [threading.Thread(target=asked.post, args=("/v1/embeddings",), kwargs={"json": {"input": "a"}})
                   for _ in range(16)]
        for thread in threads:
            thread.start()
        while models.queue.waiting_texts < 16:
            time.sleep(0.001)
        for path in ("/health", "/metrics", "/v1/models"):
            assert httpx.get(address + path, timeout=20).status_code == 200
        assert models.queue.waiting_texts == 16 and engine.batches == []
        engine.gate.set()
        for thread in threads:
            thread.join(SECONDS)


def place_of(address):
    host, port = address.removeprefix("http://").split(":")
    return host, int(port)


def test_client_that_leaves_leaves_the_queue():
    """Long before --timeout."""
    engine = CountingEngine()
    engine.gate.clear()
    models = counting_models(engine)
    with served(models) as address:
        with socket.create_connection(place_of(address)) as leaving:
            body = b'{"input": ["a", "b"]}'
            leaving.sendall(b"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
                            b"content-length: %d\r\n\r\n" % len(body) + body)
            while models.queue.waiting_texts < 2:
                time.sleep(0.001)
        deadline = time.monotonic() + 20
        while models.queue.waiting_texts and time.monotonic() < deadline:
            time.sleep(0.001)
        waiting = models.queue.waiting_texts
        engine.gate.set()
    assert waiting == 0


def test_body_that_never_arrives():
    models = counting_models(CountingEngine(), timeout_seconds=0.5)
    with served(models) as address, socket.create_connection(place_of(address)) as slow:
        slow.sendall(b"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\n{")
        slow.settimeout(20)
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
