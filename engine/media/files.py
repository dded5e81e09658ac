"""What everything that reads videos needs: how large a frame may be."""

from engine.config import MAX_SIDE
from engine.errors import UsageError


def check_side(height: int, width: int) -> None:
    """Errors: UsageError for sides over 8192 pixels."""
    if max(height, width) > MAX_SIDE:
        raise UsageError(
            f"video: width and height must be at most {MAX_SIDE} pixels; got {width}x{height}. "
            "Scale the video down first."
        )
