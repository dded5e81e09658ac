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
MINUTES = 180_000  # milliseconds for what a shared CPU computes


class Tags(HTMLParser):
    """The tags of a page, each with its attributes and the names of those around it."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes), tuple(self.open)))
        if tag not in ("meta", "input", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open.pop() != tag:
            raise ValueError(f"line {self.getpos()[0]}: </{tag}> closes another tag.")


def blocked(text: str) -> list[str]:
    """What the server's Content-Security-Policy blocks, or what leaves the server."""
    tags = Tags(text).tags
    found = [f"{name} loads" for name in re.findall(r"https?:|url\(|@import|['\"]//", text)]
    for tag in ("script", "style"):
        if [values for name, values, _ in tags if name == tag] != [{}]:
            found.append(f"not one plain <{tag}>")

    for tag, values, _ in tags:
        for name in values:
            if name.startswith("on") or name in ("style", "src", "href", "action", "poster"):
                found.append(f"{tag} has {name}")
    return found


def unnamed(text: str) -> list[dict]:
    """Attributes of the fields and bars that a screen reader has no name for."""
    tags = Tags(text).tags
    labels = {values.get("for") for tag, values, _ in tags if tag == "label"}
    return [
        values
        for tag, values, around in tags
        if tag in ("input", "textarea", "select", "progress")
        and not ("label" in around or "aria-label" in values or values.get("id", "") in labels)
    ]


def test_nothing_is_blocked_or_fetched_from_elsewhere():
    assert blocked(PAGE) == []


@pytest.mark.parametrize(
    "change",
    [
        ("</main>", "</main><script>1</script>"),
        ("<script>", '<script type="module">'),
        ("<style>", "<style>@import 'a.css';"),
        ("<h1>", '<h1 style="color: red">'),
        ("<h1>", '<h1 onclick="go()">'),
        ("<h1>", '<h1><img src="a.png">'),
        ("</style>", "h1 { background: url(a.png) } </style>"),
        ('"v1/models"', '"https://example.org/v1/models"'),
    ],
    ids=lambda change: change[1],
)
def test_what_would_be_blocked_is_found(change):
    assert change[0] in PAGE and len(blocked(PAGE.replace(*change, 1))) > 0


def test_every_field_has_a_name():
    assert unnamed(PAGE) == []
    assert unnamed(
        PAGE.replace("<label>Seed", "<p>Seed").replace('"random"></label>', '"random"></p>')
    )
    assert unnamed(PAGE.replace('for="bar"', 'for="bars"'))


def test_the_script_asks_for_what_is_there():
    ids = [values["id"] for _, values, _ in Tags(PAGE).tags if "id" in values]
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r'\$\("([^"]+)"\)', PAGE)) <= set(ids)

    acts = PAGE[PAGE.index("const acts") : PAGE.index('document.addEventListener("click"')]
    written = set(re.findall(r"^  (?:async )?(\w+)\(id", acts, re.M))
    assert {values.get("data-act") for _, values, _ in Tags(PAGE).tags} - {None} == written


def luminance(colour: str) -> float:
    """As WCAG 2 defines it, of "#rrggbb"."""
    parts = np.array([int(colour[n : n + 2], 16) for n in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast_is_enough_for_wcag_aa(theme):
    """4.5 for text, 3 for the edges of fields."""
    blocks = re.findall(r":root \{(.*?)\}", PAGE, re.S)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6});", blocks[theme]))
    light = {name: luminance(colour) + 0.05 for name, colour in colours.items()}

    def ratio(one: str, other: str) -> float:
        return max(light[one], light[other]) / min(light[one], light[other])

    for ground in ("paper", "sheet", "well"):
        for text in ("ink", "soft", "bad", "accent"):
            assert ratio(text, ground) >= 4.5, (text, ground)
        assert ratio("edge", ground) >= 3, ground
    assert ratio("on-accent", "accent") >= 4.5


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        program = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield program
        program.close()


@pytest.fixture
def tab(chromium, server):
    """The page in a browser, whose script must not fail and must have what it asks for."""
    tab = chromium.new_page()
    faults = []
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("console", lambda line: faults.append(line.text) if "Security" in line.text else None)
    tab.goto(server.url)
    expect(tab, "#model").not_to_be_empty()
    yield tab
    tab.close()
    assert faults == []


def expect(tab, selector: str):
    """Conditions of an element, which are waited for. Playwright's wait_for_function would need
    eval, which the page's policy forbids."""
    from playwright import sync_api

    return sync_api.expect(tab.locator(selector))


