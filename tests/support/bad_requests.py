"""Requests to `univigu serve` that break a rule, each with the answer that it must have."""

import base64
from typing import NamedTuple

from serving import PROMPT

FORM = {"content-type": "multipart/form-data; boundary=b"}
JSON = {"content-type": "application/json"}
MODEL = "model_not_found"


class Bad(NamedTuple):
    """A request and its answer. said: a part of the message."""

    name: str
    path: str
    send: dict
    status: int = 400
    code: str = "invalid_value"
    param: str | None = None
    said: str = ""
    method: str = "POST"


def video(name, fields, param, said="", **answer) -> Bad:
    """POST /v1/videos of these fields beside a prompt."""
    fields = {"prompt": PROMPT} | fields
    return Bad(name, "/v1/videos", {"json": fields}, param=param, said=said, **answer)


def raw(name, content, headers=JSON, path="/v1/videos", **answer) -> Bad:
    content = content if isinstance(content, bytes) else content.encode()
    return Bad(name, path, {"content": content, "headers": headers}, **answer)


def form(name, files, param, said="", **answer) -> Bad:
    return Bad(name, "/v1/videos", {"files": files}, param=param, said=said, **answer)


def chat(name, url, param="messages", said="", fields=None, **answer) -> Bad:
    """A caption of this URL."""
    content = [{"type": "video_url", "video_url": {"url": url}}]
    body = {"messages": [{"role": "user", "content": content}]} | (fields or {})
    path = "/v1/chat/completions"
    return Bad(name, path, {"json": body}, param=param, said=said, **answer)


def messages(name, found, param="messages", said="", **answer) -> Bad:
    body = {"messages": found}
    return Bad(name, "/v1/chat/completions", {"json": body}, param=param, said=said, **answer)


def data(content: bytes) -> str:
    return "data:video/mp4;base64," + base64.b64encode(content).decode()


TEXT = {"prompt": (None, PROMPT)}
VIDEO = b"\0\0\0\x20ftypisom" + b"\0" * 100  # begins as an mp4 does, and is none
NOBODY = "/v1/videos/video_" + "0" * 32
FILES, CHAT = "/v1/files", "/v1/chat/completions"
DEEP = {depth: "[" * depth + "]" * depth for depth in (500, 940, 970, 985, 5000, 200_000)}
UNKNOWN = {"code": "unknown_parameter"}
MISSING = {"code": "missing_required_parameter"}
GONE = {"status": 404, "code": "not_found", "param": "id"}
SUFFIX = {"status": 415, "code": "unsupported_media_type"}
NO_MODEL = {"status": 404, "code": MODEL, "param": "model"}
BROKEN = {"status": 400, "code": "invalid_request"}

