"""Commands that run models: generate, caption, profile. See `engine.cli.commands`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, arg

from engine.cli import checks
from engine.cli.flags import Size, own
from engine.cli.sampling import OWN_SIZE, Loading, Sampling, VideoSteps
from engine.config import (
    EMBEDDED,
    PRESETS,
    ModelConfig,
    PipelineConfig,
    check_size,
    read_pipeline_config,
)
from engine.errors import ModelFileError, UsageError


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Make a video, or a video and its caption, from a prompt."""

    prompt: str
    """What the video shows."""
    mode: Annotated[Literal["t2v", "t2vt"], arg(aliases=("--task",))] = "t2v"
    """t2v: video. t2vt: video and caption."""
    num_frames: Size = None
    """Frames of the video, 4k+1 of them."""
    height: Size = None
    """Height of the video in pixels, a multiple of 16."""
    width: Size = None
    """Width of the video in pixels, a multiple of 16."""
    negative_prompt: str = ""
    """What the video should not show."""
    video: OmitArgPrefixes[VideoSteps] = VideoSteps()
    decoder_path: Annotated[Path | None, own("PATH", "the VAE")] = None
    """A tiny decoder, taew2_1 as .safetensors or .pth: coarser than the VAE, and far cheaper."""
    output_path: Path = Path("out.mp4")
    """.mp4 or .gif; the settings go beside it as .json."""
    server: Annotated[str | None, own("URL", "none")] = None
    """Let the server at this address make it, see univigu serve."""
    api_key_file: Annotated[Path | None, own("PATH", "none")] = None
    """A file whose first line is the server's key."""
    sampling: OmitArgPrefixes[Sampling] = Sampling()

    def check(self) -> tuple[int, int]:
        """Checks all flags; returns height and width, or the least possible where they are the
        model's."""
        self.sampling.check()
        if not self.prompt.strip():
            raise UsageError("generate: --prompt must not be empty. Say what the video shows.")
        checks.check_video_steps(self.steps())
        sizes = (self.num_frames, 1), (self.height, 16), (self.width, 16)
        frames, height, width = (least if size is None else size for size, least in sizes)
        check_size(frames, height, width)
        return height, width

    def steps(self) -> dict:
        """What `schedule.settle` takes."""
        return self.video.settings(self.mode, self.sampling)

    def run(self) -> None:
        size = self.check()
        sizes = {name: getattr(self, name) for name in ("num_frames", "height", "width")}
        if self.sampling.estimate:
            print(self.sampling.estimated(**sizes, **self.sampling.job_of(self.steps())))
            return

        checks.check_video_output(self.output_path, *size)
        if self.server is not None:
            self.run_there()
            return

        settings = sizes | self.steps() | {"negative_prompt": self.negative_prompt}
        with self.sampling.pipeline(self.decoder_path) as pipe:
            settings |= {"output_path": self.output_path}
            result = pipe.generate(self.prompt, **self.sampling.choices() | settings)

        if result is None:
            return  # another rank has it
        print(self.output_path)
        if result.caption is not None:
            print(f"caption: {result.caption}")
        self.sampling.report(result)

    def run_there(self) -> None:
        from engine.cli import remote

        video = remote.generate(self)
        print(self.output_path)
        if video["caption"] is not None:
            print(f"caption: {video['caption']}")
        if not self.sampling.quiet:
            print(f"seed: {video['seed']}")


