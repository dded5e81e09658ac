"""Reads out of a warp-specialised kernel's machine code whether its softmax still runs beside the
product that it should: a compiler that moves it breaks nothing but the speed, and says nothing."""

import re

ONE_LEFT, NONE_LEFT = (rf"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x{n}" for n in (1, 0))


def instructions(code: str) -> tuple[list[str], dict[str, int]]:
    """Reads nvdisasm's text -> (instructions, index of the one that follows each label)."""
    found, labels = [], {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,6}\*/\s+(.*?);", line):
            found.append(instruction[1])
    return found, labels


def schedule(code: str) -> dict[str, int]:
    """beside: exponentials in a group's loop between the wait that leaves one product under way and
    the wait for that, in the group that has fewest; after: those from there to the loop's end,
    where nothing runs beside them, in the group that has most."""
    found, labels = instructions(code)

    def goes_back(text: str, before: int) -> bool:
        jump = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", text)
        return jump is not None and labels[jump[1]] <= before

    def exponentials(first: int, last: int) -> int:
        return sum("MUFU.EX2" in text for text in found[first:last])

    beside, after = [], []
    for first in (i for i, text in enumerate(found) if re.search(ONE_LEFT, text)):
        rest = range(first + 1, len(found))
        last = next(i for i in rest if re.search(NONE_LEFT, found[i]))
        end = next(i for i in rest if i > last and goes_back(found[i], first))
        beside.append(exponentials(first, last))
        after.append(exponentials(last, end))
    return {
        "beside": min(beside, default=0),
        "after": max(after, default=0),
        "setmaxreg": sum("USETMAXREG" in text for text in found),
    }
