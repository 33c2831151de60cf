"""Load a server with ragged texts from many clients, and the same server around Sentence Transformers beside it.

    python tools/bench_serve.py --model DIR [--requests 10000] [--slices 10] [--clients 64] [--engine torch onnx ...]

Every client sends one text a request and waits for its vector. The lengths in words are log-normal, cut to --words.
The texts are cut into slices, and all engines' servers answer a slice, one after the other, before any gets the next
one: whatever else the machine does meets all alike. Per engine it prints requests answered and lost, texts per second
and per second of processor time, the 50th and 99th percentile of the seconds of an answer, and the smallest cosine
between its vectors and those of the first engine; then the ratios to the first engine, over all slices and of each one.
Exit code 1 if a request was lost. The server around Sentence Transformers is this program with --frame: the same
application and queue, and `SentenceTransformer.encode` in the place of this package's model.
"""

import argparse
import asyncio
import base64
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import children
import numpy as np
import psutil
from measurement import describe_machine, exit_on_signals

REPOSITORY = Path(__file__).resolve().parents[1]
TEXTS = REPOSITORY / "examples" / "data" / "mini_en" / "train.jsonl"
STOP_SECONDS = 25
WARM_UP = 100
"""Requests before those that are counted."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--slices", type=int, default=10)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--engine", nargs="+", default=["torch", "sentence-transformers"],
                        choices=("torch", "onnx", "openvino", "sentence-transformers"))
    parser.add_argument("--words", type=int, nargs=2, default=(3, 200), help="shortest and longest text")
    parser.add_argument("--frame", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def ragged_texts(count: int, shortest: int, longest: int) -> list[str]:
    """Texts of this many words, log-normal: many short ones, few long ones."""
    draw = random.Random(1)
    words = " ".join(json.loads(line)["positive"][0] for line in TEXTS.read_text(encoding="utf-8").splitlines()).split()
    texts = []
    for _ in range(count):
        length = min(longest, max(shortest, int(draw.lognormvariate(2.7, 0.9))))
        start = draw.randrange(len(words) - length)
        texts.append(" ".join(words[start : start + length]))
    return texts


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: str) -> bytes:
    """The answer's body. Raises OSError or ValueError if there is none."""
    body = json.dumps({"input": text, "encoding_format": "base64"}).encode()
    writer.write(b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                 b"content-length: %d\r\n\r\n" % len(body) + body)
    head = await reader.readuntil(b"\r\n\r\n")
    answer = await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
    if b" 200 " not in head.split(b"\r\n")[0]:
        raise ValueError(answer.decode())
    return answer


async def load(port: int, texts: Sequence[str], clients: int) -> tuple[list[bytes | None], list[float], float]:
    """(each text's answer, None if it was lost; seconds of each answer; seconds of all)."""
    answers: list[bytes | None] = [None] * len(texts)
    seconds: list[float] = []
    left = iter(range(len(texts)))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for index in left:
            start = time.perf_counter()
            try:
                answers[index] = await ask(reader, writer, texts[index])
            except (OSError, EOFError, ValueError) as error:
                print(f"request {index} was lost: {error}", file=sys.stderr)
                writer.close()
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            seconds.append(time.perf_counter() - start)
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return answers, seconds, time.perf_counter() - start


