"""Which rank is gone when a collective fails: signs of life in the run's key-value store."""

import contextlib
import datetime
import threading
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist

from megatron_embed.errors import LostRankError, PreemptedError, UserError, first_line
from megatron_embed.parallel.signing import Seal
from megatron_embed.parallel.topology import Topology
from megatron_embed.platform import stop_signal as stop

BEAT_SECONDS = 1.0
SUSPECT_SECONDS = 5.0
"""Silence that counts as the end of a rank once a collective has failed somewhere."""
LONGEST_SILENCE_SECONDS = 60.0
"""The same where none has failed (NCCL may wait for ever); half of `parallel.timeout_seconds` if that is less."""
GRACE_SECONDS = 10.0
"""How long the main thread may take to notice the loss itself before the watching thread ends the process."""
CONNECTION_WORDS = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL", "ProcessGroup",
                    "Timed out waiting", "Application timeout")

ADVICE = "; the others stop. Look at its log, then start the run again: it goes on from its last checkpoint"
LEAVE_SECONDS = 1.5
"""How long rank 0, asked to stop, waits until the others have heard that, before the store ends with it."""
ALIVE, SUSPECT, DONE, FAILED = "alive", "suspect", "done", "failed"
STOPPING, LEFT = "stopping", "left"
"""Asked to stop and at work on its end; ended because some rank was asked to."""
LIVING = (ALIVE, SUSPECT, STOPPING)
ASKED = "another rank was asked to"


@contextlib.contextmanager
def watched(topology: Topology, on_loss: Callable[[str, bool], None], advice: str = ADVICE) -> Iterator[None]:
    """Meanwhile the end of another rank becomes a LostRankError that names it, within `parallel.timeout_seconds`, and a
    request to stop that any rank gets is told to all.

    Args:
        on_loss: called by a thread with (message, whether this rank speaks for all) if the main thread hangs all the
            same; must end the process.
        advice: the message's end, what to do then.
    """
    if topology.rendezvous is None:
        yield
        return
    watch = HeartbeatMonitor(*topology.rendezvous, rank=topology.rank, world_size=topology.world_size,
                      silence_seconds=min(LONGEST_SILENCE_SECONDS, topology.sizes.timeout_seconds / 2), on_loss=on_loss,
                      advice=advice)
    stop.add_farewell(watch.leave)
    try:
        yield
    except Exception as error:
        if not is_connection_error(error):
            watch.close(_last_word(error))
            raise
        found = watch.explain(error, topology.sizes.timeout_seconds)
        watch.close(_last_word(found))
        raise found from error
    finally:
        stop.remove_farewell(watch.leave)
    watch.close(DONE)


def _last_word(error: Exception) -> str:
    """The last sign of life of a rank that ends with this error."""
    if isinstance(error, PreemptedError):
        return LEFT
    return DONE if isinstance(error, UserError | LostRankError) else (
        f"{FAILED} {type(error).__name__}: {first_line(error)}")


def is_connection_error(error: BaseException | None) -> bool:
    """Whether a collective failed because of another rank, here or in what `error` was raised from."""
    while error is not None:
        text = str(error)
        if isinstance(error, dist.DistError) or (
                isinstance(error, RuntimeError) and any(words in text for words in CONNECTION_WORDS)):
            return True
        error = error.__cause__ or error.__context__
    return False


