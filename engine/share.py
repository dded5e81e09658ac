"""Who computes what of a sampling run: on one rank all of it, on several see
`engine.parallel.sampling`."""

from torch import Tensor


class WholeRun:
    """Of a run on one rank: all of it. box: of latents; text: of text rows; part: what the model
    needs to know of them."""

    box, text, part = ..., slice(None), None

    def contexts(self, context_BCE: Tensor) -> Tensor:
        """Those that this rank evaluates, of the prompts and their nulls."""
        return context_BCE

    def join_video(self, velocities: Tensor) -> Tensor:
        """Of the box and the contexts -> of all latents, of prompts and nulls."""
        return velocities

    def join_text(self, h_BTD: Tensor) -> Tensor:
        """Of the slice -> of all text rows, of the prompts."""
        return h_BTD

    def least(self, number: int) -> int:
        """Of all ranks' numbers. Waits for the device."""
        return number

    def any(self, flag: bool) -> bool:
        """Whether it is set on any rank: what stops one stops all. Waits for the device."""
        return self.least(int(not flag)) == 0
