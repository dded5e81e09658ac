"""The page of `univigu serve`: how it is written, and what it does in a real browser."""

import base64
import importlib.util
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import engine
from engine.media import write_video

PAGE = (Path(engine.__file__).parent / "serve/page/index.html").read_text("utf-8")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="needs a browser: pip install playwright, and Chromium (apt-get install chromium)",
)
MINUTE = 60_000  # milliseconds
ALONE = "area base br col embed hr img input link meta source track wbr".split()
FIELDS = "input", "textarea", "select", "progress"


class Faults(HTMLParser):
    """What the Content-Security-Policy would block, and fields and buttons without a name."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.ids, self.named, self.found = [], [], [], set(), []
        self.unnamed = []  # (where, tag, id): fields and buttons, until they get a name
        self.feed(text)

        for tag in ("script", "style"):
            if self.tags.count(tag) != 1:
                self.found.append(f"{self.tags.count(tag)} of <{tag}>")
        if self.open:
            self.found.append(f"<{self.open[-1]}> is not closed")
        if len(set(self.ids)) < len(self.ids):
            self.found.append("an id is used twice")
        self.found += [f"{where}: {tag} has no name" for where, tag, id in self.unnamed
                       if id not in self.named]  # fmt: skip

    def handle_starttag(self, tag, attributes):
        values, where = dict(attributes), f"line {self.getpos()[0]}"
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        if tag == "label" and "for" in values:
            self.named.add(values["for"])

        for name in values:
            outside = name in ("src", "href", "srcset", "poster", "action")
            if outside or name == "style" or name.startswith("on"):
                self.found.append(f"{where}: {tag} has {name}")
        if tag in ("script", "style") and values:
            self.found.append(f"{where}: {tag} is not plain, so its hash is not what counts")

        if tag == "button" or tag in FIELDS:
            if "aria-label" not in values and not (tag in FIELDS and "label" in self.open):
                self.unnamed.append((where, tag, values.get("id")))
        if tag not in ALONE:
            self.open.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] == "button" and data.strip():
            self.unnamed.pop()
