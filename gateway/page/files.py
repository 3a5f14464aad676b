"""The page's files, as they are. It works offline: nothing in it comes from elsewhere."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from starlette.responses import Response

# Only its own script and style, only calls of this gateway, in nobody's frame.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}


@cache
def _content(name: str) -> bytes:
    return files(__package__).joinpath(name).read_bytes()


def page_file(name: str) -> Response:
    """One of the files."""
    headers = {"content-security-policy": POLICY, "referrer-policy": "no-referrer", "cache-control": "no-cache"}
    return Response(_content(name), media_type=TYPES[name.rpartition(".")[2]], headers=headers)
