"""How many replicas the jobs want. Ray Serve's own policy counts requests, of which a job that
waits has none."""

import time

from engine.errors import UsageError
from engine.serve.store import FAULTS, QUEUED, RUNNING, Store

LOOK = 1  # seconds between two looks at the table; Ray's controller asks more often


class Queue:
    """A policy of Ray Serve: a replica for each job that runs or waits, in the limits that Ray
    keeps. url: of the table of jobs."""

    def __init__(self, url: str):
        self.url, self.store = url, None
        self.wanted, self.next = None, 0.0

    def __call__(self, context) -> tuple[int, dict]:
        if time.monotonic() >= self.next:
            self.next = time.monotonic() + LOOK
            try:
                self.store = self.store or Store(self.url)
                self.wanted = max(1, self.store.count(QUEUED, RUNNING))
            except (*FAULTS, UsageError):  # a table out of reach asks for no change
                self.wanted = None
        return self.wanted or context.target_num_replicas, {}
