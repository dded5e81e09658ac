"""The routes of videos, and those that say how the server is."""

import asyncio
import logging
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException

from engine.serve import captions, videos, web
from engine.serve.bodies import fields_of
from engine.serve.errors import WireError, invalid, not_found
from engine.serve.guard import Guard
from engine.serve.results import here
from engine.serve.server import Server
from engine.serve.store import OUT_OF_REACH, VIDEO

POLL = {"queued": 500, "in_progress": 300}  # ms until a client asks again
MEDIA = {"video": "video/mp4", "thumbnail": "image/webp", "spritesheet": "image/webp"}
ROUTES = APIRouter()
LOG = logging.getLogger("univigu.serve")
FORM = {"multipart/form-data": {"schema": {"$ref": "#/components/schemas/VideoRequest"}}}
BODY = FORM | {"application/json": {"schema": {"$ref": "#/components/schemas/VideoRequest"}}}


def build(server: Server, key: str | None, life: Callable | None = None):
    """The ASGI application. key: what requests must bring. life: FastAPI's lifespan."""
    app = FastAPI(title="Uni-ViGU", docs_url=None, redoc_url=None, lifespan=life)
    app.state.server = server
    app.include_router(ROUTES)
    app.include_router(captions.ROUTES)
    app.include_router(web.ROUTES)
    app.add_exception_handler(WireError, _answer)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    for kind in OUT_OF_REACH:
        app.add_exception_handler(kind, _unreachable)
    app.add_exception_handler(Exception, _unexpected)

    described = app.openapi

    def openapi() -> dict:
        found = described()
        schema = videos.VideoRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        found["components"]["schemas"]["VideoRequest"] = schema
        return found

    app.openapi = openapi
    return Guard(app, server.settings, key)


def server_of(request: Request) -> Server:
    return request.app.state.server


async def _answer(request: Request, error: WireError) -> JSONResponse:
    server_of(request).metrics.refused.labels(error.code).inc()
    return error.response()


async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    fault = error.errors()[0]
    param = ".".join(map(str, fault["loc"][1:])) or None
    return await _answer(request, invalid(f"{param}: {fault['msg']}.", param))


async def _http(request: Request, error: HTTPException) -> JSONResponse:
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    return WireError(error.status_code, code, str(error.detail)).response()


async def _unreachable(request: Request, error: Exception) -> JSONResponse:
    LOG.error("the table of jobs is out of reach", extra={"error": str(error)})
    said = "The table of jobs is out of reach; ask again."
    return await _answer(request, WireError(503, "table_unreachable", said, retry_after=5))


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    said = "The server failed; its log has the traceback."
    return await _answer(request, WireError(500, "internal_error", said))


def described(server: Server, job) -> videos.Video:
    model, fps = server.source.name, server.config.fps
    return videos.describe(job, model, fps, server.expires_at(job))


def answer(server: Server, job) -> JSONResponse:
    """A video, with how long a client should wait before it asks again."""
    headers = {"openai-poll-after-ms": str(POLL[job.status])} if job.status in POLL else {}
    return JSONResponse(described(server, job).model_dump(), headers=headers)


