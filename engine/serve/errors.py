"""Errors as the OpenAI clients read them: {"error": {"message", "type", "code", "param"}}."""

import difflib
from collections.abc import Iterable, Sequence

from fastapi.responses import JSONResponse
from pydantic import ValidationError


class WireError(Exception):
    """An answer that is an error. param: the field it is about. retry_after: seconds until the same
    request may succeed, 1 to 120."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.retry_after = retry_after

    def body(self) -> dict:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        said = {"message": _text(self.message), "type": kind, "code": self.code}
        return {"error": said | {"param": self.param and _text(self.param)}}

    def headers(self) -> dict[str, str]:
        if self.status == 401:  # a browser then asks for the key
            return {"www-authenticate": 'Basic realm="univigu", charset="UTF-8"'}
        if self.retry_after is None:
            return {}
        return {"retry-after": str(round(min(max(self.retry_after, 1), 120)))}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers())


def _text(said: str) -> str:
    """What UTF-8 can say of it: a request's JSON may have half of a surrogate pair anywhere."""
    return said.encode("utf-8", "replace").decode()


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> WireError:
    return WireError(400, code, message, param)


def not_found(what: str, id: str) -> WireError:
    return WireError(404, "not_found", f"No {what} {id[:80]!r} is here.", "id")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the known name that is most like this one, or "" where none is."""
    found = difflib.get_close_matches(name, list(known), 1)
    return f" Did you mean {found[0]!r}?" if found else ""


def of_validation(error: ValidationError, known: Sequence[str]) -> WireError:
    """The first fault that pydantic found. known: fields that exist."""
    fault = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(str(part) for part in fault["loc"]) or None
    if fault["type"] == "extra_forbidden":
        name = str(fault["loc"][-1])
        message = f"The field {param!r} is not known.{nearest(name, known)}"
        return invalid(message, param, "unknown_parameter")
    if fault["type"] == "missing":
        return invalid(f"The field {param!r} must be given.", param, "missing_required_parameter")
    got = f"; got {fault['input']!r:.80}" if fault["input"] is not None else ""
    said = fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return invalid(f"{param or 'The body'}: must be {said}{got}.", param)
