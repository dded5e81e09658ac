"""The command warm. See `engine.cli.commands`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, arg

from engine.cli import checks
from engine.cli.flags import Guidance, Size
from engine.cli.sampling import Loading
from engine.config import read_pipeline_config


@dataclass(frozen=True, kw_only=True)
class Warm:
    """Compile ahead the kernels that a model's runs need on this GPU; they stay on disk."""

    mode: Annotated[Literal["t2v", "t2vt", "v2t"], arg(aliases=("--task",))] = "t2v"
    """t2v: prompt to video. t2vt: to video and caption. v2t: video to caption."""
    batch: int = 1
    """Prompts or videos at a time."""
    num_frames: Size = None
    """Frames of the video, 4k+1 of them."""
    height: Size = None
    """Height of the video in pixels, a multiple of 16."""
    width: Size = None
    """Width of the video in pixels, a multiple of 16."""
    text_rows: Size = None
    """Tokens of the text stream, its end mark included."""
    guidance_scale: Guidance = None
    """At most 1 turns guidance off."""
    video_cache: Annotated[str, arg(metavar="exact|frozen|INT")] = "exact"
    """In v2t, how often the video's rows are computed: see univigu caption --help."""
    quiet: bool = False
    """No progress bar."""
    loading: OmitArgPrefixes[Loading] = Loading()

    def run(self) -> None:
        checks.check_count("--batch", self.batch)
        cache = checks.video_cache(self.video_cache)
        device, _ = self.loading.place()
        if device.type != "cuda":
            print(f"nothing to compile on {device}")
            return
        from engine import schedule
        from engine.graphs import Ahead, warm_up
        from engine.weights.index import sampled_as

        folder = read_pipeline_config(self.loading.folder())
        names = "mode batch num_frames height width text_rows guidance_scale".split()
        settings = {name: getattr(self, name) for name in names} | {"video_cache": cache}
        ahead = Ahead(self.loading.shape_of_model(folder.case), device)
        records = schedule.said_by(sampled_as(folder, self.loading.transformer()))
        count = warm_up(ahead, folder, **settings, records=records, progress=not self.quiet)
        print(f"{count} kernels compiled" if count else "nothing to compile: every kernel is there")