@ROUTES.post(
    "/v1/videos", response_model=videos.Video, openapi_extra={"requestBody": {"content": BODY}}
)
async def create(
    request: Request,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> Response:
    """Ask for a video."""
    server = server_of(request)
    asked = videos.read_request(await fields_of(request))
    name, lora = server.source.name, server.source.lora
    wanted = videos.settled(asked, server.settings, server.config, name, lora)
    said = asked.model_dump()
    if wanted["seed"] is None:
        wanted["seed"] = secrets.randbelow(2**31)
    job = await asyncio.to_thread(
        server.create, VIDEO, wanted, said, "", idempotency_key and f"video:{idempotency_key}"
    )
    return answer(server, job)


class Page(videos.BaseModel):
    """A page of the list of videos."""

    object: Literal["list"] = "list"
    data: list[videos.Video]
    has_more: bool
    first_id: str | None
    last_id: str | None


@ROUTES.get("/v1/videos")
def list_videos(
    request: Request,
    after: Annotated[str | None, Query(max_length=80)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Page:
    """The videos, the newest first."""
    server = server_of(request)
    rows, more = server.store.page(after, limit, order == "desc")
    data = [described(server, job) for job in rows]
    ends = {"first_id": data[0].id, "last_id": data[-1].id} if data else {}
    return Page(data=data, has_more=more, **{"first_id": None, "last_id": None} | ends)


@ROUTES.get("/v1/videos/{id}", response_model=videos.Video)
def retrieve(request: Request, id: str) -> Response:
    """A video. One that failed is answered with 200 too: its `error` says why."""
    server = server_of(request)
    return answer(server, server.find(id))


class Deleted(videos.BaseModel):
    """What DELETE says."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


@ROUTES.delete("/v1/videos/{id}")
def delete(request: Request, id: str) -> Deleted:
    """Delete a video; one that is being made is stopped."""
    server = server_of(request)
    server.find(id)
    if not server.remove(id):
        raise not_found(VIDEO, id)
    return Deleted(id=id)


@ROUTES.post("/v1/videos/{id}/cancel", response_model=videos.Video)
def cancel(request: Request, id: str) -> Response:
    """Stop a video, which then has failed with the code cancelled. One that has ended stays as it
    is."""
    server = server_of(request)
    server.find(id)
    job = server.cancel(id)
    if job is None:
        raise not_found(VIDEO, id)
    return answer(server, job)


@ROUTES.get(
    "/v1/videos/{id}/content",
    response_class=Response,
    responses={200: {"content": {"video/mp4": {}, "image/webp": {}}}},
)
def content(
    request: Request, id: str, variant: Literal["video", "thumbnail", "spritesheet"] = "video"
) -> Response:
    """The file of a completed video, or pictures of it. Ranges are answered."""
    server = server_of(request)
    path = here(server.settings, server.file_of(server.find(id)))
    if variant != "video":
        path = picture(path, variant)
    return FileResponse(path, media_type=MEDIA[variant], filename=path.name)


def picture(path: Path, variant: str) -> Path:
    """The middle frame, or up to 16 of all in a row, as a file beside the video's."""
    from PIL import Image

    from engine.files import replacing
    from engine.media import read_video

    target = path.with_suffix(f".{variant}.webp")
    if target.exists():
        return target
    frames = read_video(path).frames
    shown = frames[len(frames) // 2][None]
    if variant == "spritesheet":
        shown = frames[:: max(1, -(-len(frames) // 16))]
    with replacing(target) as unfinished:
        Image.fromarray(shown.transpose(1, 0, 2, 3).reshape(shown.shape[1], -1, 3)).save(
            unfinished, "WEBP"
        )
    return target


@ROUTES.get("/v1/models")
def models(request: Request) -> dict:
    """The model, and what a client may ask of it."""
    server = server_of(request)
    config, facts = server.config, server.supervisor.facts or {}
    own = {
        "modes": ["t2v", "t2vt", "v2t"] if config.text_rows else ["t2v"],
        "default_size": f"{config.width}x{config.height}",
        "default_seconds": videos.plain_seconds(config.num_frames, config.fps),
        "fps": config.fps,
        "lora": sorted(server.source.lora),
        **{name: facts.get(name) for name in ("device", "default_steps")},
    }
    model = {"id": server.source.name, "object": "model", "created": 0, "owned_by": "univigu"}
    return {"object": "list", "data": [model | own]}


@ROUTES.get("/health")
def health() -> dict:
    """Whether the process answers."""
    return {"status": "ok"}


@ROUTES.get("/ready", responses={503: {}})
def ready(request: Request) -> Response:
    """Whether the model is loaded and jobs are taken."""
    server = server_of(request)
    fine = server.supervisor.ready and not server.draining
    status = "ready" if fine else "draining" if server.draining else "loading"
    return JSONResponse({"status": status}, 200 if fine else 503)


@ROUTES.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(request: Request) -> Response:
    """In Prometheus' format."""
    return Response(server_of(request).metrics.text(), media_type="text/plain; version=0.0.4")
