"""Captions: uploads, chat completions with a video in them, and captions of videos made here."""

import asyncio
import base64
import binascii
import json
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import unquote, urlsplit

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile

from engine.serve import videos
from engine.serve.bodies import json_of
from engine.serve.errors import WireError, invalid, nearest, not_found, of_validation
from engine.serve.server import Server
from engine.serve.store import CANCELLED, CAPTION, COMPLETED, FAILED, new_id

ROUTES = APIRouter()
MOST_CHOICES = 8
UPLOAD_ID = re.compile(r"file-[0-9a-f]{32}")
REFUSED = {  # usual fields of chat requests that mean nothing here, unless they have these values
    "top_p": (None, 1, 1.0),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "stop": (None, []),
    "logprobs": (None, False),
    "top_logprobs": (None,),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "reasoning_effort": (None, "none"),
}


class ChatRequest(BaseModel):
    """What POST /v1/chat/completions takes: one message with one video. Text beside it is not read,
    for the model captions a video under no instruction."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    messages: list[dict] = Field(min_length=1, max_length=16)
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    seed: Annotated[int, Field(ge=-videos.SEEDS, lt=videos.SEEDS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    video_cache: Literal["exact", "frozen"] = "exact"
    commit: Literal["jump", "confidence"] = "jump"
    start: Annotated[float, Field(ge=0, le=10**6)] = 0.0
    stream: bool = False
    stream_options: dict | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None


def read_chat(given: dict) -> ChatRequest:
    """Errors: WireError."""
    for name, meaningless in REFUSED.items():
        if name in given and given[name] not in meaningless:
            raise invalid(f"{name} has no meaning for captions. Leave it out.", name)
    try:
        return ChatRequest.model_validate({k: v for k, v in given.items() if k not in REFUSED})
    except ValidationError as error:
        raise of_validation(error, list(ChatRequest.model_fields)) from None


def video_of(messages: list[dict]) -> str:
    """The URL of the only video in the messages. Errors: WireError."""
    urls = []
    for message in messages:
        parts = message.get("content")
        if message.get("role") not in ("user", "system", "developer"):
            raise invalid("messages: roles are user, system and developer.", "messages")
        for part in parts if isinstance(parts, list) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "video_url" and isinstance(part.get("video_url"), dict):
                urls.append(part["video_url"].get("url"))
            elif kind != "text":
                raise invalid(
                    f"messages: content is of type video_url and text; got {kind!r:.80}.",
                    "messages",
                )
    if len(urls) != 1 or not isinstance(urls[0], str):
        raise invalid(f"messages must have one video_url; got {len(urls)}.", "messages")
    return urls[0]


def save_data(server: Server, url: str) -> Path:
    """A data URL as a file. Errors: WireError."""
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise invalid("messages: a data URL must be data:video/mp4;base64,...", "messages")
    try:
        content = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise invalid("messages: the data URL must be base64.", "messages") from None
    path = server.settings.uploads / new_id("data")
    path.write_bytes(content)
    return path


def path_of(server: Server, url: str) -> Path:
    """The file that a URL means: data:, the id of an upload or of a video made here, or a file in
    one of the folders that --allow-folder names. Nothing is fetched. Errors: WireError."""
    if url.startswith("data:"):
        return save_data(server, url)
    if url.startswith("file-"):
        return upload_of(server, url)
    if url.startswith("video_"):
        return server.file_of(server.find(url))

    if url.startswith("file:"):
        path = allowed_file(url, server.settings.allow_folder)
        if path is None:
            raise invalid(
                "messages: a file:// URL must name a file in a folder that --allow-folder names.",
                "messages",
            )
        return path
    raise invalid(
        "messages: video_url takes a data URL, the id of an upload (POST /v1/files) or of a video, "
        f"or an allowed file; nothing is fetched. Got {url!r:.60}.",
        "messages",
    )


def upload_of(server: Server, id: str) -> Path:
    """The file of an upload. Errors: WireError."""
    path = server.settings.uploads / id
    if UPLOAD_ID.fullmatch(id) is None or not path.is_file():
        raise not_found("file", id)
    return path


def allowed_file(url: str, folders: Iterable[Path]) -> Path | None:
    """The file that a file:// URL means, where it is in one of the folders."""
    try:
        parts = urlsplit(url)
        path = Path(os.path.realpath(unquote(parts.path)))
        inside = any(path.is_relative_to(os.path.realpath(folder)) for folder in folders)
        return path if inside and not parts.netloc and path.is_file() else None
    except (ValueError, OSError):  # no URL, or no name that a file may have
        return None


