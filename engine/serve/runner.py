"""The process that owns the device and runs the jobs, one after the other.

    python -m engine.serve.runner

Its first line of input is a JSON object of settings; each line after it wakes it, "stop ID" ends
a job that runs, "drain" asks it to end after the job that runs, and the end of input means that the
server is gone. What it has to say goes out as one JSON object a line.
"""

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator

from engine.serve.loading import ModelSource
from engine.serve.settings import Settings
from engine.serve.store import VIDEO, PatientStore
from engine.serve.work import Worker

LOOK = 0.5  # seconds between two looks at a table that other machines fill too


class Runner:
    """Runs the jobs of a store with a pipeline, the one that has waited longest first.

    say: told of what happened, as a dict.
    """

    def __init__(self, pipe, store: PatientStore, settings: Settings, owner: str, say: Callable):
        self.store, self.owner = store, owner
        self.woken, self.draining = threading.Event(), threading.Event()
        self.worker = Worker(pipe, store, settings, owner, say, self.wait)

    def wait(self, seconds: float) -> None:
        self.woken.wait(seconds)
        self.woken.clear()

    def listen(self, lines: Iterator[str]) -> None:
        for line in lines:
            word, _, id = line.strip().partition(" ")
            if word == "drain":
                self.draining.set()
            elif word == "stop":
                self.worker.stop(id)
            self.woken.set()
        os._exit(0)  # the server is gone; whoever comes after it runs the job again

    def run(self) -> None:
        """Until it is to drain."""
        while not self.draining.is_set():
            self.store.take_back(self.owner)
            job = self.store.claim(self.owner)
            if job is None:
                self.wait(LOOK)
            elif job.kind == VIDEO:
                self.worker.video(job)
            else:
                self.worker.captions(job)


def warm(pipe) -> None:
    """Compiles what a first clip would wait for, and captures its steps."""
    if pipe.device.type != "cuda":
        return
    modes = ["t2v", "t2vt"] if pipe.config.text_rows else ["t2v"]
    for mode in modes:
        pipe.warm_up(mode, progress=False)
        pipe.generate("warm", mode=mode, num_inference_steps=2, progress=False)


def main() -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no message
    lock = threading.Lock()

    def say(record: dict) -> None:
        with lock:
            print(json.dumps(record), file=out, flush=True)

    given = json.loads(sys.stdin.readline())
    settings, owner = Settings.of_plain(given["settings"]), given["owner"]
    store = PatientStore(settings.database_url, durable=False)
    try:
        pipe = ModelSource(**given["source"]).load()
        runner = Runner(pipe, store, settings, owner, say)
        threading.Thread(target=runner.listen, args=(sys.stdin,), daemon=True).start()
        warm(pipe)
    except Exception as error:
        code = getattr(error, "exit_code", 1)
        say({"event": "failed", "message": str(error), "exit_code": code})
        raise SystemExit(code) from error
    say({"event": "ready", "facts": facts(pipe)})
    runner.run()
    store.close()


def facts(pipe) -> dict:
    """What only the loaded model knows of what /v1/models says."""
    steps = pipe.config.sampling and pipe.config.sampling.num_inference_steps
    return {"device": str(pipe.device), "default_steps": steps}


if __name__ == "__main__":
    main()
