"""An error that one rank meets before the process group exists ends all ranks, and one of them prints it."""

import socket
import threading
import time

import pytest

from megatron_embed.errors import LostRankError, UserError
from megatron_embed.parallel import meeting
from megatron_embed.parallel.meeting import Meeting


@pytest.fixture(autouse=True)
def address(monkeypatch):
    """Nobody listens there yet; and less patience."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(meeting, "CONNECT_SECONDS", 3.0)
    monkeypatch.setattr(meeting, "SPEAK_SECONDS", 10.0)
    return f"127.0.0.1:{port}"


def rank_that(rank, refuses=None, after=0.0, timeout_seconds=20, held=None):
    """What a process does: it opens the meeting, reads for a while, comes or refuses. Gives what it prints.

    One that arrives keeps the store, in `held`: the process group would need it.
    """
    here = Meeting(rank, 3)
    time.sleep(after)
    message = refuses
    if message is None:
        try:
            held.append(here)
            here.arrive(timeout_seconds)
            return "went on"
        except UserError as error:
            message = str(error)
        except LostRankError as error:
            return f"lost: {error}"
    printed = [message] if rank == 0 else []
    return printed + ([f"rank {rank}: {message}"] if here.refuse(message) else [])


def together(*ranks):
    """The answers of ranks that run at once, and how long the last one took."""
    answers, held, start = {}, [], time.monotonic()
    threads = [threading.Thread(target=lambda rank=rank, settings=settings: answers.__setitem__(
        rank, rank_that(rank, held=held, **settings))) for rank, settings in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers.get(rank) for rank in range(len(ranks))], time.monotonic() - start


def test_all_arrive():
    assert together({"after": 0.2}, {}, {})[0] == ["went on"] * 3


def test_error_of_another_rank_reaches_all_at_once():
    found, seconds = together({}, {"refuses": "rows.jsonl: no such file"}, {"after": 0.3})
    assert found == [["rank 1: rows.jsonl: no such file"], [], []]
    assert seconds < 9


def test_error_of_all_is_printed_once():
    found, seconds = together(*[{"refuses": "training.seed = -1"}] * 3)
    assert found == [["training.seed = -1"], [], []]
    assert seconds < 9


def test_rank_prints_what_rank_0_does_not_know_yet(monkeypatch):
    """A launcher may end the others as soon as this one ends."""
    monkeypatch.setattr(meeting, "SPEAK_SECONDS", 0.5)
    found, _ = together({"after": 4.0}, {"refuses": "no such file"}, {})
    assert found[1] == ["rank 1: no such file"]
    assert found[0] == ["rank 1: no such file"] and found[2] == []


def test_rank_prints_where_there_is_no_rank_0():
    assert rank_that(2, refuses="no such file") == ["rank 2: no such file"]


def test_who_did_not_come_is_named(address):
    found, _ = together({"timeout_seconds": 2}, {"timeout_seconds": 2})
    assert all(answer.startswith(f"lost: not all of 3 ranks (torchrun's WORLD_SIZE) met at {address} within "
                                 "parallel.timeout_seconds = 2 (without rank 2)") for answer in found), found