def start_server(args: argparse.Namespace, engine: str) -> tuple["subprocess.Popen[str]", int]:
    """A server of that engine, ready, and its port."""
    command = [sys.executable, "-m", "megatron_embed", "serve", args.model, "--engine", engine, "--port", "0"]
    if engine == "sentence-transformers":
        command = [sys.executable, str(Path(__file__).resolve()), "--frame", "--model", args.model]
    server = subprocess.Popen(command, cwd=REPOSITORY, text=True, stderr=subprocess.PIPE,
                              env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert server.stderr is not None
    try:
        for line in server.stderr:
            if match := re.search(r"listening at http://[^:]+:(\d+)", line):
                return server, int(match[1])
    except BaseException:  # Ctrl-C, or a signal of `exit_on_signals`
        children.end([server])
        raise
    sys.exit(f"{engine}: the server ended with {server.wait()}")


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


@dataclass
class Measured:
    """A running server and what it has answered so far."""

    engine: str
    process: "subprocess.Popen[str]"
    port: int
    answers: list[bytes | None] = field(default_factory=list)
    """In the order of the texts; None: lost."""
    seconds: list[float] = field(default_factory=list)
    """Seconds that each answer took."""
    wall: list[float] = field(default_factory=list)
    """Seconds of each slice."""
    cpu: list[float] = field(default_factory=list)
    """Seconds of the server's processor time of each slice."""

    def ask(self, texts: Sequence[str], clients: int) -> None:
        """One slice."""
        before = cpu_seconds(self.process.pid)
        answers, seconds, wall = asyncio.run(load(self.port, texts, clients))
        self.cpu.append(cpu_seconds(self.process.pid) - before)
        self.wall.append(wall)
        self.answers += answers
        self.seconds += seconds

    def stop(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=STOP_SECONDS)

    def vectors(self) -> np.ndarray:
        """[texts, dim] float32; a lost request's row is zero."""
        rows = [np.zeros(0) if answer is None else
                np.frombuffer(base64.b64decode(json.loads(answer)["data"][0]["embedding"]), "<f4")
                for answer in self.answers]
        dim = max(map(len, rows))
        return np.array([row if len(row) else np.zeros(dim) for row in rows], dtype=np.float32)

    def row(self) -> dict[str, Any]:
        """Its row of the table."""
        cuts, lost = statistics.quantiles(self.seconds, n=100), self.answers.count(None)
        return {"engine": self.engine, "answered": len(self.answers) - lost, "lost": lost,
                "texts_per_second": round(len(self.answers) / sum(self.wall), 1),
                "texts_per_cpu_second": round(len(self.answers) / sum(self.cpu), 1),
                "p50": round(cuts[49], 3), "p99": round(cuts[98], 3)}


def compare(first: Measured, other: Measured) -> str:
    """How much faster the first engine answered than the other one."""
    ratios = [theirs / ours for ours, theirs in zip(first.wall, other.wall, strict=True)]
    return (f"{first.engine} answers {sum(other.wall) / sum(first.wall):.2f} times the texts per second of "
            f"{other.engine} (by slice {min(ratios):.2f} to {max(ratios):.2f}, median {statistics.median(ratios):.2f})"
            f", {sum(other.cpu) / sum(first.cpu):.2f} times those per second of processor time")


def serve_sentence_transformers(directory: str) -> None:
    """This package's application and queue around `SentenceTransformer.encode`, until SIGTERM."""
    import logging

    from sentence_transformers import SentenceTransformer

    from megatron_embed.data.tokenizer import TokenizedRows
    from megatron_embed.platform import stop_signal as stop
    from megatron_embed.serving.app import create_app
    from megatron_embed.serving.batching import Engine
    from megatron_embed.serving.guard import ServerState
    from megatron_embed.serving.models import Limits, ServedEmbedder, ServedModels
    from megatron_embed.serving.server import Stopper, bind, serve

    logging.basicConfig(level=logging.INFO)
    stop.start()
    model = SentenceTransformer(directory, device="cpu")

    class Library(Engine):
        """Texts to vectors as the library does it: sorted by length, padded batches of 32."""

        def rows(self, items: Sequence[Any]) -> np.ndarray:
            return model.encode([item.ids for item in items], convert_to_numpy=True, show_progress_bar=False)

    class TextLengths:
        """In place of token ids the text itself, whose length counts as its tokens: the library tokenizes."""

        def max_length(self, role: str) -> int:
            return model.max_seq_length

        def tokenize(self, texts: Sequence[str], role: str) -> TokenizedRows:
            return TokenizedRows(token_ids=list(texts), num_truncated=0)

    models = ServedModels([ServedEmbedder("library", Path(directory), Library(), TextLengths(), similarity="cosine",
                                          dim=model.get_embedding_dimension(), normalize=True, raw_vectors=False)],
                          Limits())
    state = ServerState()
    stopper, bound = Stopper(models, state), bind("127.0.0.1", 0)
    with stop.stopping_by(stopper.ask):
        serve(create_app(models, state=state), models, bound, state, stopper)
    os._exit(0)


def main() -> int:
    args = parse_arguments()
    if args.frame:
        serve_sentence_transformers(args.model)
    exit_on_signals()
    texts = ragged_texts(args.requests, *args.words)
    print(describe_machine(int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count() or 1))
    print(f"{len(texts)} texts of {args.words[0]} to {args.words[1]} words, mean "
          f"{statistics.mean(len(text.split()) for text in texts):.0f}; {args.clients} clients", flush=True)
    servers: list[Measured] = []
    try:
        for engine in args.engine:
            servers.append(Measured(engine, *start_server(args, engine)))
            asyncio.run(load(servers[-1].port, texts[:WARM_UP], args.clients))
        size = -(-len(texts) // args.slices)
        for number, start in enumerate(range(0, len(texts), size)):
            for server in servers if number % 2 == 0 else reversed(servers):
                server.ask(texts[start : start + size], args.clients)
            print(f"slice {number + 1}, load average {os.getloadavg()[0]:.1f}: " + ", ".join(
                f"{server.engine} {server.wall[-1]:.1f} s ({server.cpu[-1]:.1f} s of processor time)"
                for server in servers), flush=True)
    finally:
        try:
            for server in servers:
                server.stop()
        finally:
            children.end(server.process for server in servers)
        report(servers)  # of the slices so far, if it was stopped
    return int(any(None in server.answers for server in servers))


def report(servers: Sequence[Measured]) -> None:
    """Print the rows of the table and the ratios, of the slices that every server has answered."""
    slices = min((len(server.wall) for server in servers), default=0)
    if slices == 0:
        return
    answers = min(len(server.answers) for server in servers)
    for server in servers:
        server.wall, server.cpu = server.wall[:slices], server.cpu[:slices]
        server.answers, server.seconds = server.answers[:answers], server.seconds[:answers]
    first = servers[0].vectors()
    for server in servers:
        cosine = round(float((server.vectors() * first).sum(axis=1).min()), 7)
        print(json.dumps({**server.row(), "exit": server.process.returncode, "cosine": cosine}), flush=True)
    for server in servers[1:]:
        print(compare(servers[0], server))


if __name__ == "__main__":
    sys.exit(main())