def create(tab, prompt: str, **fields):
    for name, value in {"prompt": prompt, **fields}.items():
        tab.locator(f"#make [name={name}]").fill(str(value))
    tab.get_by_role("button", name="Create").click()


@browser
def test_a_video_is_made_played_captioned_and_deleted(tab):
    tab.get_by_label("a video and its caption").check()
    create(tab, "a red circle moves left", num_inference_steps=4, seed=7)
    expect(tab, "#bar").to_be_visible()
    expect(tab, "#says").to_have_text("The video is ready.", timeout=MINUTES)

    expect(tab, "#player").to_have_js_property("paused", False)
    expect(tab, "#player").not_to_have_js_property("currentTime", 0)
    width, height = tab.locator("[name=size]").input_value().split("x")
    expect(tab, "#player").to_have_js_property("videoWidth", int(width))
    expect(tab, "#player").to_have_js_property("videoHeight", int(height))
    expect(tab, "#stage [data-text=caption]").not_to_be_empty()
    expect(tab, "#stage [data-text=facts]").to_contain_text("seed\u00a07")

    card = "#cards li >> nth=0 >> "
    expect(tab, card + "img").to_have_js_property("complete", True)
    expect(tab, card + "img").not_to_have_js_property("naturalWidth", 0)
    tab.locator(card + "text=Caption this").click()
    expect(tab, "#says").to_contain_text("Caption: ", timeout=MINUTES)
    expect(tab, "#stage [data-text=read]").not_to_be_empty()

    tab.locator("[name=seed]").fill("")
    tab.locator(card + "text=Reuse").click()
    expect(tab, "[name=seed]").to_have_value("7")
    expect(tab, "[name=prompt]").to_be_focused()

    before = tab.locator("#cards li").count()
    tab.locator(card + "text=Delete").click()
    tab.locator(card + "text=Really delete?").click()
    expect(tab, "#says").to_have_text("Deleted.")
    expect(tab, "#cards li").to_have_count(before - 1)
    expect(tab, "#stage").to_be_hidden()


@browser
def test_progress_is_watched_and_the_job_cancelled(tab):
    """Also by a page that is opened while the job runs."""
    create(tab, "a blue square grows", num_inference_steps=100, seconds=20)
    expect(tab, "#bar").not_to_have_js_property("value", 0, timeout=MINUTES)
    tab.reload()
    expect(tab, "#bar").not_to_have_js_property("value", 0)
    expect(tab, "#stage [data-text=state]").to_contain_text("Being made")

    tab.locator("#stage >> text=Cancel").click()
    expect(tab, "#says").to_have_text("Cancelled")
    expect(tab, "#stage .error").to_have_text("Cancelled")
    expect(tab, "#stage progress").to_be_hidden()


@browser
def test_a_dropped_file_gets_a_caption(tab, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    write_video(tmp_path / "clip.mp4", np.stack([np.roll(picture, n, 1) for n in range(17)]), 8)
    data = base64.b64encode((tmp_path / "clip.mp4").read_bytes()).decode()

    dropped = tab.evaluate_handle(
        """(data) => {
          const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
          const all = new DataTransfer();
          all.items.add(new File([bytes], "clip.mp4", { type: "video/mp4" }));
          return all;
        }""",
        data,
    )
    tab.locator("#drop").dispatch_event("drop", {"dataTransfer": dropped})
    expect(tab, "#filename").to_have_text("clip.mp4")
    expect(tab, "#answer").not_to_be_empty(timeout=MINUTES)
    expect(tab, "#preview").to_have_js_property("videoWidth", 64)


@browser
def test_a_refusal_is_said_at_its_field(tab):
    size = tab.locator("[name=size]").input_value()
    create(tab, "a green triangle", size="33x33")
    expect(tab, "#says").to_contain_text("33")
    expect(tab, "#says").to_have_class("bad")
    expect(tab, "[name=size]").to_be_focused()
    expect(tab, "[name=size]").to_have_attribute("aria-invalid", "true")

    tab.locator("[name=size]").fill(size)
    expect(tab, "[name=size]").not_to_have_attribute("aria-invalid", "true")


@browser
def test_the_page_fits_a_phone_and_can_be_used_without_a_mouse(tab):
    tab.set_viewport_size({"width": 360, "height": 740})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360

    reached = []
    for _ in range(12):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("document.activeElement.name || document.activeElement.id"))
    fields = ["prompt", "mode", "size", "seconds", "num_inference_steps", "seed"]
    assert reached[:6] == fields and "file" in reached