def settled(server: Server, asked: ChatRequest, path: Path) -> dict:
    """What the runner is told. Errors: WireError."""
    rows, steps = server.config.text_rows, asked.num_inference_steps
    if rows == 0:
        raise WireError(400, "mode_not_supported", "The model has no text branch.", "model")
    if asked.model not in (None, server.source.name):
        name = server.source.name
        raise WireError(
            404, "model_not_found", f"The model is {name!r}; got {asked.model!r:.80}.", "model"
        )
    if steps is not None and steps > server.settings.most_steps:
        most = server.settings.most_steps
        raise invalid(f"num_inference_steps may be {most} (--most-steps).", "num_inference_steps")
    for name in ("max_tokens", "max_completion_tokens"):
        if (getattr(asked, name) or rows) < rows:
            raise invalid(f"{name} must be at least {rows}: all are made at once.", name)

    seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed
    temperature = 1.0 if asked.temperature is None else asked.temperature
    found = {"path": str(path.absolute()), "start": asked.start, "n": asked.n, "seed": seed}
    found |= {"num_inference_steps": steps, "temperature": temperature}
    names = "video_cache", "commit", "stream"
    return found | {name: getattr(asked, name) for name in names}


async def growing(server: Server, request: Request, wanted: dict) -> AsyncIterator[dict]:
    """The captions as far as they are known, each time that there is more of them, at last the
    whole answer; a client that leaves cancels the job. Errors: WireError."""
    how = "num_inference_steps", "temperature", "video_cache", "commit"
    like = json.dumps([wanted[name] for name in how])
    job = await asyncio.to_thread(server.create, CAPTION, wanted, wanted, like)
    id, ended = job.id, False
    try:
        async for job in server.follow(id, request.is_disconnected):
            ended = job is None or job.status in (COMPLETED, FAILED)
            if not ended and job.result is not None:
                yield json.loads(job.result) | {"trace": job.trace, "whole": False}
    finally:
        if not ended:  # the task was cancelled, and must not wait for anything
            asyncio.get_running_loop().run_in_executor(None, server.remove, id)

    if job is not None:
        await asyncio.to_thread(server.store.remove, id)
    if job is None or job.error_code == CANCELLED:
        raise WireError(499, "cancelled", "The request was cancelled.")
    if job.status == FAILED:
        status = 400 if job.error_code in ("invalid_request", "invalid_video") else 500
        raise WireError(status, job.error_code, job.error_message, "messages")
    yield json.loads(job.result) | {"trace": job.trace, "whole": True}


def completion(server: Server, found: dict) -> dict:
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": caption},
            "finish_reason": "stop",
            "logprobs": None,
        }
        for i, caption in enumerate(found["captions"])
    ]

    usage = {"prompt_tokens": 0, "completion_tokens": found["tokens"]}
    return {
        "id": "chatcmpl-" + found["trace"],
        "object": "chat.completion",
        "created": int(time.time()),
        "model": server.source.name,
        "choices": choices,
        "usage": usage | {"total_tokens": found["tokens"]},
        "timings": found["timings"],
    }


