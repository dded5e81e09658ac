"""What a runner does with a job: videos one by one, captions of one kind together.

What fails one job leaves the next ones as they are.
"""

import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine.errors import Cancelled, ModelFileError, NonFinite, OutOfMemory, UsageError
from engine.planning import memory
from engine.serve.results import here, keep, remove_result, workshop
from engine.serve.settings import GB, Settings, folder
from engine.serve.store import CANCELLED, CAPTION, FAILED, Store, ended

DENOISED = 95  # per cent of a job when its steps are done; decoding takes the rest
SPARSE = 0.05  # seconds between two signs of life; 24 quick steps cost 40 ms with one at each
SIZES = ("num_frames", "height", "width")
OUT_OF_MEMORY = "out_of_memory"
HIDDEN = "The server failed; its log has the traceback."


def code_of(error: BaseException) -> str:
    """What a client reads in error.code."""
    if isinstance(error, Cancelled):
        return CANCELLED
    if isinstance(error, OutOfMemory) or memory.is_out_of_memory(error):
        return OUT_OF_MEMORY
    if isinstance(error, UsageError):
        return "invalid_request"
    if isinstance(error, ModelFileError):
        return "invalid_video"
    return "non_finite" if isinstance(error, NonFinite) else "internal_error"


def so_far(text, ids, committed) -> str:
    """The beginning of a caption that no later token changes: the words of its first committed
    tokens but for the last, which may go on.

    text: the pipeline's, which decodes.
    ids: int64 [T].
    committed: bool [T].
    """
    known = ids[: int(committed.long().cumprod(0).sum())]
    found = text.decode_rows(known)
    return found if text.eos_id in known.tolist() else found.rpartition(" ")[0]


class Beat:
    """The Event that a pipeline asks after each step and, while it encodes and decodes, at each
    layer and chunk: a question is a sign of life of the jobs, and the answer is whether nobody
    wants any of them still. The table says so, and `stop` earlier where the server knows."""

    def __init__(self, store: Store, owner: str, jobs: list):
        self.store, self.owner, self.jobs = store, owner, {job.id for job in jobs}
        self.progress, self.steps, self._next = 0, 1, 0.0

    def stop(self, id: str) -> None:
        self.jobs.discard(id)

    def is_set(self) -> bool:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + SPARSE
            for id in list(self.jobs):
                if not self.store.beat(id, self.owner, self.progress):
                    self.stop(id)
        return not self.jobs


