"""The page at /, and the list of routes at /docs. Both are one answer that loads nothing else."""

import base64
import hashlib
import html
import re
from functools import lru_cache
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

ROUTES = APIRouter(include_in_schema=False)
FILE = Path(__file__).parent / "page" / "index.html"
INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.S)

STYLE = """body { font: 16px/1.5 system-ui; max-width: 48rem; margin: 2rem auto; padding: 0 1rem;
color-scheme: light dark }"""


@lru_cache
def policy(text: str) -> str:
    """The Content-Security-Policy of a page, which runs what stands in it and nothing else."""
    hashes = {"script": [], "style": []}
    for kind, body in INLINE.findall(text):
        digest = hashlib.sha256(body.encode()).digest()
        hashes[kind].append(f"'sha256-{base64.b64encode(digest).decode()}'")
    rules = ["default-src 'none'", "connect-src 'self'", "img-src 'self' blob:"]
    rules += ["media-src 'self' blob:", "base-uri 'none'", "frame-ancestors 'none'"]
    rules += ["form-action 'none'"]
    rules += [
        f"{kind}-src {' '.join(found) or chr(39) + 'none' + chr(39)}"
        for kind, found in hashes.items()
    ]
    return "; ".join(rules)


def page(text: str) -> HTMLResponse:
    return HTMLResponse(text, headers={"content-security-policy": policy(text)})


@ROUTES.get("/")
def index() -> HTMLResponse:
    return page(FILE.read_text(encoding="utf-8"))


@ROUTES.get("/favicon.ico")
def icon() -> Response:
    """There is none; a browser asks all the same."""
    return Response(status_code=204)


@ROUTES.get("/docs")
def docs(request: Request) -> HTMLResponse:
    """The routes, as /openapi.json has them."""
    rows = []
    for path, methods in request.app.openapi()["paths"].items():
        for method, route in methods.items():
            said = html.escape(route.get("description", ""))
            rows.append(
                f"<dt><code>{method.upper()} {html.escape(path)}</code></dt><dd>{said}</dd>"
            )
    text = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Routes</title>
<style>{STYLE}</style><h1>Routes</h1><p>All of it: <a href="/openapi.json">/openapi.json</a>.</p>
<dl>{"".join(rows)}</dl></html>"""
    return page(text)