async def events(server: Server, asked: ChatRequest, answers: AsyncIterator[dict]):
    """What `growing` gives as server-sent events, pieces of choices; an error is one, too."""
    said = [""] * asked.n
    try:
        async for found in answers:
            common = {"id": "chatcmpl-" + found["trace"], "created": int(time.time())}
            common |= {"model": server.source.name, "object": "chat.completion.chunk"}
            for i, caption in enumerate(found["captions"]):
                if not caption.startswith(said[i]):  # its runner died, and it ran in other company
                    raise WireError(500, "caption_changed", "The caption changed. Ask again.")
                if caption != said[i] or found["whole"]:
                    delta = {"role": "assistant", "content": caption[len(said[i]) :]}
                    yield event(common, i, delta)
                said[i] = caption
    except WireError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
        return

    for i in range(asked.n):
        yield event(common, i, {}, "stop")
    if (asked.stream_options or {}).get("include_usage"):
        usage = completion(server, found)["usage"]
        yield f"data: {json.dumps(common | {'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"


async def with_first(first: dict, more: AsyncIterator[dict]) -> AsyncIterator[dict]:
    yield first
    async for found in more:
        yield found


def event(common: dict, choice: int, delta: dict, reason: str | None = None) -> str:
    part = {"index": choice, "delta": delta, "finish_reason": reason}
    return f"data: {json.dumps(common | {'choices': [part]})}\n\n"


CHAT = {"application/json": {"schema": ChatRequest.model_json_schema()}}


@ROUTES.post("/v1/chat/completions", openapi_extra={"requestBody": {"content": CHAT}})
async def chat(request: Request) -> Response:
    """Caption a video."""
    server: Server = request.app.state.server
    asked = read_chat(await json_of(request))
    url = video_of(asked.messages)
    path = await asyncio.to_thread(path_of, server, url)
    found = captioned(server, request, asked, path, url.startswith("data:"))
    first = await anext(found)  # what fails before it is an answer with a status of its own
    if asked.stream:
        said = events(server, asked, with_first(first, found))
        return StreamingResponse(said, media_type="text/event-stream")
    await found.aclose()
    return JSONResponse(completion(server, first))


async def captioned(
    server: Server, request: Request, asked: ChatRequest, path: Path, passing: bool
) -> AsyncIterator[dict]:
    """See `growing`. passing: the file goes when the captions are there."""
    try:
        async for found in growing(server, request, settled(server, asked, path)):
            yield found
    finally:
        if passing:
            path.unlink(missing_ok=True)


@ROUTES.post("/v1/videos/{id}/caption")
async def caption(request: Request, id: str) -> dict:
    """Caption a video that was made here."""
    server: Server = request.app.state.server
    path = server.file_of(await asyncio.to_thread(server.find, id))
    found = await anext(growing(server, request, settled(server, ChatRequest(messages=[{}]), path)))
    return {"caption": found["captions"][0], "timings": found["timings"]}


class File(BaseModel):
    """An upload."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


UPLOAD = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "required": ["file"],
            "properties": {
                "file": {"type": "string", "format": "binary"},
                "purpose": {"type": "string"},
            },
        }
    }
}


@ROUTES.post("/v1/files", openapi_extra={"requestBody": {"content": UPLOAD}})
async def upload(request: Request) -> File:
    """Keep a video for a caption; the oldest are deleted where all take too much."""
    server: Server = request.app.state.server
    async with request.form(max_files=1, max_fields=4) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise invalid("file must be given, as a file of a form.", "file")
        unknown = [name for name in form if name not in ("file", "purpose", "expires_after")]
        if unknown:
            known = nearest(unknown[0], ("file", "purpose"))
            raise invalid(f"The field {unknown[0]!r:.80} is not known.{known}", unknown[0][:80])
        content = await file.read()
        purpose = str(form.get("purpose", "vision"))[:64]
        name = (file.filename or "")[:255]

    if not content:
        raise invalid("file must not be empty.", "file")
    id = "file-" + secrets.token_hex(16)
    await asyncio.to_thread((server.settings.uploads / id).write_bytes, content)
    return File(
        id=id, bytes=len(content), created_at=int(time.time()), filename=name, purpose=purpose
    )


@ROUTES.delete("/v1/files/{id}")
def delete_file(request: Request, id: str) -> dict:
    """Delete an upload."""
    server: Server = request.app.state.server
    upload_of(server, id).unlink(missing_ok=True)
    return {"id": id, "object": "file", "deleted": True}
