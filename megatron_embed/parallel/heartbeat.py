"""Heartbeats in the run's key-value store, by which all ranks learn which rank is lost when a collective fails.

A heartbeat is the text "COUNT STATE"; its count rises with each one.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist

from megatron_embed.errors import LostRankError, PreemptedError, UserError, first_line
from megatron_embed.parallel.relay import connect
from megatron_embed.parallel.signing import Signer
from megatron_embed.parallel.topology import Topology
from megatron_embed.platform import stop_signal as stop

HEARTBEAT_SECONDS = 1.0
SUSPECT_SECONDS = 5.0
"""A rank without a heartbeat for so long is lost, once a collective has failed somewhere."""
LONGEST_SILENCE_SECONDS = 60.0
"""The same if none has failed (NCCL may wait for ever); half of `parallel.timeout_seconds` if that is less."""
GRACE_SECONDS = 10.0
"""How long the main thread may take to notice the loss itself, before the monitor's thread ends the process."""
CONNECTION_WORDS = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL", "ProcessGroup",
                    "Timed out waiting", "Application timeout")

ADVICE = "; the others stop. Look at its log, then start the run again: it resumes from its last checkpoint"
LEAVE_SECONDS = 1.5
"""How long rank 0, asked to stop, waits for the others to read that, before the store ends with its process."""
ALIVE, SUSPECT, DONE, FAILED = "alive", "suspect", "done", "failed"
STOPPING, LEFT = "stopping", "left"
"""Asked to stop, but still completing its work; ended because some rank was asked to stop."""
RUNNING_STATES = (ALIVE, SUSPECT, STOPPING)
ASKED = "another rank was asked to"


@contextlib.contextmanager
def monitor_ranks(topology: Topology, on_loss: Callable[[str, bool], None], advice: str = ADVICE) -> Iterator[None]:
    """Turn the loss of another rank into a LostRankError that names it, within `parallel.timeout_seconds`, and pass a
    request to stop from any rank to all.

    Args:
        on_loss: called by a thread with (message, whether this is the reporting rank) if the main thread hangs
            nevertheless; must end the process.
        advice: the end of the message: what the user can do.
    """
    if topology.rendezvous is None:
        yield
        return
    monitor = HeartbeatMonitor(
        *topology.rendezvous, rank=topology.rank, world_size=topology.world_size,
        silence_seconds=min(LONGEST_SILENCE_SECONDS, topology.sizes.timeout_seconds / 2), on_loss=on_loss,
        advice=advice)
    stop.add_exit_action(monitor.leave)
    try:
        yield
    except Exception as error:
        if not is_connection_error(error):
            monitor.close(_final_state(error))
            raise
        explained = monitor.explain(error, topology.sizes.timeout_seconds)
        monitor.close(_final_state(explained))
        raise explained from error
    finally:
        stop.remove_exit_action(monitor.leave)
    monitor.close(DONE)


def _final_state(error: Exception) -> str:
    """The state in the last heartbeat of a rank that ends with this error."""
    if isinstance(error, PreemptedError):
        return LEFT
    return DONE if isinstance(error, UserError | LostRankError) else (
        f"{FAILED} {type(error).__name__}: {first_line(error)}")


def is_connection_error(error: BaseException | None) -> bool:
    """Whether the error, or one that it was raised from, is a collective's that failed because of another rank."""
    while error is not None:
        text = str(error)
        if isinstance(error, dist.DistError) or (
                isinstance(error, RuntimeError) and any(words in text for words in CONNECTION_WORDS)):
            return True
        error = error.__cause__ or error.__context__
    return False


