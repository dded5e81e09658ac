"""The process that owns the device and runs the jobs, one after the other.

    python -m engine.serve.runner

Its first line of input is a JSON object of settings; each line after it wakes it, "drain" asks it
to end after the job that runs, and the end of input means that the server is gone. What it has to
say goes out as one JSON object a line.
"""

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import Cancelled, ModelFileError, NonFinite, OutOfMemory, UsageError
from engine.planning import memory
from engine.serve.loading import ModelSource
from engine.serve.runner_files import remove_result
from engine.serve.settings import GB, Settings
from engine.serve.store import CANCELLED, CAPTION, FAILED, VIDEO, Store, ended

LOOK = 0.5  # seconds between two looks at a table that other machines fill too
DENOISED = 95  # per cent of a job when its steps are done; decoding takes the rest
LOG = logging.getLogger("univigu.runner")


def code_of(error: BaseException) -> str:
    """What a client reads in error.code."""
    if isinstance(error, OutOfMemory) or memory.is_out_of_memory(error):
        return "out_of_memory"
    if isinstance(error, UsageError):
        return "invalid_request"
    if isinstance(error, ModelFileError):
        return "invalid_video"
    return "non_finite" if isinstance(error, NonFinite) else "internal_error"


class Beat:
    """The Event that `Pipeline.generate` asks after each step and before each chunk: every question
    is a sign of life of its jobs, and the answer is whether nobody wants any of them still."""

    def __init__(self, store: Store, owner: str, jobs: list):
        self.store, self.owner, self.jobs = store, owner, {job.id for job in jobs}
        self.progress, self.steps = 0, 1

    def is_set(self) -> bool:
        self.jobs = {id for id in self.jobs if self.store.beat(id, self.owner, self.progress)}
        return not self.jobs


