"""What every request passes before a route sees it: who asks, from where, and how much is sent.

It is a plain ASGI application around the other, so that no route can be left out.
"""

import base64
import binascii
import hmac
from urllib.parse import urlsplit

from engine.serve.errors import WireError
from engine.serve.settings import LOOPBACK, MB, Settings

OPEN = ("/health",)  # without a key
# The page and its answers load nothing from elsewhere, and nothing else may show them in a frame.
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


def read_key(settings: Settings) -> str | None:
    """The key that requests must bring. Errors: OSError, UsageError."""
    if settings.api_key_file is None:
        return None
    from engine.errors import UsageError

    key = settings.api_key_file.read_text().strip().partition("\n")[0].strip()
    if not key:
        raise UsageError(
            f"serve: --api-key-file must hold a key in its first line; got none in "
            f"{settings.api_key_file}."
        )
    return key


class Guard:
    """Refuses a wrong key, a page of another site, a name that only pretends to be this machine,
    and a body above the limit, counted as it comes."""

    def __init__(self, app, settings: Settings, key: str | None):
        self.app, self.settings, self.key = app, settings, key

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        body = Body(receive, int(self.settings.upload_mb * MB))
        try:
            self.check(scope["path"], headers)
            body.check_length(headers.get(b"content-length", b""))
            await self.app(scope, body, with_headers(send))
        except WireError as error:
            await error.response()(scope, receive, with_headers(send))

    def check(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Errors: WireError."""
        host = headers.get(b"host", b"").decode("latin-1")
        if self.settings.loopback and name_of(f"//{host}") not in LOOPBACK:
            raise WireError(
                403, "foreign_host", f"The server is for this machine alone; got Host {host!r:.80}."
            )
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin.partition("://")[2] != host:
            raise WireError(
                403, "foreign_origin", f"Pages of other sites may not ask; got {origin!r:.80}."
            )
        if self.key is not None and path not in OPEN and not self.knows(headers):
            said = "Send the server's key: Authorization: Bearer KEY."
            raise WireError(401, "invalid_api_key", said)

    def knows(self, headers: dict[bytes, bytes]) -> bool:
        """Whether the key is there: as a bearer token or, as browsers ask their user for it, as the
        password of any name."""
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != b"bearer":
            return False
        return hmac.compare_digest(given.strip(), self.key.encode())


def name_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def with_headers(send):
    async def sending(message) -> None:
        if message["type"] == "http.response.start":
            message = message | {"headers": [*message["headers"], *HEADERS]}
        await send(message)

    return sending


class Body:
    """Receives a request's body, and stops where it grows above the limit."""

    def __init__(self, receive, limit: int):
        self.receive, self.limit, self.got = receive, limit, 0

    def check_length(self, said: bytes) -> None:
        if said.isdigit() and int(said[:20]) > self.limit:
            self.refuse()

    def refuse(self) -> None:
        raise WireError(
            413, "too_large", f"A request may have {self.limit / MB:g} MB (--upload-mb)."
        )

    async def __call__(self):
        message = await self.receive()
        self.got += len(message.get("body", b""))
        if self.got > self.limit:
            self.refuse()
        return message
