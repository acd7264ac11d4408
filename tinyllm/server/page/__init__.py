"""The page at ``/``: the files of this folder, and nothing else of the disk."""

from __future__ import annotations

import functools
import hashlib
from importlib import resources

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..errors import Refusal

router = APIRouter(include_in_schema=False)
TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "mjs": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "json": "application/json",
    "webmanifest": "application/manifest+json",
    "txt": "text/plain; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
    "ico": "image/x-icon",
    "woff2": "font/woff2",
}
CSP = "; ".join(
    [
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data: blob:",
        "font-src 'self'", "connect-src 'self'", "manifest-src 'self'", "base-uri 'none'",
        "form-action 'none'", "frame-ancestors 'none'",
    ]
)  # fmt: skip
"""Nothing comes from elsewhere, and nothing that stands in the page itself is run."""


@functools.cache
def files() -> dict[str, bytes]:
    """The files of the page by their path below this folder; read once."""
    found = {}
    todo = [("", resources.files(__package__))]
    while todo:
        prefix, folder = todo.pop()
        for item in folder.iterdir():
            if item.is_dir():
                todo.append((f"{prefix}{item.name}/", item))
            elif item.name.rpartition(".")[2] in TYPES:
                found[prefix + item.name] = item.read_bytes()
    return found


def file_answer(name: str, request: Request) -> Response:
    """A file of the page, or 304 to who has it."""
    data = files().get(name)
    if data is None:
        raise Refusal(404, f"the page has no {name!r:.80}")
    tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache", "Content-Security-Policy": CSP}
    if request.headers.get("if-none-match") == tag:
        return Response(None, 304, headers)
    return Response(data, 200, headers, TYPES[name.rpartition(".")[2]])


@router.get("/")
async def index(request: Request) -> Response:
    """The page itself."""
    return file_answer("index.html", request)


@router.get("/docs")
async def docs(request: Request) -> Response:
    """What the server answers, from its OpenAPI description."""
    return file_answer("docs.html", request)


@router.get("/page/{name:path}")
async def file(name: str, request: Request) -> Response:
    """A file that the page names."""
    return file_answer(name, request)


@router.get("/favicon.ico")
async def icon(request: Request) -> Response:
    """The page's icon, where there is one."""
    return file_answer("favicon.ico" if "favicon.ico" in files() else "icon.svg", request)