class Runner:
    """Runs the jobs of a store with a pipeline.

    say: told of what happened, as a dict.
    """

    def __init__(self, pipe, store: Store, settings: Settings, owner: str, say: Callable):
        self.pipe, self.store, self.settings, self.owner = pipe, store, settings, owner
        self.say, self.woken, self.draining = say, threading.Event(), threading.Event()

    def listen(self, lines: Iterator[str]) -> None:
        for line in lines:
            if line.strip() == "drain":
                self.draining.set()
            self.woken.set()
        os._exit(0)  # the server is gone; whoever comes after it runs the job again

    def run(self) -> None:
        """Until it is to drain."""
        while not self.draining.is_set():
            self.woken.clear()
            job = self.store.claim(self.owner)
            if job is None:
                self.woken.wait(LOOK)
            elif job.kind == VIDEO:
                self.video(job)
            else:
                self.captions(job)

    @contextmanager
    def ending(self, jobs: list) -> Iterator[None]:
        """Whatever happens to the jobs is theirs alone: the next ones run."""
        code = "ok"
        try:
            yield
        except Cancelled:
            code = CANCELLED
        except Exception as error:
            code = code_of(error)
            if code == "internal_error":
                traceback.print_exc()
            elif code == "out_of_memory":
                self._free_memory()
            said = (
                "The server failed; its log has the traceback."
                if code == "internal_error"
                else error
            )
            for job in jobs:
                self.store.fail(job.id, self.owner, code, str(said))
        self._say_ended(jobs, code)

    def _say_ended(self, jobs: list, code: str) -> None:
        for job in jobs:
            self.say(ended(job, code))

    def _free_memory(self) -> None:
        if self.pipe.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()

    def admit(self, shape: tuple[int, ...], **job) -> None:
        """Errors: OutOfMemory where the estimate of a run is above what there is."""
        fields = self.pipe.job_of(shape, dtype=self.pipe.model.dtype, **job)
        fields.pop("cfg", None)
        codecs, cfg = fields.pop("codecs"), self.pipe.model.cfg
        wanted = memory.Job(**fields, precision=self.pipe.model.ops.precision)
        peaks = memory.peaks(memory.estimate(cfg, wanted, codecs))
        stage = max(peaks, key=peaks.get)
        limit = self._memory()
        if limit and peaks[stage] > limit:
            raise OutOfMemory(
                f"memory: {stage} would take {memory.readable(peaks[stage])} of "
                f"{memory.readable(limit)}, by the estimate. "
                f"{memory.advice(stage, cfg, codecs, **fields)}"
            )

    def _memory(self) -> int:
        """Bytes that a run may take; 0: it is not known."""
        if self.settings.memory_gb or self.pipe.device.type != "cuda":
            return int(self.settings.memory_gb * GB)
        import torch

        return torch.cuda.get_device_properties(self.pipe.device).total_memory

    def video(self, job) -> None:
        asked, began = json.loads(job.request), time.time()
        lora, path = asked.pop("lora"), self.settings.results / f"{job.id}.mp4"
        beat = Beat(self.store, self.owner, [job])

        def follow(pipe, step: int, moment: float, tensors: dict) -> None:
            beat.progress = int(DENOISED * (step + 1) / beat.steps)
            if self.settings.interleave and not lora:
                self.captions()

        with self.ending([job]):
            settings = self._settle(asked)
            beat.steps = settings.pop("steps")
            self.choose(lora)
            guided = settings["guidance_scale"] > 1
            shape = 1, *self.pipe.config.shape(*(asked[n] for n in SIZES))
            self.admit(shape, mode=asked["mode"], guided=guided, steps=beat.steps)
            result = self.pipe.generate(
                **asked,
                cancel=beat,
                callback_on_step_end=follow,
                callback_on_step_end_tensor_inputs=(),
                progress=False,
                output_path=path,
            )
            result.settings |= {"job": job.id, "trace": job.trace}
            result.save_sidecar(path)
            timings = result.timings | {"queued": round(began - job.created_at, 4)}
            found = {"caption": result.caption, "timings": timings, "bytes": path.stat().st_size}
            if not self.store.complete(job.id, self.owner, found):
                raise Cancelled("serve: nobody wants the video any more.")
            self.say({"event": "video", "seconds": time.time() - began, "timings": timings})
        row = self.store.get(job.id)
        if row is None or row.status == FAILED:
            remove_result(self.settings, job.id)

    def _settle(self, asked: dict) -> dict:
        """What `generate` will make of the request's steps, see `schedule.settle`."""
        from engine import schedule

        names = "mode num_inference_steps guidance_scale flow_shift solver text_steps".split()
        given = {name: asked[name] for name in names} | {"sampler": "exact"}
        given |= {"sigmas": None, "timesteps": None}
        index = self.pipe.index
        settings = schedule.settle(given, self.pipe.sampling, index.flow_shift, index.solver)
        return settings | {"steps": len(schedule.settled(settings))}

    def choose(self, lora: dict[str, float]) -> None:
        if self.pipe.adapters.loaded:
            self.pipe.set_adapters(list(lora), list(lora.values()))

    def captions(self, first=None) -> None:
        """Runs a caption that waits and, with it, those that may share its batch. first: one that
        is claimed already."""
        first = first or self.store.claim(self.owner, (CAPTION,))
        if first is None:
            return
        jobs, until = [first], time.monotonic() + self.settings.caption_window_ms / 1000
        while len(jobs) < self.settings.caption_batch:
            more = self.store.claim(self.owner, (CAPTION,), first.like)
            if more is not None:
                jobs.append(more)
            elif time.monotonic() < until:
                self.woken.wait(max(0, until - time.monotonic()))
                self.woken.clear()
            else:
                break

        by_shape: dict[tuple, list] = {}
        for job in jobs:
            with self.ending_badly(job):
                frames = self._frames(json.loads(job.request))
                by_shape.setdefault(frames.shape, []).append((job, frames))
        for group in by_shape.values():
            self.caption_batch(group)

    @contextmanager
    def ending_badly(self, job) -> Iterator[None]:
        """`ending` of a job that goes on where nothing happens."""
        try:
            yield
        except Exception as error:
            with self.ending([job]):
                raise error

    def _frames(self, asked: dict):
        from engine.media import read_clips

        return next(
            read_clips(Path(asked["path"]), self.pipe.config, asked["start"])
        ).frames.numpy()

    def caption_batch(self, group: list[tuple]) -> None:
        """Captions of videos of one shape, as one run; as two where memory is short."""
        jobs, half = [job for job, _ in group], len(group) // 2
        try:
            self._caption(group)
        except Exception as error:
            if not half or code_of(error) != "out_of_memory":
                with self.ending(jobs):
                    raise error
                return
        else:
            self._say_ended(jobs, "ok")
            return

        self._free_memory()  # of the error's frames too, which are gone by now
        self.caption_batch(group[:half])
        self.caption_batch(group[half:])

    def _caption(self, group: list[tuple]) -> None:
        """One run; a job may want several captions."""
        import numpy as np

        jobs, asked = [job for job, _ in group], [json.loads(job.request) for job, _ in group]
        beat, how = Beat(self.store, self.owner, jobs), asked[0]
        self.choose({})
        counts = [request["n"] for request in asked]
        frames = np.concatenate(
            [x[None].repeat(n, 0) for (_, x), n in zip(group, counts, strict=True)]
        )
        seeds = [r["seed"] + i for r in asked for i in range(r["n"])]
        batch = len(frames), *self.pipe.config.shape(*frames.shape[1:4])
        self.admit(batch, mode="v2t", guided=False, steps=how["num_inference_steps"] or 50)

        results = self.pipe.caption(
            frames,
            num_inference_steps=how["num_inference_steps"],
            temperature=how["temperature"],
            video_cache=how["video_cache"],
            seed=seeds,
            cancel=beat,
            progress=False,
        )
        for job, n in zip(jobs, counts, strict=True):
            mine, results = results[:n], results[n:]
            found = {"captions": [result.caption for result in mine]}
            found |= {"timings": mine[0].timings, "batch": len(frames)}
            found |= {"tokens": self._tokens(found["captions"])}
            self.store.complete(job.id, self.owner, found)
        self.say({"event": "batch", "size": len(jobs), "timings": mine[0].timings})

    def _tokens(self, captions: list[str]) -> int:
        encode = self.pipe.tokenizer.encode
        return sum(len(encode(caption).ids) for caption in captions)


SIZES = ("num_frames", "height", "width")


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
    store = Store(settings.database_url)
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
    """What a client may want to know of the model."""
    found = {"modes": ["t2v", "t2vt", "v2t"] if pipe.config.text_rows else ["t2v"]}
    backends = {choice.op: choice.backend for choice in pipe.model.ops.table}
    return found | {"device": str(pipe.device), "backends": backends}


if __name__ == "__main__":
    main()