class Worker:
    """Runs jobs that its owner has claimed.

    say: told of what happened, as a dict.
    wait: waits so many seconds, or until another job came.
    """

    def __init__(
        self, pipe, store: Store, settings: Settings, owner: str, say: Callable, wait: Callable
    ):
        self.pipe, self.store, self.settings, self.owner = pipe, store, settings, owner
        self.say, self.wait = say, wait
        self.beats: list[Beat] = []  # of what runs: a caption may run within a video

    @contextmanager
    def beating(self, jobs: list) -> Iterator[Beat]:
        self.beats.append(Beat(self.store, self.owner, jobs))
        try:
            yield self.beats[-1]
        finally:
            self.beats.pop()

    def stop(self, id: str) -> None:
        """Stops a job within a step, if it runs; from any thread."""
        for beat in list(self.beats):
            beat.stop(id)

    def end(self, jobs: list, error: BaseException | None = None) -> str:
        """The jobs have ended; with an error, in failure. Returns their code."""
        code = "ok" if error is None else code_of(error)
        if code == "internal_error":
            traceback.print_exception(error)
        for job in jobs:
            if code not in ("ok", CANCELLED):
                said = HIDDEN if code == "internal_error" else str(error)
                self.store.fail(job.id, self.owner, code, said)
            self.say(ended(job, code) | ({} if error is None else {"error": str(error)}))
        return code

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
        try:
            with self.beating([job]) as beat:
                self._video(job, beat)
            code = self.end([job])
        except Exception as error:
            code = self.end([job], error)
        if code == OUT_OF_MEMORY:  # what the error's frames held is free by now
            self._free_memory()

        row = self.store.get(job.id)
        if row is None or row.status == FAILED:
            remove_result(self.settings, job.id)

    def _video(self, job, beat: Beat) -> None:
        asked, began = json.loads(job.request), time.time()
        lora, path = asked.pop("lora"), workshop(self.settings) / f"{job.id}.mp4"
        settings = self._settle(asked)
        beat.steps = settings["steps"]

        def follow(pipe, step: int, moment: float, tensors: dict) -> None:
            beat.progress = int(DENOISED * (step + 1) / beat.steps)
            if self.settings.interleave and not lora:
                self.captions()

        self.choose(lora)
        shape = 1, *self.pipe.config.shape(*(asked[name] for name in SIZES))
        guided = settings["guidance_scale"] > 1
        self.admit(shape, mode=asked["mode"], guided=guided, steps=beat.steps)
        how = {"callback_on_step_end": follow, "callback_on_step_end_tensor_inputs": ()}
        result = self.pipe.generate(**asked, **how, cancel=beat, progress=False, output_path=path)

        result.settings |= {"job": job.id, "trace": job.trace}
        result.save_sidecar(path)
        keep(self.settings, path)
        timings = result.timings | {"queued": round(began - job.created_at, 4)}
        found = {"caption": result.caption, "timings": timings, "bytes": path.stat().st_size}
        if not self.store.complete(job.id, self.owner, found):
            raise Cancelled("serve: nobody wants the video any more.")
        self.say({"event": "video", "seconds": time.time() - began, "timings": timings})

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

        by_shape: dict[tuple, list] = {}
        for job in self._batch(first):
            try:
                frames = self._frames(json.loads(job.request))
            except Exception as error:
                self.end([job], error)
            else:
                by_shape.setdefault(frames.shape, []).append((job, frames))
        for group in by_shape.values():
            self.caption_batch(group)

    def _batch(self, first) -> list:
        """The first caption and those that came, or come within the window, and may run with it."""
        jobs, until = [first], time.monotonic() + self.settings.caption_window_ms / 1000
        while len(jobs) < self.settings.caption_batch:
            more = self.store.claim(self.owner, (CAPTION,), first.like)
            if more is not None:
                jobs.append(more)
            elif (left := until - time.monotonic()) > 0:
                self.wait(left)
            else:
                break
        return jobs

    def _frames(self, asked: dict):
        from engine.media import read_clips

        path = here(self.settings, folder(asked["path"]))
        clips = read_clips(path, self.pipe.config, asked["start"])
        return next(clips).frames.numpy()

    def caption_batch(self, group: list[tuple]) -> None:
        """Captions of videos of one shape, as one run; as two where memory is short."""
        jobs, half = [job for job, _ in group], len(group) // 2
        try:
            self._caption(group)
        except Exception as error:
            if not half or code_of(error) != OUT_OF_MEMORY:
                self.end(jobs, error)
                return
        else:
            self.end(jobs)
            return

        self._free_memory()
        self.caption_batch(group[:half])
        self.caption_batch(group[half:])

    def _caption(self, group: list[tuple]) -> None:
        """One run; a job may want several captions."""
        import numpy as np

        jobs, asked = [job for job, _ in group], [json.loads(job.request) for job, _ in group]
        how = asked[0]
        self.choose({})
        counts = [request["n"] for request in asked]
        frames = np.concatenate(
            [x[None].repeat(n, 0) for (_, x), n in zip(group, counts, strict=True)]
        )
        seeds = [r["seed"] + i for r in asked for i in range(r["n"])]
        batch = len(frames), *self.pipe.config.shape(*frames.shape[1:4])
        self.admit(batch, mode="v2t", guided=False, steps=how["num_inference_steps"] or 50)

        names = "num_inference_steps", "temperature", "video_cache", "commit"
        choices = {name: how[name] for name in names} | {"seed": seeds, "progress": False}
        if how["commit"] == "confidence" and any(request["stream"] for request in asked):
            choices |= {"callback_on_step_end": self._teller(jobs, asked)}
        with self.beating(jobs) as beat:
            results = self.pipe.caption(frames, cancel=beat, **choices)
        for job, n in zip(jobs, counts, strict=True):
            mine, results = results[:n], results[n:]
            found = {"captions": [result.caption for result in mine]}
            found |= {"timings": mine[0].timings, "batch": len(frames)}
            found |= {"tokens": self._tokens(found["captions"])}
            self.store.complete(job.id, self.owner, found)
        self.say({"event": "batch", "size": len(jobs), "timings": mine[0].timings})

    def _teller(self, jobs: list, asked: list[dict]) -> Callable:
        """A callback that notes, of each job whose client streams, the captions so far."""
        said = [[""] * request["n"] for request in asked]

        def follow(pipe, step: int, moment: float, tensors: dict) -> None:
            pairs = zip(tensors["tokens"].cpu(), tensors["committed"].cpu(), strict=True)
            texts = [so_far(pipe.text, *pair) for pair in pairs]
            for i, (job, request) in enumerate(zip(jobs, asked, strict=True)):
                mine, texts = texts[: request["n"]], texts[request["n"] :]
                if request["stream"] and mine != said[i]:
                    said[i] = mine
                    self.store.note(job.id, self.owner, {"captions": mine})
                    self.say({"event": "said", "id": job.id})

        return follow

    def _tokens(self, captions: list[str]) -> int:
        encode = self.pipe.tokenizer.encode
        return sum(len(encode(caption).ids) for caption in captions)
