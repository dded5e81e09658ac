"""The command that makes training data, preprocess. See `engine.cli.commands`."""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

from engine.cli import checks
from engine.cli.flags import own
from engine.config import check_size, read_pipeline_config
from engine.errors import ModelFileError, UsageError


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Encode training clips and captions, yours or the synthetic set's, into a latent shard."""

    model_path: Path
    """A folder with vae, text_encoder and tokenizer, and pipeline.json where it is ours."""
    output_path: Path
    """The .safetensors shard."""
    manifest: Annotated[Path | None, own("PATH", "none")] = None
    """JSON lines {"video": path from here, "prompt": "...", "caption": "...", "start": seconds}."""
    synthetic: Annotated[int | None, own("INT", "none")] = None
    """How many clips of the synthetic set to render and encode."""
    seed: int = 0
    """Seed of the synthetic scenes."""
    num_frames: Annotated[int | None, own("INT", "the folder's")] = None
    """Frames of each clip of the manifest, 4k+1 of them."""
    height: Annotated[int | None, own("INT", "the folder's")] = None
    """Videos are scaled to cover height x width and cropped around the centre."""
    width: Annotated[int | None, own("INT", "the folder's")] = None
    """As height a multiple of 16."""
    fps: Annotated[int | None, own("INT", "the folder's")] = None
    """Frames taken per second; no video may have fewer."""
    text_rows: Annotated[int | None, own("INT", "the folder's")] = None
    """Rows of prompts and captions, the end mark included."""
    max_bad: float = 0.01
    """Share of bad lines that are skipped; one is in any case, unless this is 0."""
    quiet: bool = False
    """No progress bar."""

    def run(self) -> None:
        size = {name: getattr(self, name) for name in ("num_frames", "height", "width", "fps")}
        size = {name: value for name, value in size.items() if value is not None}
        self.check(size)
        from engine.media.parts import find_folder

        rows = {} if self.text_rows is None else {"text_rows": self.text_rows}
        folder = find_folder(self.model_path)
        config = replace(read_pipeline_config(folder), **size, **rows)
        check_size(config.num_frames, config.height, config.width)
        from tqdm import tqdm

        from engine.data import data_fingerprint
        from engine.pipeline import Pipeline
        from engine.toy import preprocess_scenes

        parts = Pipeline.without_model(folder)
        checks.check_count("--text-rows", config.text_rows)
        made_with = data_fingerprint(folder)

        def progress(batches):
            unit = "clips" if self.synthetic is None else "clips, 32 at a time"
            return tqdm(batches, desc=unit, disable=self.quiet)

        if self.synthetic is None:
            from engine.data import preprocess_manifest

            report = partial(print, file=sys.stderr)
            target = parts, made_with, self.manifest, self.output_path, config
            preprocess_manifest(*target, self.max_bad, progress, report)
        else:
            target = parts, made_with, self.output_path, self.synthetic, self.seed
            preprocess_scenes(*target, config.text_rows, progress)
        print(self.output_path)

    def check(self, size: dict[str, int]) -> None:
        if (self.manifest is None) == (self.synthetic is None):
            got = "neither" if self.manifest is None else "both"
            raise UsageError(
                f"preprocess: one of --manifest and --synthetic must be given; got {got}."
            )

        checks.check_seed(self.seed)
        if self.synthetic is not None:
            checks.check_count("--synthetic", self.synthetic)
        elif not self.manifest.is_file():
            raise ModelFileError(f"preprocess: --manifest must be a file; got {self.manifest}.")
        elif self.seed:
            raise UsageError("preprocess: --seed must go with --synthetic; got --manifest.")
        if self.synthetic is not None and size:
            given = ", ".join(f"--{name.replace('_', '-')}" for name in size)
            raise UsageError(f"preprocess: {given} must go with --manifest; got --synthetic.")

        if not 0 <= self.max_bad <= 1:
            raise UsageError(f"preprocess: --max-bad must be from 0 to 1; got {self.max_bad}.")
        if not 1 <= size.get("fps", 1) <= 240:
            raise UsageError(f"preprocess: --fps must be from 1 to 240; got {self.fps}.")

        if self.output_path.suffix != ".safetensors" or self.output_path.is_dir():
            name = self.output_path.name
            raise UsageError(f"preprocess: --output-path must end in .safetensors; got {name!r}.")
        checks.check_folder(self.output_path.parent)
