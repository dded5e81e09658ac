"""Who computes what of a sampling run: on one rank all of it, on several see
`engine.parallel.sampling`."""

from torch import Tensor


class WholeRun:
    """The trivial share: one rank computes the whole run.

    box: its part of the latents.
    text: its part of the text rows.
    part: what the model needs to know of both; None: nothing.
    """

    box, text, part = ..., slice(None), None

    def contexts(self, context_BCE: Tensor) -> Tensor:
        """The contexts that this rank evaluates, of the prompts and their nulls."""
        return context_BCE

    def join_video(self, velocities: Tensor) -> Tensor:
        """Joins the ranks' velocities, each of a box and of some contexts, to all of them."""
        return velocities

    def join_text(self, h_BTD: Tensor) -> Tensor:
        """Joins the ranks' slices of the prompts' text rows to all of them."""
        return h_BTD

    def least(self, number: int) -> int:
        """The least of all ranks' numbers. Waits for the device."""
        return number

    def any(self, flag: bool) -> bool:
        """Whether it is set on any rank: what stops one stops all. Waits for the device."""
        return self.least(int(not flag)) == 0
