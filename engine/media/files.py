"""What everything that reads videos needs: how large a frame may be."""

from engine.errors import UsageError

MAX_SIDE = 8192


def check_side(height: int, width: int) -> None:
    """Errors: UsageError for sides over 8192 pixels."""
    if max(height, width) > MAX_SIDE:
        raise UsageError(
            f"video: width and height must be at most {MAX_SIDE} pixels; got {width}x{height}. "
            "Scale the video down first."
        )
