"""The bytes of a request's body to a JSON object, strictly: what is no JSON ends in a 4xx."""

from __future__ import annotations

import asyncio
import json
import math
from typing import TYPE_CHECKING, Any

from gptjax.core.characters import SURROGATE
from gptjax.serving.errors import ApiError

if TYPE_CHECKING:
    from starlette.requests import Request

DEPTH = 64  # of lists and objects within one another
SECONDS = 60  # until a body is here


async def read_bytes(request: Request, limit: int) -> bytes:
    """The body. Raises ApiError where it is no JSON by its type, or larger than `limit` bytes."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415, f"the body's Content-Type is {kind or 'missing'}: it must be application/json"
        )
    packing = request.headers.get("content-encoding", "identity").lower()
    if packing != "identity":
        raise ApiError(415, f"the body's Content-Encoding is {packing[:40]}: it must not be packed")
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said[:20]) > limit:
        raise _too_large(limit)
    parts, size = [], 0
    try:
        async with asyncio.timeout(SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise _too_large(limit)
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {SECONDS} s", code="timeout") from None
    return b"".join(parts)


def _too_large(limit: int) -> ApiError:
    # the rest of the body is not read, so the connection cannot go on
    return ApiError(413, f"the body has more than {limit:,} bytes", headers={"Connection": "close"})


def parse(body: bytes) -> dict[str, Any]:
    """The object that the body holds. Raises ApiError."""
    try:
        value = json.loads(
            body.decode(),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_object,
        )
    except UnicodeDecodeError as error:
        raise _no_json(f"byte {error.start} is no UTF-8") from None
    except RecursionError:
        raise _no_json(f"it is nested deeper than {DEPTH}") from None
    except ValueError as error:  # JSONDecodeError, and integers of thousands of digits
        raise _no_json(str(error)[:200]) from None
    if not isinstance(value, dict):
        raise _no_json("it must be an object")
    _check(value)
    return value


def _no_json(reason: str) -> ApiError:
    return ApiError(400, f"the body is no JSON as this server takes it: {reason}", code="json")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:60]!r} is there twice")
    return result


def _check(value: Any) -> None:
    """Depth and characters; with a list of its own, for Python's stack has an end."""
    level = [value]
    for _ in range(DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str) and SURROGATE.search(item):
                raise _no_json(f"{item[:40]!r} holds half of a UTF-16 pair and no character")
        if not below:
            return
        level = below
    raise _no_json(f"it is nested deeper than {DEPTH}")
