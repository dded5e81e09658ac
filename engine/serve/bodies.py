"""Bodies of requests: the object of a JSON body, the fields of a form."""

import json

from fastapi import Request
from starlette.datastructures import UploadFile

from engine.serve.errors import WireError, invalid

FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")


def kind_of(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def json_of(request: Request) -> dict:
    """The object of a JSON body. Errors: WireError."""
    if kind_of(request) != "application/json":
        raise WireError(415, "unsupported_media_type", "Send application/json.")
    try:
        given = json.loads(await request.body(), object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise invalid("The body must be JSON.") from None
    if not isinstance(given, dict):
        raise invalid("The body must be a JSON object.")
    return given


def _once(pairs: list[tuple]) -> dict:
    found: dict = {}
    for name, value in pairs:
        if name in found:
            raise _twice(name)
        found[name] = value
    return found


def _twice(name: str) -> WireError:
    return invalid(f"The field {name!r:.80} is given twice.", name[:80])


async def fields_of(request: Request) -> dict:
    """The fields of a form, or the object of a JSON body. Errors: WireError."""
    if kind_of(request) == "application/json":
        return await json_of(request)
    if kind_of(request) not in FORMS:
        raise WireError(
            415, "unsupported_media_type", "Send multipart/form-data or application/json."
        )

    given = {}
    async with request.form(max_files=1, max_fields=100) as form:
        for name, value in form.multi_items():
            if name in given:
                raise _twice(name)
            if isinstance(value, UploadFile) and name != "input_reference":
                raise invalid(f"The field {name!r:.80} must be text; got a file.", name[:80])
            given[name] = value
    return given