@dataclass(frozen=True, kw_only=True)
class Caption:
    """Say what videos show."""

    video: tuple[Path, ...]
    """One file or several. Of each the model's number of frames is taken, at its frame rate and
    fitted to its size; fewer of a shorter file."""
    start: float = 0.0
    """Seconds from the first frame to where the clip begins."""
    end: Annotated[float | None, own("FLOAT", "the file's")] = None
    """Seconds from the first frame to where the clip ends at the latest."""
    every: Annotated[str | None, own("TIME", "one clip")] = None
    """Caption a clip every 5s, 2m or 1h, until the end."""
    fps: Size = None
    """Frames of a clip per second."""
    num_frames: Size = None
    """Frames of a clip, 4k+1 of them."""
    video_cache: Annotated[str, arg(metavar="exact|frozen|INT")] = "exact"
    """exact: compute all rows in every step. frozen: the video's in the first step alone. A number
    k: in every k-th step. The last two are approximations, but for a model whose video does not see
    text."""
    report_drift: bool = False
    """Run the exact path too, and print how far --video-cache is from it."""
    output_path: Annotated[Path | None, own("PATH", "none")] = None
    """.json for captions, settings, timings, and what was done to the files. .jsonl, .srt or .vtt
    for captions with their times; the .json goes beside it."""
    sampling: OmitArgPrefixes[Sampling] = Sampling()

    def check(self) -> None:
        self.sampling.check()
        if checks.video_cache(self.video_cache) not in ("exact", 1) and self.sampling.sp > 1:
            raise UsageError(
                f"caption: --video-cache must be exact with --sp; got {self.video_cache}. "
                "Leave out one of them."
            )
        checks.check_captions_output(self.output_path, len(self.video))
        if self.every is not None:
            checks.seconds("--every", self.every)
        if self.fps is not None and not 1 <= self.fps <= 240:
            raise UsageError(f"caption: --fps must be between 1 and 240; got {self.fps}.")
        check_size(1 if self.num_frames is None else self.num_frames, 16, 16)
        if not self.video:
            raise UsageError("caption: --video must name at least one file; got none.")
        for path in self.video:
            if not path.is_file():
                raise ModelFileError(f"caption: --video must be a file; got {path}. Check it.")

    def clips(self, path: Path, config: PipelineConfig) -> Iterator:
        """What the model of this configuration captions of the file: one `StreamedClip`, or the
        `Excerpt`s of --every."""
        from engine.media import StreamedClip, read_clips

        asked = {"fps": self.fps, "num_frames": self.num_frames}
        config = replace(config, **{k: v for k, v in asked.items() if v is not None})
        if self.every is None:
            whole = self.num_frames is not None
            return iter([StreamedClip(path, config, self.start, self.end, whole)])
        every = checks.seconds("--every", self.every)
        return read_clips(path, config, self.start, self.end, every)

    def estimate(self, path: Path) -> str:

        folder = read_pipeline_config(self.sampling.model_path or EMBEDDED)
        shape = next(self.clips(path, folder)).taken().frames.shape
        sizes = dict(zip(OWN_SIZE[:3], shape[:3], strict=True))
        cache = checks.video_cache(self.video_cache)
        return self.sampling.estimated(video_cache=cache, **sizes, **self.sampling.job_of())

    def run(self) -> None:
        self.check()
        if self.sampling.estimate:
            for path in self.video:
                print(f"{path}\n{self.estimate(path)}")
            return

        records = []
        settings = {"video_cache": checks.video_cache(self.video_cache)}
        settings |= {"report_drift": self.report_drift}
        with self.sampling.pipeline() as pipe:
            for path in self.video:
                for clip in self.clips(path, pipe.config):
                    result = pipe.caption(clip, **settings, **self.sampling.choices())
                    if result is not None:  # else another rank has it
                        records.append(self.show(path, clip.taken(), result))
        if records and self.output_path is not None:
            self.write(records)

    def write(self, records: list[dict]) -> None:
        from engine.media import write_captions, write_sidecar
        from engine.result import versions

        if self.output_path.suffix != ".json":
            write_captions(self.output_path, records)
        write_sidecar(self.output_path, {"captions": records, "versions": versions()})

    def show(self, path: Path, clip, result) -> dict:
        """Print a caption; return its record for the sidecar."""
        named = [str(path)] if len(self.video) > 1 else []
        named += [f"{clip.start:.2f} s"] if self.every is not None else []
        print(": ".join([*named, result.caption]))
        self.sampling.report(result)
        if result.drift is not None:
            print(", ".join(f"{name} {value:.4f}" for name, value in result.drift.items()))

        record = {k: v for k, v in vars(result).items() if k not in ("frames", "prompt", "fps")}
        source = record["settings"].pop("source")
        file_ends = math.inf if source["duration"] is None else source["duration"]
        if self.every is None and clip.end < file_ends - 1 / clip.fps < math.inf:
            taken = f"{clip.start:.2f} s to {clip.end:.2f} s of {file_ends:.2f} s taken"
            source["done"].append(taken)
        if source["done"] and not self.sampling.quiet:
            print(f"done to {path.name}: {'; '.join(source['done'])}")

        shown_until = clip.end
        if self.every is not None:
            next_clip = clip.start + checks.seconds("--every", self.every)
            shown_until = max(clip.start, min(next_clip, file_ends, self.end or math.inf))
        times = {"start": round(clip.start, 3), "end": round(shown_until, 3)}
        return {"video": str(path), **times, "source": source} | record


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Show where one step of sampling spends its time and memory, or a whole clip its time."""

    mode: Annotated[Literal["t2v", "t2vt", "v2t"], arg(aliases=("--task",))] = "t2v"
    """t2v: prompt to video. t2vt: to video and caption. v2t: video to caption."""
    preset: Annotated[str | None, own("{" + ",".join(PRESETS) + "}", "none")] = None
    """Random weights of this size instead of a model's."""
    num_frames: Size = None
    """Frames of the video, 4k+1 of them; 81 of 480 x 832 with --preset."""
    height: Size = None
    """Height of the video in pixels, a multiple of 16."""
    width: Size = None
    """Width of the video in pixels, a multiple of 16."""
    text_rows: Size = None
    """Tokens of the text stream, its end mark included."""
    guidance_scale: float = 5.0
    """At most 1 turns guidance off."""
    video_cache: Annotated[str, arg(metavar="exact|frozen|INT")] = "exact"
    """In v2t, frozen profiles a step of text rows alone."""
    output_path: Path = Path("profile-out")
    """Folder for trace.json (chrome://tracing or Perfetto), kernels.md and memory.json; with --clip
    for stages.md, stages.json and clip.mp4."""
    clip: bool = False
    """Time whole clips instead: encode, steps, decode and file, for 50 guided steps and for 4."""
    loading: OmitArgPrefixes[Loading] = Loading()

    def check(self) -> None:
        checks.check_folder(self.output_path)
        checks.video_cache(self.video_cache)
        if self.text_rows is not None and self.text_rows < 0:
            raise UsageError(f"usage: --text-rows must be at least 0; got {self.text_rows}.")
        if self.preset is not None:
            ModelConfig.preset(self.preset)
            if self.loading.model_path or self.loading.transformer_path:
                raise UsageError(
                    "profile: one of --preset and --model-path must be given; got both."
                )
        if self.clip and (self.mode == "v2t" or self.preset is not None):
            got = self.mode if self.preset is None else f"--preset {self.preset}"
            raise UsageError(
                f"profile: --clip must be for t2v or t2vt with a whole pipeline; got {got}."
            )

    def run(self) -> None:
        self.check()
        if self.clip:
            from engine.cli import clip

            sizes = {name: getattr(self, name) for name in OWN_SIZE}
            pipe = clip.pipeline(self.loading)
            print(clip.profile(pipe, self.output_path, mode=self.mode, **sizes))
            print(self.output_path)
            return

        from engine.cli import profile
        from engine.graphs import Graphs
        from engine.planning import memory

        path = self.loading.folder()
        folder = read_pipeline_config(path) if self.preset is None else PipelineConfig()
        sizes = {name: getattr(self, name) for name in OWN_SIZE}
        sizes |= {name: getattr(folder, name) for name in OWN_SIZE if sizes[name] is None}
        check_size(sizes["num_frames"], sizes["height"], sizes["width"])
        if self.mode != "t2v":
            checks.check_count("--text-rows", sizes["text_rows"])
        device, dtype = self.loading.place()
        job = memory.Job(
            mode=self.mode,
            **sizes,
            guided=self.guidance_scale > 1,
            steps=profile.STEPS,
            context_rows=folder.context_rows,
            dtype=self.loading.dtype,
            precision=self.loading.precision or "bf16",
            device=device.type,
            video_cache=checks.video_cache(self.video_cache),
        )
        graphs = Graphs() if device.type == "cuda" and not self.loading.eager else None
        case = replace(folder, **sizes).case | {"B": 1 + job.guided}
        model = self.model(path, device, dtype, case)
        found = profile.profile(model, job, self.output_path, self.guidance_scale, graphs)
        print(found.table(rows=15))
        peak = max((count for _, count in found.memory), default=0)
        print(f"peak {memory.readable(peak)}\n{self.output_path}")

    def model(self, path: Path, device, dtype, case: dict[str, int]):
        from engine import fp8
        from engine.model import UniViGU
        from engine.weights import load_model
        from univigu_kernels import bind

        kernels, precision = self.loading.kernels, self.loading.precision
        if self.preset is None:
            source = self.loading.transformer() or path
            return load_model(source, device, dtype, kernels, precision, case).eval()
        cfg = ModelConfig.preset(self.preset)
        ops = bind(kernels, device, dtype, precision or "bf16", {**case, **cfg.case})
        model = UniViGU(cfg, device, dtype, ops).eval()
        return fp8.quantize(model) if precision == "fp8" else model
