"""Servers in this process: an application on a port of its own, and a model that counts characters."""

import contextlib
import socket
import threading
import time
from pathlib import Path

import numpy as np
import uvicorn

from megatron_embed.data.tokenizer import TokenizedRows
from megatron_embed.serving.app import create_app
from megatron_embed.serving.batching import Engine
from megatron_embed.serving.models import Limits, ServedEmbedder, ServedModels

SECONDS = 120


class WordTokenizer:
    """One token a word, its length; at most 8."""

    def max_length(self, role):
        return 8

    def tokenize(self, texts, role):
        return TokenizedRows(token_ids=[[len(word) for word in text.split()][:8] for text in texts], num_truncated=0)

    def count_tokens(self, texts, role):
        return [len(text.split()) for text in texts]


class CountingEngine(Engine):
    """Rows [sum of the ids, number of ids, 1]; waits where it is told to, and fails at the id 13."""

    def __init__(self, seconds_a_token=0.0):
        self.seconds_a_token = seconds_a_token
        self.batches = []
        self.gate = threading.Event()
        self.gate.set()

    def rows(self, items):
        self.gate.wait(SECONDS)
        self.batches.append([len(item.ids) for item in items])
        time.sleep(self.seconds_a_token * sum(self.batches[-1]))
        if any(13 in item.ids for item in items):
            raise RuntimeError("thirteen")
        return np.array([[sum(item.ids), len(item.ids), 1] for item in items], dtype=np.float32)


def counting_models(engine, names=("toy",), **limits):
    """Models that differ by name alone."""
    return ServedModels([ServedEmbedder(name, Path("/toy"), engine, WordTokenizer(), dim=3, similarity="cosine",
                                        normalize=False, raw_vectors=True) for name in names], Limits(**limits))


@contextlib.contextmanager
def served(models, **settings):
    """The address of an application over the models."""
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(models, **settings), log_config=None, lifespan="off", ws="none",
                                           loop="asyncio"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        assert models.queue.batcher.close(SECONDS)