VIDEOS = [
    video("size: no numbers", {"size": "wide"}, "size", "WIDTHxHEIGHT"),
    video("size: one number", {"size": "64"}, "size"),
    video("size: negative", {"size": "-64x64"}, "size"),
    video("size: zero", {"size": "0x64"}, "size", "The nearest: 16"),
    video("size: no multiple of 16", {"size": "70x64"}, "size", "The nearest: 64"),
    video("size: too large", {"size": "4096x4096"}, "size", "--most-pixels"),
    video("size: digits without end", {"size": "9" * 5000 + "x64"}, "size"),
    video("size: a number", {"size": 64}, "size", "string"),
    video("seconds: between two", {"seconds": "0.7"}, "seconds", "0.5 or 1"),
    video("seconds: too many", {"seconds": "21"}, "seconds", "The nearest: 20"),
    video("seconds: negative", {"seconds": "-1"}, "seconds"),
    video("seconds: nan", {"seconds": "nan"}, "seconds"),
    video("seconds: inf", {"seconds": "inf"}, "seconds"),
    video("seconds: words", {"seconds": "two"}, "seconds", "two"),
    video("seconds: empty", {"seconds": ""}, "seconds"),
    video("seconds: huge", {"seconds": "9" * 400}, "seconds"),
    video("seconds: a list", {"seconds": ["1"]}, "seconds"),
    video("model: unknown", {"model": "sora-2"}, said="tiny", **NO_MODEL),
    video("model: empty", {"model": ""}, **NO_MODEL),
    video("prompt: empty", {"prompt": ""}, "prompt", "empty"),
    video("prompt: spaces", {"prompt": " \n\t "}, "prompt", "empty"),
    video("prompt: too long", {"prompt": "a" * 4001}, "prompt", "4000"),
    video("prompt: NUL", {"prompt": "a\0b"}, "prompt", "NUL"),
    video("prompt: null", {"prompt": None}, "prompt"),
    video("prompt: a number", {"prompt": 7}, "prompt"),
    video("negative_prompt: NUL", {"negative_prompt": "\0"}, "negative_prompt", "NUL"),
    video("negative_prompt: long", {"negative_prompt": "a" * 4001}, "negative_prompt"),
    video("unknown field", {"step": 3}, "step", **UNKNOWN),
    video("nearest field", {"guidance_scal": 3}, "guidance_scal", "'guidance_scale'", **UNKNOWN),
    video("n of videos", {"n": 2}, "n", **UNKNOWN),
    video("input_reference", {"input_reference": "x"}, "input_reference", "text alone"),
    video("lora: unknown", {"lora": "style"}, "lora", "none"),
    video("lora: a path", {"lora": "../style:1"}, "lora", "NAME:SCALE"),
    video("lora: no scale", {"lora": "style:big"}, "lora", "NAME:SCALE"),
    video("steps: none", {"num_inference_steps": 0}, "num_inference_steps"),
    video("steps: too many", {"num_inference_steps": 101}, "num_inference_steps", "100"),
    video("steps: half a one", {"num_inference_steps": 1.5}, "num_inference_steps"),
    video("steps: huge", {"num_inference_steps": 10**400}, "num_inference_steps"),
    video("steps: an object", {"num_inference_steps": {}}, "num_inference_steps"),
    video("seed: too large", {"seed": 2**63}, "seed"),
    video("seed: words", {"seed": "lucky"}, "seed"),
    video("guidance_scale: too large", {"guidance_scale": 10**400}, "guidance_scale"),
    video("flow_shift: zero", {"flow_shift": 0}, "flow_shift"),
    video("solver: unknown", {"solver": "magic"}, "solver"),
    video("mode: unknown", {"mode": "v2t"}, "mode", "t2v"),
    video("text_steps without text", {"text_steps": 2}, "text_steps", "t2vt"),
    raw("guidance_scale: NaN", '{"prompt": "a", "guidance_scale": NaN}', param="guidance_scale"),
    raw("prompt: half a surrogate pair", '{"prompt": "\\ud800"}', param="prompt"),
    raw("field: half a surrogate pair", '{"prompt": "a", "\\ud800": 1}'),
    raw("half a pair twice", '{"\\ud800": 1, "\\ud800": 2}', param="?", said="twice"),
    raw("no prompt", "{}", param="prompt", **MISSING),
    raw("twice in JSON", '{"prompt": "a", "prompt": "b"}', param="prompt", said="twice"),
    raw("no JSON", "{prompt"),
    raw("nothing", ""),
    raw("a list", "[]"),
    raw("not UTF-8", b'{"prompt": "\xff"}'),
    raw("an integer of 5000 digits", '{"prompt": "a", "seed": ' + "9" * 5000 + "}"),
    *(raw(f"{depth} deep", text) for depth, text in DEEP.items()),
    *(
        raw(f"{depth} deep in a field", f'{{"prompt": {text}}}', param=None)
        for depth, text in DEEP.items()
        if depth > 1000
    ),
    raw("text", "a red circle", {"content-type": "text/plain"}, **SUFFIX),
    raw("no type", "{}", {}, **SUFFIX),
    raw("no form", "a red circle", FORM, **BROKEN),
    raw("no boundary", "x", {"content-type": "multipart/form-data"}, **BROKEN),
    form("twice in a form", [("prompt", (None, "a")), ("prompt", (None, "b"))], "prompt", "twice"),
    form("a file as the prompt", {"prompt": ("a.txt", b"a")}, "prompt", "text"),
    form("a picture", TEXT | {"input_reference": ("a.png", b"a")}, "input_reference"),
    form("a seed that is none", TEXT | {"seed": (None, "1e3")}, "seed"),
    form("a scale that is nan", TEXT | {"guidance_scale": (None, "nan")}, "guidance_scale"),
    form("nothing but a model", {"model": (None, "tiny")}, "prompt", **MISSING),
    form("200 fields", [(f"f{i}", (None, "x")) for i in range(200)], None, **BROKEN),
]
OTHERS = [
    chat("http", "http://127.0.0.1/a.mp4", said="nothing is fetched"),
    chat("https", "https://example.com/a.mp4", said="nothing is fetched"),
    chat("no URL", "clip.mp4"),
    chat("file outside", "file:///etc/passwd", said="--allow-folder"),
    chat("file by ..", "file://{allowed}/../../../../../../etc/passwd", said="--allow-folder"),
    chat("file by %2e%2e", "file://{allowed}/%2e%2e/%2e%2e/x", said="--allow-folder"),
    chat("file of another host", "file://host{allowed}/clip.mp4", said="--allow-folder"),
    chat("file that is none", "file://{allowed}/none.mp4"),
    chat("a folder", "file://{allowed}"),
    chat("file with a NUL", "file://{allowed}/%00"),
    chat("file of a long name", "file://{allowed}/" + "a" * 5000),
    chat("file of no URL", "file://[{allowed}"),
    chat("data without base64", "data:video/mp4,abc", said="data URL"),
    chat("data that is no base64", "data:video/mp4;base64,@@", said="base64"),
    chat("data of nothing", data(b""), code="invalid_video"),
    chat("data that is no video", data(b"hello" * 50), code="invalid_video"),
    chat("data that lies about its type", data(VIDEO), code="invalid_video"),
    chat(
        "start after the end",
        "file://{allowed}/clip.mp4",
        None,
        fields={"start": 1000},
        code="invalid_request",
    ),
    chat("no such upload", "file-" + "0" * 32, "id", status=404, code="not_found"),
    chat("upload of a long name", "file-" + "a" * 5000, "id", status=404, code="not_found"),
    chat("upload by ..", "file-../jobs.sqlite", "id", status=404, code="not_found"),
    chat("n: too many", "file:x", "n", fields={"n": 9}),
    chat("temperature: hot", "file:x", "temperature", fields={"temperature": 3}),
    chat("max_tokens: one", "file://{allowed}/clip.mp4", "max_tokens", fields={"max_tokens": 1}),
    chat("top_p", "file:x", "top_p", "no meaning", fields={"top_p": 0.5}),
    chat("tools", "file:x", "tools", "no meaning", fields={"tools": [{}]}),
    chat("unknown", "file:x", "seeed", "'seed'", fields={"seeed": 1}, code="unknown_parameter"),
    chat(
        "model", "file://{allowed}/clip.mp4", "model", fields={"model": "x"}, status=404, code=MODEL
    ),
    messages("none", []),
    messages("without a video", [{"role": "user", "content": "hello"}], said="one video_url"),
    messages("words", "hello"),
    messages("of nobody", [{"content": "hello"}], said="roles"),
    messages("with a picture", [{"role": "user", "content": [{"type": "image_url"}]}]),
    messages("with numbers", [{"role": "user", "content": [7]}]),
    messages("with half a pair", [{"role": "user", "content": [{"type": "\ud800"}]}])._replace(
        send={
            "content": b'{"messages": [{"role": "user", "content": [{"type": "\\ud800"}]}]}',
            "headers": JSON,
        }
    ),
    raw("chat: no JSON", "{", path=CHAT),
    raw("chat: deep", f'{{"messages": {DEEP[940]}}}', path=CHAT, param=None),
    raw("chat: text", "{}", {"content-type": "text/plain"}, CHAT, **SUFFIX),
    raw("chat: a form", "x", FORM, CHAT, **SUFFIX),
    Bad("upload: no file", FILES, {"files": {"purpose": (None, "vision")}}, param="file"),
    Bad("upload: empty", FILES, {"files": {"file": ("a.mp4", b"")}}, param="file", said="empty"),
    Bad("upload: text", FILES, {"files": {"file": (None, "a")}}, param="file"),
    Bad(
        "upload: unknown field",
        FILES,
        {"files": {"file": ("a.mp4", VIDEO), "purpos": (None, "x")}},
        param="purpos",
        said="'purpose'",
    ),
    Bad(
        "upload: too large",
        FILES,
        {"files": {"file": ("a.mp4", b"0" * 1_100_000)}},
        413,
        "too_large",
        said="1 MB",
    ),
    Bad("upload: no form", FILES, {"json": {"file": "a"}}, param="file"),
    Bad("get: unknown", NOBODY, {}, method="GET", **GONE),
    Bad("get: NUL", "/v1/videos/%00", {}, method="GET", **GONE),
    Bad("get: long", "/v1/videos/" + "v" * 5000, {}, method="GET", **GONE),
    Bad("content: unknown", f"{NOBODY}/content", {}, method="GET", **GONE),
    Bad("content: by ..", "/v1/videos/..%2Fjobs/content", {}, 404, "not_found", method="GET"),
    Bad("variant", f"{NOBODY}/content?variant=gif", {}, param="variant", method="GET"),
    Bad("caption: unknown", f"{NOBODY}/caption", {}, **GONE),
    Bad("cancel: unknown", f"{NOBODY}/cancel", {}, **GONE),
    Bad("delete: unknown", NOBODY, {}, method="DELETE", **GONE),
    Bad("delete: upload", f"{FILES}/file-{'0' * 32}", {}, method="DELETE", **GONE),
    Bad("delete: long", f"{FILES}/file-{'a' * 5000}", {}, method="DELETE", **GONE),
    Bad("list: limit", "/v1/videos?limit=0", {}, param="limit", method="GET"),
    Bad("list: order", "/v1/videos?order=up", {}, param="order", method="GET"),
    Bad("no such route", "/v1/images", {}, 404, "not_found"),
    Bad("remix", f"{NOBODY}/remix", {"json": {}}, 404, "not_found"),
    Bad("no such method", "/v1/videos", {}, 405, "method_not_allowed", method="PUT"),
    Bad("foreign host", "/v1/videos", {"headers": {"host": "evil.example"}}, 403, "foreign_host"),
    Bad("no host", "/v1/models", {"headers": {"host": ""}}, 403, "foreign_host", method="GET"),
    *(
        Bad(
            f"origin {origin}", "/v1/videos", {"headers": {"origin": origin}}, 403, "foreign_origin"
        )
        for origin in ("https://evil.example", "null", "http://[", "http://127.0.0.1:1")
    ),
    Bad(
        "key: empty",
        "/v1/videos",
        {"json": {"prompt": "a"}, "headers": {"idempotency-key": ""}},
        param="idempotency-key",
    ),
    Bad(
        "key: long",
        "/v1/videos",
        {"json": {"prompt": "a"}, "headers": {"idempotency-key": "k" * 256}},
        param="idempotency-key",
    ),
]