class HeartbeatMonitor:
    """A thread that sends a heartbeat every second; rank 0 watches those of all ranks and tells them of a lost one.

    One small message per rank and second, over a connection of its own: a shared one would be blocked while the main
    thread waits on it.
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
        # Higher than the counts of an earlier monitor, whose heartbeats are ignored.
        self._count = time.time_ns() // 1_000_000
        self._signer, self._latest = Signer(), dict[str, tuple[int, str]]()
        self._last_change: dict[int, tuple[str, float]] = {}
        self._rank_0_is_done = False
        self._stop_time: float | None = None
        self._loss: tuple[str, bool] | None = None
        self._outcome_known, self._closing, self._wake = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Tell the others that this rank was asked to stop and ends now."""
        self.close(LEFT)

    def explain(self, error: BaseException, timeout_seconds: int) -> LostRankError | PreemptedError:
        """The reason why a collective failed here with `error`; waits a few seconds for it."""
        self._state = SUSPECT
        self._wake.set()
        self._outcome_known.wait(SUSPECT_SECONDS + 10 * HEARTBEAT_SECONDS)
        if self._stop_time is not None:
            return PreemptedError(f"stopped ({stop.reason() or ASKED}); start the command again")
        if self._loss is not None:
            message, is_reporting_rank = self._loss
            return LostRankError(message, is_reporting_rank=is_reporting_rank)
        return LostRankError(f"a collective failed on rank {self._rank}, though every rank lives: one of them "
                             f"did not take part within parallel.timeout_seconds = {timeout_seconds}, or the "
                             f"network failed ({first_line(error)}); raise it, or look at the logs",
                             is_reporting_rank=True)

    def close(self, state: str) -> None:
        """Send a last heartbeat with the state in which this rank ends, then end the thread."""
        self._state = state
        self._closing.set()
        self._wake.set()
        self._thread.join(3 * HEARTBEAT_SECONDS)

    def _run(self) -> None:
        try:
            store = dist.PrefixStore(self._signer.key_prefix("heartbeats"),
                                     connect(self._address, max(10.0, self._silence_seconds)))
            if self._rank == 0:
                for rank in range(1, self._world_size):
                    store.set(f"heartbeat/{rank}", self._signer.sign(f"heartbeat/{rank}", f"0 {ALIVE}"))
            while self._loss is None:
                last = self._closing.is_set()
                self._exchange(store)
                if last:
                    return
                if self._stop_time is not None and time.monotonic() - self._stop_time > GRACE_SECONDS:
                    stop.leave_now()
                self._wake.wait(HEARTBEAT_SECONDS)
                self._wake.clear()
        except RuntimeError as error:  # the base of torch.distributed's errors
            if self._closing.is_set() or self._rank_0_is_done:
                return
            host, port = self._address
            self._declare_loss(f"rank 0, or the launcher on its node, is gone: the run's store at {host}:{port} does "
                               f"not answer ({first_line(error)}){self._advice}", lowest_alive=1)
        if not self._closing.wait(GRACE_SECONDS) and self._loss is not None:
            self._on_loss(*self._loss)

    def _exchange(self, store: dist.Store) -> None:
        """Send this rank's heartbeat; rank 0 reads those of all and writes a summary, which the others read."""
        self._count += 1
        own = f"{self._count} {STOPPING if self._state == ALIVE and stop.asked() else self._state}"
        if self._rank == 0:
            self._summarize(store, own)
            return
        store.set(f"heartbeat/{self._rank}", self._signer.sign(f"heartbeat/{self._rank}", own))
        summary = self._newest("summary", store.get("summary"), f"0 {ALIVE}|0||")
        heartbeat, lowest_alive, request, message = summary.split("|", 3)
        self._rank_0_is_done = heartbeat.endswith((DONE, LEFT))
        self._handle_stop_request(request)
        if message:
            self._declare_loss(message, lowest_alive=int(lowest_alive))
        elif self._seconds_silent(0, heartbeat) > self._silence_seconds and not self._rank_0_is_done:
            self._declare_loss(f"rank 0 is gone: no sign of life for {self._silence_seconds:.0f} s{self._advice}",
                               lowest_alive=1)

    def _summarize(self, store: dist.Store, own: str) -> None:
        """Rank 0's summary of all heartbeats: "its own|lowest rank alive|request to stop|message of a loss"."""
        keys = [f"heartbeat/{rank}" for rank in range(1, self._world_size)]
        heartbeats = {0: own, **{rank: self._newest(f"heartbeat/{rank}", raw, f"0 {ALIVE}")
                                 for rank, raw in enumerate(store.multi_get(keys), start=1)}}
        message, lowest_alive = self._find_lost_ranks(heartbeats)
        states = [_state_of(heartbeat) for heartbeat in heartbeats.values()]
        request = LEFT if LEFT in states else STOPPING if STOPPING in states else ""
        summary = f"{own.replace('|', '/')}|{lowest_alive}|{request}|{message}"
        store.set("summary", self._signer.sign("summary", summary))
        self._handle_stop_request(request)
        if self._state == LEFT:
            self._wait_for_others(store, keys)
        elif message:
            time.sleep(2 * HEARTBEAT_SECONDS)  # until all have read it: the store may end with this process
            self._declare_loss(message, lowest_alive=lowest_alive)

    def _newest(self, key: str, raw: bytes, default: str) -> str:
        """The newest text that a rank of this run stored under the key; `raw` is ignored if unsigned or older."""
        text = self._signer.verify(key, raw)
        count = "" if text is None else text.partition(" ")[0]
        if text is not None and count.isdecimal() and len(count) < 20 and (
                key not in self._latest or int(count) > self._latest[key][0]):
            self._latest[key] = int(count), text
        return self._latest[key][1] if key in self._latest else default

    def _handle_stop_request(self, request: str) -> None:
        """Pass on what the ranks report about a request to stop."""
        if request:
            stop.request(ASKED)
        if request == LEFT and self._stop_time is None:
            self._stop_time = time.monotonic()
            self._outcome_known.set()

    def _wait_for_others(self, store: dist.Store, keys: list[str]) -> None:
        """Wait until the others have read that rank 0 leaves: the store may end with this process."""
        deadline = time.monotonic() + LEAVE_SECONDS
        while time.monotonic() < deadline:
            states = [_state_of(self._newest(key, raw, f"0 {ALIVE}"))
                      for key, raw in zip(keys, store.multi_get(keys), strict=True)]
            if not any(state in RUNNING_STATES for state in states):
                return
            time.sleep(0.05)

    def _find_lost_ranks(self, heartbeats: dict[int, str]) -> tuple[str, int]:
        """Rank 0's message about lost or failed ranks, empty if there are none, and the lowest rank that is alive."""
        states = {rank: _state_of(heartbeat) for rank, heartbeat in heartbeats.items()}
        silent = {rank: self._seconds_silent(rank, heartbeat) for rank, heartbeat in heartbeats.items() if rank}
        limit = min(SUSPECT_SECONDS, self._silence_seconds) if SUSPECT in states.values() else self._silence_seconds
        failed = [rank for rank, state in states.items() if state.startswith(FAILED)]
        lost = [rank for rank, seconds in silent.items() if seconds > limit and states[rank] in RUNNING_STATES]
        lowest_alive = min((rank for rank in heartbeats if rank not in lost and rank not in failed), default=0)
        if failed:
            error = states[failed[0]].removeprefix(FAILED).strip()
            return f"rank {failed[0]} ended with {error}{self._advice}", lowest_alive
        if lost:
            names = ", ".join(map(str, lost[:8])) + (f" and {len(lost) - 8} more" if lost[8:] else "")
            verb = f"rank {names} is" if len(lost) == 1 else f"ranks {names} are"
            seconds = max(silent[rank] for rank in lost)
            return f"{verb} gone: no sign of life for {seconds:.0f} s{self._advice}", lowest_alive
        return "", lowest_alive

    def _seconds_silent(self, rank: int, heartbeat: str) -> float:
        """Seconds since the rank's heartbeat last changed."""
        now = time.monotonic()
        if rank not in self._last_change or self._last_change[rank][0] != heartbeat:
            self._last_change[rank] = heartbeat, now
        return now - self._last_change[rank][1]

    def _declare_loss(self, message: str, *, lowest_alive: int) -> None:
        """Set the message, unless there is one; the lowest rank that is alive reports it."""
        if self._loss is None:
            self._loss = message, self._rank == lowest_alive
            self._outcome_known.set()


def _state_of(heartbeat: str) -> str:
    return heartbeat.partition(" ")[2]
