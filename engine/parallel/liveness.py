"""What ranks tell each other beside training: who is alive, and records of JSON.

All of it goes through the store that the ranks met at, over connections of its own, and never
through a collective: a thread may use it while another trains.
"""

import errno
import itertools
import json
import signal
import threading
import time
from collections.abc import Iterable
from contextlib import contextmanager, suppress

import torch.distributed as dist

BEAT = 0.5  # seconds between two signs of life
SILENCE_LIMIT = 5.0  # seconds without one after which a rank is dead,
PATIENCE = 2.5  # and once the run has failed
TIMEOUT = 3600.0  # seconds until a rank that lives, but does not answer, fails a save


class LostRank(RuntimeError):
    """A rank died, or ended with an error of its own; the message names it."""

    exit_code = 7

    @classmethod
    def of(cls, who: str) -> "LostRank":
        return cls(
            f"parallel: {who} stopped responding. "
            "Start again with --resume; torchrun --max-restarts 3 does so by itself."
        )


def _ranks(ranks: Iterable[int]) -> str:
    names = [str(rank) for rank in ranks]
    return f"rank{'s' * (len(names) > 1)} {', '.join(names)}"


def _is_consequence(error: BaseException) -> bool:
    """Whether it is what a collective or the store raises where another rank has gone."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in text)


class Peers:
    """The ranks of a world. A thread gives signs of life from here on until `stop`."""

    def __init__(self, store: dist.Store, rank: int, size: int):
        self.rank, self.size, self.channels = rank, size, itertools.count()
        self.store = dist.PrefixStore("peers", store).clone()
        self.ended, self.verdict_text, self.patience = threading.Event(), "", SILENCE_LIMIT
        self.store.add(f"beats/{rank}", 1)
        threading.Thread(target=self._beat, name="signs-of-life", daemon=True).start()

    def _beat(self) -> None:
        store = self.store.clone()
        with suppress(dist.DistError):  # the main thread meets it too
            while not self.ended.wait(BEAT):
                store.add(f"beats/{self.rank}", 1)
                if store.check(["verdict"]):
                    self.verdict_text = store.get("verdict").decode()

    def stop(self) -> None:
        self.ended.set()

    def silent(self, ranks: Iterable[int]) -> list[int]:
        """The ranks that give no sign of life. Returns as soon as all have given one."""
        before = {rank: self.store.add(f"beats/{rank}", 0) for rank in ranks}
        began = time.monotonic()
        while True:
            found = {rank: self.store.add(f"beats/{rank}", 0) for rank in before}
            missing = [rank for rank in before if found[rank] == before[rank]]
            if not missing or time.monotonic() - began > self.patience:
                return missing
            time.sleep(0.1)

    def channel(self) -> "Channel":
        """A new one; all ranks must ask for theirs in the same order."""
        return Channel(self)

    @contextmanager
    def named(self):
        """Where a run fails because another rank has gone, raises a LostRank that names it, from
        the error that said so. An error of this rank's own stays as it is."""
        try:
            yield
        except BaseException as error:
            # torchrun sends SIGTERM as soon as it knows of the death; this must still be said.
            main = threading.current_thread() is threading.main_thread()
            before = signal.signal(signal.SIGTERM, signal.SIG_IGN) if main else None
            lost = self._explain(error)
            if lost is not None:
                raise lost from error
            if main and not isinstance(error, LostRank):
                signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
            raise

    def verdict(self) -> str:
        """Why the run has ended, in the words of the first rank that knew; empty until then."""
        return self.store.get("verdict").decode() if self.store.check(["verdict"]) else ""

    def declare_dead(self, text: str) -> str:
        """Proposes a verdict; returns the first one that any rank proposed."""
        return self.store.compare_set("verdict", "", text).decode()

    def store_lost(self) -> LostRank:
        if self.verdict_text:
            return LostRank(self.verdict_text)
        torchrun = dist.is_torchelastic_launched()  # which then keeps the store; else rank 0 does
        return LostRank.of("torchrun's store" if torchrun else "the store of rank 0")

    def _explain(self, error: BaseException) -> LostRank | None:
        """None where the error itself is what is to be said."""
        own = not isinstance(error, LostRank) and not _is_consequence(error)
        self.patience = PATIENCE
        try:
            text = self.verdict()
            if not text and _is_consequence(error):
                text = self._inquire()
            elif not text:
                said = str(error) or type(error).__name__
                rule = f"parallel: rank {self.rank} failed: {said}"
                text = self.declare_dead(rule if own else said)
            if self.rank == 0 and not dist.is_torchelastic_launched():
                time.sleep(2 * BEAT)  # the store ends with this process: all shall know before
        except dist.DistError:
            return self.store_lost() if _is_consequence(error) else None
        return None if own or text in ("", str(error)) else LostRank(text)

    def _inquire(self) -> str:
        """The verdict; empty where every rank is alive. One rank looks, the others wait for it."""
        if self.store.add("inquiries", 1) == 1:
            lost = self.silent(rank for rank in range(self.size) if rank != self.rank)
            found = self.declare_dead(str(LostRank.of(_ranks(lost)))) if lost else ""
            return self.verdict() or found
        deadline = time.monotonic() + 2 * PATIENCE
        while not self.verdict() and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.verdict()


