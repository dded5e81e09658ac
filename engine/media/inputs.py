"""What a caller gives, checked before anything runs: prompts and their embeddings, seeds and
generators, frames.

Legend: B prompts, C context rows, E width of the text encoder, N frames, H,W pixels.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.config import CLIPS, SEED, PipelineConfig, check_size, checked
from engine.errors import UsageError
from engine.media.clip import Excerpt, StreamedClip
from engine.media.parts import Parts
from engine.media.tiles import split_frames
from engine.media.video import check_output


@dataclass(frozen=True, eq=False)
class Prompts:
    """The prompts of a call, each with its negative. Errors: UsageError.

    prompt: a string, B of them, or None where `embeds` alone are given.
    negative: a string for all, or B of them; None is "".
    embeds, negative_embeds: what `Pipeline.encode_prompts` returns, [B,C,E], in place of encoding.
    copies: clips of each prompt.
    output_path: of a clip, or of each; None: they stay in memory.
    """

    prompt: str | list[str] | None
    negative: str | list[str] | None
    embeds: Tensor | None
    negative_embeds: Tensor | None
    copies: int
    output_path: str | Path | Sequence[str | Path] | None = None

    def __post_init__(self):
        if self.prompt is None and self.embeds is None:
            raise UsageError(
                "generate: prompt or prompt_embeds must be given; got neither. Say what the video "
                "shows."
            )

        checked("generate: num_videos_per_prompt", self.copies, int, CLIPS, None)

        given = {"prompt_embeds": self.embeds, "negative_prompt_embeds": self.negative_embeds}
        if not isinstance(self.negative, str | None):
            given["negative_prompt"] = self.negative
        for name, value in given.items():
            if value is not None and len(value) != self.count:
                raise UsageError(
                    f"generate: {name} must be of {self.count} prompts; got {len(value)}. "
                    "Give one for each."
                )

        if self.paths is not None:
            if not len(set(self.paths)) == len(self.paths) == len(self.texts):
                raise UsageError(
                    f"generate: output_path must name {len(self.texts)} files, one for each clip; "
                    f"got {', '.join(map(str, self.paths)) or 'none'}."
                )
            for path in self.paths:
                check_output(path)

    @property
    def count(self) -> int:
        """B."""
        if self.prompt is None:
            return len(self.embeds)
        return 1 if isinstance(self.prompt, str) else len(self.prompt)

    @property
    def single(self) -> bool:
        """Whether the call is for one clip, rather than a list of them."""
        return isinstance(self.prompt, str) and self.copies == 1

    @property
    def paths(self) -> list[Path] | None:
        """The file of each clip."""
        if self.output_path is None:
            return None
        one = isinstance(self.output_path, str | Path)
        return [Path(path) for path in ([self.output_path] if one else self.output_path)]

    @property
    def texts(self) -> list[str | None]:
        """The prompt of each clip."""
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        prompts = [None] * self.count if prompts is None else prompts
        return [prompt for prompt in prompts for _ in range(self.copies)]

    def contexts(
        self, parts: Parts, guided: bool, check: Callable[[], None]
    ) -> tuple[Tensor, Tensor | None]:
        """Context and null context of each clip, [B * copies, C, E], the second where the run is
        guided. check: as of `TextEncoder.encode`."""
        context = self._checked("prompt_embeds", self.embeds, parts)
        if context is None:
            texts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
            context = parts.encode(texts, check=check)
        context = context.to(parts.device).repeat_interleave(self.copies, 0)
        if not guided:
            return context, None

        null = self._checked("negative_prompt_embeds", self.negative_embeds, parts)
        if null is None:
            one = isinstance(self.negative, str | None)
            texts = [self.negative or ""] * self.count if one else self.negative
            null = parts.encode(texts, allow_empty=True, check=check)
        return context, null.to(context).repeat_interleave(self.copies, 0)

    def rows(self, parts: Parts, count: int) -> tuple[Tensor, list[int]]:
        """Text rows that hold the prompt of each clip, ids [B * copies, count], and their
        lengths."""
        if self.prompt is None:
            raise UsageError(
                "generate: prompt must be given beside prompt_embeds, for the text rows of t2v; "
                "got None. Give it too, or text_rows=0."
            )
        encoded = [parts.text.encode_rows(prompt, count) for prompt in self.texts]
        ids = torch.stack([ids for ids, _ in encoded]).to(parts.device)
        return ids, [length for _, length in encoded]

    def _checked(self, name: str, embeds: Tensor | None, parts: Parts) -> Tensor | None:
        if embeds is None:
            return None
        shape = self.count, *parts.context_shape
        if tuple(embeds.shape) != shape or not embeds.is_floating_point():
            raise UsageError(
                f"generate: {name} must be floats {list(shape)}; got {embeds.dtype} "
                f"{list(embeds.shape)}. Take them from pipe.encode_prompts."
            )
        return finite(name, embeds)


def seeds_of(
    seed: int | list[int], generator: torch.Generator | list[torch.Generator] | None, count: int
) -> tuple[list[int], list[torch.Generator] | None]:
    """A seed for each of `count` samples and, where given, the generator of its noise. Errors:
    UsageError.

    seed: one per sample, or one from which sample i takes seed + i.
    generator: one per sample, whose initial seeds are the seeds; or one, from which the samples
        draw in turn, and sample i has its initial seed + i.
    """
    if generator is None:
        one = isinstance(seed, Integral) and not isinstance(seed, bool)
        seeds = [int(seed) + i for i in range(count)] if one else list(np.atleast_1d(seed))
        whole = all(isinstance(n, Integral) and not isinstance(n, bool) for n in seeds)
        if len(seeds) != count or not whole:
            raise UsageError(
                f"sample: seed must be one whole number or {count} of them; got {seed!r:.80}."
            )
        return [checked("sample: seed", n, int, SEED, None) for n in seeds], None

    if seed != 0:
        raise UsageError(
            f"sample: seed must be left out with generator; got {seed}. Seed the generator with it."
        )
    one = isinstance(generator, torch.Generator)
    generators = [generator] * count if one else list(generator)
    if len(generators) != count:
        raise UsageError(
            f"sample: generator must be one or {count}; got {len(generators)}. Give one per clip."
        )
    initial = [g.initial_seed() + i * one for i, g in enumerate(generators)]
    return [n % 2**63 for n in initial], generators  # an unseeded one has 64 bits


def noise_source(generator, latents) -> str:
    """What the noise of a run comes from: "seed", "generator" or "latents"."""
    if latents is not None:
        return "latents"
    return "seed" if generator is None else "generator"


def checked_noise(latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The latents that a caller gives. Errors: UsageError for another shape."""
    if tuple(latents.shape) != shape or not latents.is_floating_point():
        raise UsageError(
            f"generate: latents must be floats {list(shape)}, for this size and so many clips; "
            f"got {latents.dtype} {list(latents.shape)}. Change them, or the size."
        )
    return finite("latents", latents)


def finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor. Errors: UsageError where it has NaN or infinity."""
    if not tensor.isfinite().all():
        raise UsageError(f"generate: {name} must be finite; got NaN or infinity in it.")
    return tensor


@dataclass(frozen=True)
class Clips:
    """The videos of a call of `caption`.

    shape: B, N, H, W; a file may hold fewer frames than N.
    single: whether they are of one video, not of a list.
    chunks: uint8 [B,3,n,H,W] in turn, the first frame alone and then four at a time. A file is
        decoded meanwhile; closing the generator closes it.
    taken: gives, once all chunks were taken, the frames uint8 [B,N,H,W,3], and as
        settings["source"] what was done to their file, if they are of one.
    """

    shape: tuple[int, int, int, int]
    single: bool
    chunks: Generator[Tensor, None, None]
    taken: Callable[[], tuple[np.ndarray, dict]]


def clips_of(video, config: PipelineConfig) -> Clips:
    """What is to be captioned.

    video: a path, of which the first clip of the configuration's frames, rate and size is taken;
        an `engine.media.clip.StreamedClip` or `Excerpt`; or frames with or without B.

    Errors: UsageError.
    """
    if isinstance(video, str | Path):
        video = StreamedClip(video, config)
    if isinstance(video, StreamedClip):
        return _streamed(video)
    source = {"source": video.source} if isinstance(video, Excerpt) else {}
    frames = video.frames.numpy() if isinstance(video, Excerpt) else video
    frames = np.ascontiguousarray(frames)  # torch takes no view that runs backwards
    if frames.dtype != np.uint8 or frames.ndim not in (4, 5) or frames.shape[-1] != 3:
        got = f"{frames.dtype} {list(frames.shape)}"
        raise UsageError(
            f"caption: video must be a path or uint8 [N,H,W,3] or [B,N,H,W,3]; got {got}."
        )

    single = frames.ndim == 4
    frames = frames[None] if single else frames
    check_size(*frames.shape[1:4])
    pieces = split_frames(torch.from_numpy(frames).permute(0, 4, 1, 2, 3))
    chunks = (piece for piece in pieces)
    return Clips(frames.shape[:4], single, chunks, lambda: (frames, source))


def _streamed(clip: StreamedClip) -> Clips:
    config = clip.config
    shape = 1, config.num_frames, config.height, config.width

    def chunks() -> Generator[Tensor, None, None]:
        with closing(clip.chunks()) as decoded:
            for frames in decoded:
                yield frames.permute(3, 0, 1, 2)[None]

    def taken() -> tuple[np.ndarray, dict]:
        excerpt = clip.taken()
        return excerpt.frames.numpy()[None], {"source": excerpt.source}

    return Clips(shape, True, chunks(), taken)
