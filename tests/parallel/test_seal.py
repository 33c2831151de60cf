"""Whoever reaches the run's port writes into its store: what is not signed with the run's secret is ignored."""

import datetime
import socket
import threading
import time

import pytest
import torch.distributed as dist

from megatron_embed.errors import LostRankError, UserError
from megatron_embed.parallel import heartbeat as liveness
from megatron_embed.parallel import rendezvous as meeting
from megatron_embed.parallel.heartbeat import HeartbeatMonitor
from megatron_embed.parallel.rendezvous import ALL_HERE, Rendezvous, listening_socket
from megatron_embed.parallel.signing import SECRET_VARIABLE, Seal

SECRET = "0123456789abcdef" * 4


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def port(monkeypatch):
    """Three ranks with a secret, whose store torchrun's agent would host."""
    values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "0", "WORLD_SIZE": "3",
              "TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_USE_AGENT_STORE": "True", SECRET_VARIABLE: SECRET}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    monkeypatch.setattr(meeting, "CONNECT_SECONDS", 3.0)
    monkeypatch.setattr(meeting, "SPEAK_SECONDS", 1.0)
    return int(values["MASTER_PORT"])


@pytest.fixture
def agent(port):
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False,
                         timeout=datetime.timedelta(seconds=10))


def ranks_that_arrive(timeout_seconds=5, ranks=(0, 1, 2)):
    """How each ended, in threads."""
    answers = {}

    def arrive(rank):
        try:
            Rendezvous(rank, 3).arrive(timeout_seconds)
            answers[rank] = "went on"
        except (UserError, LostRankError) as error:
            answers[rank] = str(error)

    threads = [threading.Thread(target=arrive, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[rank] for rank in ranks]


def test_words_are_of_one_place_run_and_secret(monkeypatch, port):
    word = Seal().close("beat/1", "5 alive")
    assert Seal().open("beat/1", word.encode()) == "5 alive"
    for raw in (b"5 alive", b"", b"\xff\x00", word.replace("5 alive", "6 alive").encode(), word[1:].encode(),
                ("ä" * 64 + "5 alive").encode()):
        assert Seal().open("beat/1", raw) is None
    assert Seal().open("beat/2", word.encode()) is None
    room = Seal().room("life")
    assert room.startswith("life/torchrun-a-0/") and SECRET not in room + word
    for name, value in ((SECRET_VARIABLE, SECRET + "0"), ("TORCHELASTIC_RESTART_COUNT", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert Seal().open("beat/1", word.encode()) is None and Seal().room("life") != room
    monkeypatch.delenv(SECRET_VARIABLE)
    assert Seal().close("a", "b") == "b" and Seal().open("a", b"b") == "b" and Seal().open("a", b"\xff") is None
    assert Seal().room("life") == "life/torchrun-a-0"


@pytest.mark.parametrize("verdict", [b"rank 2: rows.jsonl: no such file", b"all here", b"\xff\xfe", b"x" * 64 + b"all"])
def test_strangers_verdict_is_written_over(agent, verdict):
    """At the very key, which a stranger must first have listed."""
    room = dist.PrefixStore(Seal().room("meeting"), agent)
    room.set("verdict", verdict)
    room.set("here/1", b"no rank")
    room.set("arrived", b"7")
    assert ranks_that_arrive() == ["went on"] * 3
    assert Seal().open("verdict", room.get("verdict")) == ALL_HERE


def test_strangers_word_of_an_error_does_not_end_the_run(agent):
    """In the name of the run, as a rank without the secret would write it."""
    for room in ("meeting/torchrun-a-0", Seal().room("meeting")):
        dist.PrefixStore(room, agent).set("verdict", "asked to stop")
    assert ranks_that_arrive() == ["went on"] * 3


def test_stranger_does_not_stand_for_a_rank(agent):
    room = dist.PrefixStore(Seal().room("meeting"), agent)
    room.set("here/2", "here")
    found = ranks_that_arrive(timeout_seconds=1, ranks=(0, 1))
    assert all("not signed with this run's MEGATRON_EMBED_SECRET" in answer for answer in found), found


def test_error_of_a_rank_of_the_run_is_heard(agent):
    printed = []
    threading.Thread(target=lambda: printed.append(Rendezvous(1, 3).refuse("no rows"))).start()
    assert ranks_that_arrive(ranks=(0, 2)) == ["rank 1: no rows"] * 2


def test_other_secret_on_one_rank_is_told(monkeypatch, agent):
    answers = {}

    def arrive(rank, secret):
        monkeypatch.setenv(SECRET_VARIABLE, secret)
        here = Rendezvous(rank, 2)
        room = Seal().room("meeting")
        monkeypatch.setattr(here, "_open", lambda seconds, listener=None: dist.PrefixStore(room, dist.TCPStore(
            *here._address, None, False, wait_for_workers=False, timeout=datetime.timedelta(seconds=seconds))))
        try:
            here.arrive(1)
        except LostRankError as error:
            answers[rank] = str(error)

    arrive(0, SECRET)
    arrive(1, SECRET + "0")
    assert all("is MEGATRON_EMBED_SECRET the same on every rank?" in text for text in answers.values())
    assert len(answers) == 2


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(liveness, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(liveness, "SUSPECT_SECONDS", 1.5)
    monkeypatch.setattr(liveness, "GRACE_SECONDS", 1.0)


def test_strangers_signs_of_life_are_ignored(agent, port, fast):
    """Neither the news that a rank failed or that the run stops, nor, of a silent rank, an old sign again and again."""
    losses = []
    watches = [HeartbeatMonitor("127.0.0.1", port, rank=rank, world_size=3, silence_seconds=4.0,
                         on_loss=lambda *loss: losses.append(loss)) for rank in (0, 1, 2)]
    time.sleep(0.5)
    room = dist.PrefixStore(Seal().room("life"), agent)
    old = room.get("beat/2")
    for _ in range(10):
        for text in ("9999999999999999 failed OutOfMemoryError", "9999999999999999 left", "\udcff"):
            room.set("beat/1", text.encode("utf-8", "surrogateescape"))
            room.set("board", f"{text}|0|left|rank 1 is gone".encode("utf-8", "surrogateescape"))
            time.sleep(0.02)
    assert not losses and all(watch._loss is None and not watch._rank_0_is_done for watch in watches)
    watches[2]._state = liveness.ALIVE
    watches[2]._beat = lambda store: None  # it hangs
    deadline = time.monotonic() + 10
    while watches[0]._loss is None and time.monotonic() < deadline:
        room.set("beat/2", old)
        time.sleep(0.1)
    assert watches[0]._loss[0].startswith("rank 2 is gone: no sign of life for ")
    for watch in watches:
        watch.close(liveness.DONE)


def listening(port):
    """Addresses, as the kernel writes them, at which somebody listens at this port."""
    found = []
    for name in ("tcp", "tcp6"):
        with open(f"/proc/net/{name}", encoding="ascii") as file:
            rows = [line.split() for line in file.read().splitlines()[1:]]
        found += [row[1].rpartition(":")[0] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")]
    return found


@pytest.mark.parametrize("address, environment, alone", [
    ("127.0.0.1", {}, True), ("localhost", {"LOCAL_WORLD_SIZE": "3"}, True), ("localhost", {}, False),
    ("localhost", {"LOCAL_WORLD_SIZE": "1"}, False)])
def test_store_of_rank_0_listens_at_the_address_alone_where_all_ranks_find_it_there(
        monkeypatch, port, address, environment, alone):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    for name, value in {"MASTER_ADDR": address, **environment}.items():
        monkeypatch.setenv(name, value)
    held = [Rendezvous(0, 3), Rendezvous(0, 3)]  # the second shares it
    loopback = {"0100007F", "00000000000000000000000001000000"}
    found = listening(port)
    assert found and all((place in loopback) == alone for place in found)
    assert ranks_that_arrive() == ["went on"] * 3
    del held


def test_address_that_is_not_this_nodes_is_left_to_torch(port):
    assert listening_socket("192.0.2.1", port) is None
    assert listening_socket("2001:db8::1", port) is None
