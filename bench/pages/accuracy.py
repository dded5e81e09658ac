"""The table of docs/tiny-model.md, in Markdown: how often the model of the package is right in 200
held-out cases, in each mode and for each way to run it. A checker without a model grades them.

    PYTHONPATH=.:kernels python -m bench accuracy
"""

from math import sqrt

from engine.config import EMBEDDED
from engine.toy import evaluate
from engine.toy.scenes import ATTRIBUTES, IN_PROMPT

WAYS = {
    "exact sampler": {},
    '`precision="fp8"`': {"precision": "fp8"},
    '`video_cache="frozen"`': {"video_cache": "frozen"},
    "`legacy` sampler (Euler video)": {"sampler": "legacy", "solver": "euler"},
    "`few_steps=True`": {"few_steps": True},
}
GRADED = {"t2v": len(IN_PROMPT), "v2t": len(ATTRIBUTES), "t2vt": len(ATTRIBUTES)}  # of a case
HEAD = "| way to run | t2v | v2t | unprompted | t2vt |"


def spread(share: float, graded: int) -> str:
    """95% of a share of independent outcomes: other cases would give figures this far apart."""
    return f"±{196 * sqrt(share * (1 - share) / graded):.1f}"


def row(way: str, table: dict) -> str:
    cells = [way]
    for mode, attributes in GRADED.items():
        if mode != "v2t" and table["video_cache"] != "exact":
            cells.append("-")  # only captions have a cache
            continue
        share = table[mode]["all"]
        cells.append(f"{share:.1%} {spread(share, attributes * table['cases'])}")
        if mode == "v2t":
            cells.append(f"{table[mode]['not in any prompt']:.1%}")
    return "| " + " | ".join(cells) + " |"


def markdown(cases: int = 200) -> str:
    """The same numbers on every run of a machine: data, noise and draws come from seeds."""
    lines = [HEAD, "|---|---|---|---|---|"]
    for way, settings in WAYS.items():
        table = evaluate(model_path=EMBEDDED, cases=cases, progress=False, **settings)
        lines.append(row(way, table))
    return "\n".join(lines)