class Channel:
    """Between rank 0 and the others, records that JSON has, each under a key used once. A single
    process (peers None) is its own rank 0.

    A channel is one thread's. Waiting ends with a LostRank if a rank waited for is dead, or its
    store, and with an OSError after TIMEOUT.
    """

    def __init__(self, peers: Peers | None = None):
        self.peers = peers
        self.rank, self.size = (0, 1) if peers is None else (peers.rank, peers.size)
        self.told: list[str] = []
        if peers is not None:
            self.store = dist.PrefixStore(f"channel{next(peers.channels)}", peers.store.clone())

    def hasten(self) -> None:
        """The run has failed: who is silent now will not speak again."""
        if self.peers is not None:
            self.peers.patience = PATIENCE

    def tell(self, key: str, record=None):
        """Sends rank 0's record to all ranks, and returns it on each."""
        if self.size == 1:
            return record
        with self._answering():
            if self.rank == 0:
                self.store.set(key, json.dumps(record))
                self.told.append(key)
                return record
            self._await([key], [0])
            return json.loads(self.store.get(key))

    def hear(self, key: str, record=None) -> list | None:
        """Gathers the records of all ranks, in order, on rank 0; returns None on the others."""
        if self.size == 1:
            return [record]
        with self._answering():
            if self.rank > 0:
                self.store.set(f"{key}/{self.rank}", json.dumps(record))
                return None
            others = range(1, self.size)
            keys = [f"{key}/{rank}" for rank in others]
            self._await(keys, others)
            found = [record, *(json.loads(value) for value in self.store.multi_get(keys))]
            for used in (*keys, *self.told):  # who has spoken now has heard what was told before
                self.store.delete_key(used)
            self.told.clear()
            return found

    def _await(self, keys: list[str], ranks: Iterable[int]) -> None:
        began, pause = time.monotonic(), 0.002
        while not self.store.check(keys):
            time.sleep(pause)
            pause = min(2 * pause, 0.25)
            if time.monotonic() - began < 1:
                continue
            lost = self.peers.silent(ranks)
            if lost and not self.store.check(keys):
                self.peers.declare_dead(str(LostRank.of(_ranks(lost))))
            if text := self.peers.verdict():
                raise LostRank(text)
            if time.monotonic() - began > TIMEOUT * (1 + (self.rank > 0)):  # rank 0 gives up first
                waiting = [r for k, r in zip(keys, ranks, strict=True) if not self.store.check([k])]
                raise TimeoutError(errno.ETIMEDOUT, f"no answer from {_ranks(waiting)}")

    @contextmanager
    def _answering(self):
        try:
            yield
        except dist.DistError as error:
            raise self.peers.store_lost() from error
