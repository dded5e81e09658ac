"""The commands caption-dataset and generate-dataset. See `engine.cli.commands`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, arg

from engine.cli import checks
from engine.cli.flags import Size, own
from engine.cli.sampling import OWN_SIZE, Sampling, VideoSteps
from engine.config import check_size, read_pipeline_config
from engine.errors import UsageError

Every = Annotated[str | None, own("TIME", "one clip a file")]
DecoderPath = Annotated[Path | None, own("PATH", "the VAE")]


@dataclass(frozen=True, kw_only=True)
class Bulk:
    """What both commands have: an input, workers, and a run that goes on where it was ended."""

    every = None  # only videos are cut into clips

    input: Path
    ray: Annotated[str | None, own("local|auto|HOST:PORT", "this process")] = None
    """Run by Ray: on this machine, or on a cluster whose machines share the output's folder."""
    workers: Annotated[int | None, own("INT", "one for each GPU, else one")] = None
    """With --ray, models that work at a time."""
    sampling: OmitArgPrefixes[Sampling] = Sampling()

    def check_common(self) -> None:
        if self.sampling.sp > 1 or self.sampling.cfg_parallel:
            raise UsageError(
                f"usage: --sp and --cfg-parallel share one sample; got them with {self.name}. "
                "Leave them out, and use --ray for several GPUs."
            )
        self.sampling.check()
        checks.check_count("--batch-size", self.batch_size)
        if self.workers is not None and self.ray is None:
            raise UsageError(
                f"usage: --workers must go with --ray; got {self.workers}. Add --ray local."
            )
        if self.workers is not None:
            checks.check_count("--workers", self.workers)

    @cached_property
    def choices(self) -> dict:
        """What of `Pipeline.generate` and `caption` is the same for all items."""
        own_of_items = ("seed", "progress")
        choices = self.sampling.choices().items()
        return {name: value for name, value in choices if name not in own_of_items}

    def settings(self, items: list) -> dict:
        """What decides the rows."""
        import engine
        from engine.bulk import identity, model_identity
        from engine.weights.load import pipeline_sources

        sampling = self.sampling
        lora = checks.adapters(sampling.lora)
        paths = pipeline_sources(sampling.folder(), sampling.transformer())
        names = ("seed", "dtype", "precision", "kernels", "vae_dtype", "vae_tiling")
        return {
            "command": self.name,
            "engine": engine.__version__,
            "input": f"{len(items)} items {identity(items)[:16]}",
            "model": model_identity(paths),
            "lora": [[model_identity([path]), scale] for path, scale in lora],
            "batch_size": self.batch_size,
            **{name: getattr(sampling, name) for name in names},
            **self.choices,
        }

    def run(self) -> None:
        self.check()
        if self.sampling.estimate:
            print(self.estimate())
            return
        from engine.bulk import Output

        items = self.items()
        output = Output(self.rows_path, self.settings(items), self.columns())
        with output.begun() as counts:
            if counts is None:
                self.do(output, output.missing(items))
                counts = output.join(items)
        print(self.output_path)
        self.report(counts)

    def do(self, output, groups: list[list]) -> None:
        """Work through the groups that are missing, under a progress bar."""
        if not groups:
            return
        from tqdm import tqdm

        from engine import bulk

        total = sum(map(len, groups)) if self.every is None else None
        with tqdm(total=total, unit=" clips", disable=self.sampling.quiet) as bar:
            if self.ray is None:
                with self.work() as work:
                    for done in bulk.do(work, output, (x for group in groups for x in group)):
                        bar.update(done["rows"])
                return
            for done in bulk.on_ray(self.ray, self.workers, self.work, output, groups):
                bar.update(done["rows"])

    def report(self, counts: dict[str, int]) -> None:
        if not self.sampling.quiet:
            print(f"{counts['rows']} rows, {counts['errors']} of them errors")