class HeartbeatMonitor:
    """A thread that gives signs of life every second, and learns from rank 0, who watches all, if a rank has none.

    One small message per rank and second, to a connection of its own: one that the main thread waits on would be
    silent.
    """

    def __init__(self, host: str, port: int, *, rank: int, world_size: int, silence_seconds: float,
                 on_loss: Callable[[str, bool], None], advice: str = ADVICE) -> None:
        self._address = (host, port)
        self._rank = rank
        self._world_size = world_size
        self._silence_seconds = silence_seconds
        self._on_loss = on_loss
        self._advice = advice
        self._state = ALIVE
        # Larger than those of an earlier watch: an old sign of life is none.
        self._beats = time.time_ns() // 1_000_000
        self._seal, self._latest = Seal(), dict[str, tuple[int, str]]()
        self._heard: dict[int, tuple[str, float]] = {}
        self._rank_0_is_done = False
        self._left_since: float | None = None
        self._loss: tuple[str, bool] | None = None
        self._decided, self._closing, self._wake = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="life-watch", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Tells the others that this rank was asked to stop and ends now."""
        self.close(LEFT)

    def explain(self, error: BaseException, timeout_seconds: int) -> LostRankError | PreemptedError:
        """What became of the ranks, after a collective failed here; waits a few seconds for the answer."""
        self._state = SUSPECT
        self._wake.set()
        self._decided.wait(SUSPECT_SECONDS + 4 * BEAT_SECONDS)
        if self._left_since is not None:
            return PreemptedError(f"stopped ({stop.reason() or ASKED}); start the command again")
        if self._loss is not None:
            message, speaker = self._loss
            return LostRankError(message, speaker=speaker)
        return LostRankError(f"a collective failed on rank {self._rank}, though every rank lives: one of them "
                             f"did not take part within parallel.timeout_seconds = {timeout_seconds}, or the "
                             f"network failed ({first_line(error)}); raise it, or look at the logs", speaker=True)

    def close(self, state: str) -> None:
        """The last sign of life, which says how this rank ended; then the thread ends."""
        self._state = state
        self._closing.set()
        self._wake.set()
        self._thread.join(3 * BEAT_SECONDS)

    def _watch(self) -> None:
        try:
            client = dist.TCPStore(*self._address, is_master=False, wait_for_workers=False,
                                   timeout=datetime.timedelta(seconds=max(10.0, self._silence_seconds)))
            store = dist.PrefixStore(self._seal.room("life"), client)
            if self._rank == 0:
                for rank in range(1, self._world_size):
                    store.set(f"beat/{rank}", self._seal.close(f"beat/{rank}", f"0 {ALIVE}"))
            while self._loss is None:
                last = self._closing.is_set()
                self._beat(store)
                if last:
                    return
                if self._left_since is not None and time.monotonic() - self._left_since > GRACE_SECONDS:
                    stop.leave_now()
                self._wake.wait(BEAT_SECONDS)
                self._wake.clear()
        except RuntimeError as error:  # torch.distributed's errors are
            if self._closing.is_set() or self._rank_0_is_done:
                return
            host, port = self._address
            self._decide(f"rank 0, or the launcher on its node, is gone: the run's store at {host}:{port} does not "
                         f"answer ({first_line(error)}){self._advice}", lowest_alive=1)
        if not self._closing.wait(GRACE_SECONDS) and self._loss is not None:
            self._on_loss(*self._loss)

    def _beat(self, store: dist.Store) -> None:
        self._beats += 1
        mine = f"{self._beats} {STOPPING if self._state == ALIVE and stop.asked() else self._state}"
        if self._rank == 0:
            names = [f"beat/{rank}" for rank in range(1, self._world_size)]
            beats = {0: mine, **{rank: self._last_word(f"beat/{rank}", beat, f"0 {ALIVE}")
                                 for rank, beat in enumerate(store.multi_get(names), start=1)}}
            message, lowest_alive = self._judge(beats)
            words = [beat.partition(" ")[2] for beat in beats.values()]
            request = LEFT if LEFT in words else STOPPING if STOPPING in words else ""
            board = f"{mine.replace('|', '/')}|{lowest_alive}|{request}|{message}"
            store.set("board", self._seal.close("board", board))
            self._hear(request)
            if self._state == LEFT:
                self._await_others(store, names)
            elif message:
                time.sleep(2 * BEAT_SECONDS)  # until all have read it: the store may end with this process
                self._decide(message, lowest_alive=lowest_alive)
            return
        store.set(f"beat/{self._rank}", self._seal.close(f"beat/{self._rank}", mine))
        board = self._last_word("board", store.get("board"), f"0 {ALIVE}|0||")
        beat, lowest_alive, request, message = board.split("|", 3)
        self._rank_0_is_done = beat.endswith((DONE, LEFT))
        self._hear(request)
        if message:
            self._decide(message, lowest_alive=int(lowest_alive))
        elif self._silence(0, beat) > self._silence_seconds and not self._rank_0_is_done:
            self._decide(f"rank 0 is gone: no sign of life for {self._silence_seconds:.0f} s{self._advice}",
                         lowest_alive=1)

    def _last_word(self, place: str, raw: bytes, default: str) -> str:
        """What a rank of this run said there last: what is not signed, or older, is somebody else's."""
        text = self._seal.open(place, raw)
        number = "" if text is None else text.partition(" ")[0]
        if text is not None and number.isdecimal() and len(number) < 20 and (
                place not in self._latest or int(number) > self._latest[place][0]):
            self._latest[place] = int(number), text
        return self._latest[place][1] if place in self._latest else default

    def _hear(self, request: str) -> None:
        """What the ranks say of a request to stop."""
        if request:
            stop.tell(ASKED)
        if request == LEFT and self._left_since is None:
            self._left_since = time.monotonic()
            self._decided.set()

    def _await_others(self, store: dist.Store, names: list[str]) -> None:
        """Until the others have heard that rank 0 leaves: the store may end with this process."""
        deadline = time.monotonic() + LEAVE_SECONDS
        while time.monotonic() < deadline:
            words = [self._last_word(name, beat, f"0 {ALIVE}").partition(" ")[2]
                     for name, beat in zip(names, store.multi_get(names), strict=True)]
            if not any(word in LIVING for word in words):
                return
            time.sleep(0.05)

    def _judge(self, beats: dict[int, str]) -> tuple[str, int]:
        """Rank 0's opinion: the message, empty if all is well, and the lowest rank that is alive."""
        states = {rank: beat.partition(" ")[2] for rank, beat in beats.items()}
        silent = {rank: self._silence(rank, beat) for rank, beat in beats.items() if rank}
        limit = min(SUSPECT_SECONDS, self._silence_seconds) if SUSPECT in states.values() else self._silence_seconds
        failed = [rank for rank, state in states.items() if state.startswith(FAILED)]
        gone = [rank for rank, seconds in silent.items() if seconds > limit and states[rank] in LIVING]
        lowest_alive = min((rank for rank in beats if rank not in gone and rank not in failed), default=0)
        if failed:
            error = states[failed[0]].removeprefix(FAILED).strip()
            return f"rank {failed[0]} ended with {error}{self._advice}", lowest_alive
        if gone:
            names = ", ".join(map(str, gone[:8])) + (f" and {len(gone) - 8} more" if gone[8:] else "")
            verb = f"rank {names} is" if len(gone) == 1 else f"ranks {names} are"
            seconds = max(silent[rank] for rank in gone)
            return f"{verb} gone: no sign of life for {seconds:.0f} s{self._advice}", lowest_alive
        return "", lowest_alive

    def _silence(self, rank: int, beat: str) -> float:
        """Seconds since the rank's sign of life last changed."""
        now = time.monotonic()
        if rank not in self._heard or self._heard[rank][0] != beat:
            self._heard[rank] = beat, now
        return now - self._heard[rank][1]

    def _decide(self, message: str, *, lowest_alive: int) -> None:
        if self._loss is None:
            self._loss = message, self._rank == lowest_alive
            self._decided.set()
