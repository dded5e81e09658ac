"""Tables in Markdown, and the markers of a page between which they are written."""

import re

from engine.errors import UsageError


def table(head: list[str], lines: list[list[str]]) -> str:
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ruler, *lines])


MARKED = re.compile(r"(<!-- generated: ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str, tables: dict[str, str]) -> str:
    """The page with each table between its markers. Errors: UsageError where markers and tables are
    not the same names, once each."""
    names = [name for _, name, _ in MARKED.findall(page)]
    marks = page.count("<!-- generated:"), page.count("<!-- end -->")
    if sorted(names) != sorted(tables) or marks != (len(names), len(names)):
        raise UsageError(
            f"cost page: markers must be of {', '.join(tables)}, each once and ended; "
            f"got {', '.join(names)}. Mend the page."
        )
    return MARKED.sub(lambda m: f"{m[1]}{tables[m[2]]}\n{m[3]}", page)