@dataclass(frozen=True, kw_only=True)
class CaptionDataset(Bulk):
    """Caption the videos of a folder or a list; a run that was killed goes on where it was."""

    name = "caption-dataset"

    input: Path
    """A folder of videos; or .jsonl or .parquet with a video, and if wanted start and end."""
    output_path: Path
    """.jsonl or .parquet, with a row for each clip. Settings and counts go beside it as .json."""
    batch_size: int = 8
    """Clips of one shape that run together."""
    decoders: int = 4
    """Files that are decoded while the model works; 0: decode in turn."""
    every: Every = None
    """Caption a clip every 5s, 2m or 1h of each file."""
    fps: Size = None
    """Frames of a clip per second."""
    num_frames: Size = None
    """Frames of a clip, 4k+1 of them, or fewer of a file that ends before."""
    height: Size = None
    """Videos are scaled to cover height x width and cropped around the centre."""
    width: Size = None
    """As height a multiple of 16."""
    video_cache: Annotated[str, arg(metavar="exact|frozen|INT")] = "exact"
    """See univigu caption --help."""

    @property
    def rows_path(self) -> Path:
        return self.output_path

    def check(self) -> None:
        self.check_common()
        if self.output_path.suffix not in (".jsonl", ".parquet"):
            name = self.output_path.name
            raise UsageError(
                f"output: --output-path must end in .jsonl or .parquet; got {name!r}. Rename it."
            )
        checks.check_file(self.output_path)
        checks.video_cache(self.video_cache)
        if self.decoders < 0:
            raise UsageError(f"usage: --decoders must be at least 0; got {self.decoders}.")
        if self.every is not None:
            checks.seconds("--every", self.every)
        if self.fps is not None and not 1 <= self.fps <= 240:
            raise UsageError(f"usage: --fps must be between 1 and 240; got {self.fps}.")
        sizes = (self.num_frames, 1), (self.height, 16), (self.width, 16)
        check_size(*(least if size is None else size for size, least in sizes))

    def items(self) -> list:
        from engine.bulk import read_videos

        return read_videos(self.input)

    def columns(self) -> dict[str, str]:
        from engine.bulk import Captions

        return Captions.COLUMNS

    def asked(self) -> dict:
        names = ("fps", "num_frames", "height", "width")
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def settings(self, items: list) -> dict:
        every = None if self.every is None else checks.seconds("--every", self.every)
        clips = {"every": every, "video_cache": checks.video_cache(self.video_cache)}
        return super().settings(items) | clips | self.asked()

    @contextmanager
    def work(self) -> Iterator:
        from engine.bulk import Captions

        every = None if self.every is None else checks.seconds("--every", self.every)
        choices = self.choices | {"video_cache": checks.video_cache(self.video_cache)}
        with self.sampling.pipeline() as pipe:
            config = replace(pipe.config, **self.asked())
            how = self.batch_size, every, self.sampling.seed, choices, self.decoders
            yield Captions(pipe, config, *how)

    def estimate(self) -> str:
        folder = asdict(read_pipeline_config(self.sampling.folder())) | self.asked()
        sizes = {name: folder[name] for name in OWN_SIZE[:3]} | {"batch": self.batch_size}
        cache = checks.video_cache(self.video_cache)
        return self.sampling.estimated(video_cache=cache, **sizes, **self.sampling.job_of())


@dataclass(frozen=True, kw_only=True)
class GenerateDataset(Bulk):
    """Make a video of each prompt of a list; a run that was killed goes on where it was."""

    name = "generate-dataset"

    input: Path
    """.txt with a prompt a line; or .jsonl or .parquet with a prompt."""
    output_path: Path
    """A folder: clips/ID.mp4 and its .json for each prompt, and manifest.jsonl with a row for
    each."""
    batch_size: int = 1
    """Prompts that run together."""
    mode: Literal["t2v", "t2vt"] = "t2v"
    """t2v: video. t2vt: video and caption."""
    num_frames: Size = None
    """Frames of a video, 4k+1 of them."""
    height: Size = None
    """Height of a video in pixels, a multiple of 16."""
    width: Size = None
    """Width of a video in pixels, a multiple of 16."""
    negative_prompt: str = ""
    """What the videos should not show."""
    video: OmitArgPrefixes[VideoSteps] = VideoSteps()
    decoder_path: DecoderPath = None
    """A tiny decoder, taew2_1 as .safetensors or .pth: coarser than the VAE, and far cheaper."""

    @property
    def rows_path(self) -> Path:
        return self.output_path / "manifest.jsonl"

    def check(self) -> None:
        self.check_common()
        checks.check_video_steps(self.steps())
        checks.check_decoder(self.decoder_path)
        checks.check_folder(self.output_path)
        sizes = (self.num_frames, 1), (self.height, 16), (self.width, 16)
        frames, height, width = (least if size is None else size for size, least in sizes)
        check_size(frames, height, width)

    def steps(self) -> dict:
        """What `schedule.settle` takes."""
        return self.video.settings(self.mode, self.sampling)

    def asked(self) -> dict:
        """What `Pipeline.generate` takes of this command's own flags."""
        own = {name: getattr(self, name) for name in (*OWN_SIZE[:3], "negative_prompt")}
        return own | self.steps()

    def items(self) -> list:
        from engine.bulk import read_prompts

        return read_prompts(self.input)

    def columns(self) -> dict[str, str]:
        from engine.bulk import Generations

        return Generations.COLUMNS

    def settings(self, items: list) -> dict:
        from engine.bulk import model_identity

        decoder = self.decoder_path and model_identity([self.decoder_path])
        return super().settings(items) | self.asked() | {"decoder": decoder}

    def run(self) -> None:
        self.check()
        if not self.sampling.estimate:
            (self.output_path / "clips").mkdir(parents=True, exist_ok=True)
        super().run()

    @contextmanager
    def work(self) -> Iterator:
        from engine.bulk import Generations

        folder = (self.output_path / "clips").absolute()
        with self.sampling.pipeline(self.decoder_path) as pipe:
            choices = self.choices | self.asked()
            yield Generations(pipe, folder, self.batch_size, self.sampling.seed, choices)

    def estimate(self) -> str:
        sizes = {name: getattr(self, name) for name in OWN_SIZE[:3]} | {"batch": self.batch_size}
        return self.sampling.estimated(**sizes, **self.sampling.job_of(self.steps()))
