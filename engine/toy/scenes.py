"""The synthetic set: one coloured shape that moves over a plain background, with a prompt and a
detailed caption.

The prompt names colour, shape and motion. The caption also names where the shape starts and the
background, which no prompt ever tells. One of the 120 (colour, shape, motion) triples in six is
held out: training never sees it, neither as a video nor as words. Everything is a function of the
seed.
"""

from dataclasses import dataclass

import numpy as np

FRAMES, SIZE, FPS = 9, 64, 8
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (40, 80, 230),
    "yellow": (240, 220, 40),
    "purple": (160, 50, 200),
    "cyan": (40, 210, 220),
}
SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS = {
    "moves left": (-1, 0),
    "moves right": (1, 0),
    "moves up": (0, -1),
    "moves down": (0, 1),
    "stays still": (0, 0),
}
# Corners are one patch of the model apart (16 pixels): what one corner teaches serves all four.
STARTS = {
    "top left": (24, 24),
    "top right": (40, 24),
    "center": (32, 32),
    "bottom left": (24, 40),
    "bottom right": (40, 40),
}
BACKGROUNDS = {
    "black": (15, 15, 15),
    "gray": (125, 125, 125),
    "white": (240, 240, 240),
    "brown": (110, 70, 35),
}
TRAVEL = 8.0  # pixels from the first to the last frame
PROMPTS = ("a {colour} {shape} {motion}", "a video of a {colour} {shape} that {motion}")
CAPTION = "a {colour} {shape} starts at the {start} and {motion} on a {background} background"
IN_PROMPT, ONLY_IN_CAPTION = ("colour", "shape", "motion"), ("start", "background")
ATTRIBUTES = IN_PROMPT + ONLY_IN_CAPTION


@dataclass(frozen=True)
class Scene:
    colour: str
    shape: str
    motion: str
    start: str
    background: str
    jitter: tuple[float, float] = (0.0, 0.0)  # pixels added to the start
    scale: float = 1.0
    template: int = 0

    @property
    def prompt(self) -> str:
        return PROMPTS[self.template].format(**vars(self))

    @property
    def caption(self) -> str:
        return CAPTION.format(**vars(self))

    @property
    def held_out(self) -> bool:
        colour, shape = list(COLOURS).index(self.colour), SHAPES.index(self.shape)
        return (colour + 2 * shape + list(MOTIONS).index(self.motion)) % 6 == 0


def words() -> list[str]:
    """Every word of every prompt and caption, sorted."""
    texts = [*PROMPTS, CAPTION, *COLOURS, *SHAPES, *MOTIONS, *STARTS, *BACKGROUNDS]
    return sorted({w for text in texts for w in text.split() if "{" not in w})


def draw_scenes(count: int, seed: int, held_out: bool, jitter: bool = False) -> list[Scene]:
    """`count` scenes, uniform over the attributes within the training triples or the held-out ones.

    jitter: the start moves by up to 2 pixels and the size by up to 10%. The VAE is trained with it;
    the model without, for its budget of an hour is too small to learn both.
    """
    rng = np.random.default_rng(seed)
    scenes: list[Scene] = []
    tables = [list(COLOURS), list(SHAPES), list(MOTIONS), list(STARTS), list(BACKGROUNDS)]
    while len(scenes) < count:
        names = [table[rng.integers(len(table))] for table in tables]
        (dx, dy), scale = rng.uniform(-2, 2, 2), rng.uniform(0.9, 1.1)
        varied = ((dx, dy), scale) if jitter else ((0.0, 0.0), 1.0)
        scene = Scene(*names, *varied, int(rng.integers(len(PROMPTS))))
        if scene.held_out == held_out:
            scenes.append(scene)
    return scenes


def signed_distance(shape: str, x, y):
    """Pixels from the outline of `shape` centred on its centroid (negative inside); x, y
    broadcastable offsets."""
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.sqrt(x * x + y * y) - 10.5
    if shape == "square":
        return np.maximum(ax, ay) - 9.3
    if shape == "triangle":
        return np.maximum(y - 7.0, ax * 0.8660254 - y * 0.5 - 7.0)
    if shape == "cross":
        return np.minimum(np.maximum(ax - 11, ay - 3.6), np.maximum(ax - 3.6, ay - 11))
    raise ValueError(f"scene: shape must be one of {SHAPES}; got {shape!r}.")


def render(scenes: list[Scene]) -> np.ndarray:
    """The clips, uint8 [N, FRAMES, SIZE, SIZE, 3], antialiased over one pixel."""
    grid = np.arange(SIZE) + 0.5
    time = np.linspace(0, TRAVEL, FRAMES)
    out = np.empty((len(scenes), FRAMES, SIZE, SIZE, 3), np.uint8)
    for clip, s in zip(out, scenes, strict=True):
        (x0, y0), (vx, vy) = STARTS[s.start], MOTIONS[s.motion]
        x = (grid[None, None, :] - (x0 + s.jitter[0] + vx * time)[:, None, None]) / s.scale
        y = (grid[None, :, None] - (y0 + s.jitter[1] + vy * time)[:, None, None]) / s.scale
        alpha = np.clip(0.5 - signed_distance(s.shape, x, y) * s.scale, 0, 1)[..., None]
        clip[:] = np.rint(
            alpha * COLOURS[s.colour] + (1 - alpha) * np.array(BACKGROUNDS[s.background])
        )
    return out
