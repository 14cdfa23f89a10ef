"""The page at `/`: its files as routes, with headers that let it reach this server and no other.

The files lie in `page/`: index.html, its style and a few modules, served as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.routing import Route

FOLDER = Path(__file__).with_name("page")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a new version of the server has a new page
}


def page_routes() -> list[Route]:
    """Routes of `/` and of each file under `/page/`; none of them needs a key."""
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    def route(path: str, file: Path) -> Route:
        content = file.read_bytes()

        async def endpoint(request: Request) -> Response:
            return Response(content, headers=HEADERS, media_type=TYPES[file.suffix])

        return Route(path, endpoint, methods=["GET"], name=f"page:{file.name}")

    files = sorted(file for file in FOLDER.iterdir() if file.suffix in TYPES)
    return [
        route("/", FOLDER / "index.html"),
        *(route(f"/page/{file.name}", file) for file in files),
    ]
