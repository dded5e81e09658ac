"""Command lines of the tests of the command line, to be filled with its `places`."""

from pathlib import Path

PROMPT = "a red circle moves left"
GENERATE = f"generate --prompt '{PROMPT}' --num-inference-steps 2 --model-path {{folder}} "
TRAIN = "train --data {shard} --batch-size 1 --steps 2 --output-path run "


def written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
