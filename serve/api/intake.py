"""The body of a request: no longer than allowed, in no more time than allowed."""

import asyncio

from starlette.requests import ClientDisconnect, Request

from serve.api.limits import Budget, Limits
from serve.api.problems import ApiError, busy


async def read_body(request: Request, limits: Limits, budget: Budget) -> bytes:
    """All bytes of a body, which count as held from then on.

    Raises:
        ApiError: 413 too long, told as soon as it is; 408 too slow; 415 no JSON; 503 no room.
        ClientDisconnect: the client went away.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "unsupported_media_type", "send the request as application/json")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limits.body_bytes:
        raise _too_long(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            while await _more(request, body, limits, budget):
                pass
    except TimeoutError:
        budget.give(len(body))
        raise ApiError(
            408,
            "body_timeout",
            f"the request took more than {limits.body_seconds:g} seconds to arrive; send less",
        ) from None
    except BaseException:
        budget.give(len(body))
        raise
    return bytes(body)


async def _more(request: Request, body: bytearray, limits: Limits, budget: Budget) -> bool:
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    chunk = message.get("body", b"")
    if len(body) + len(chunk) > limits.body_bytes:
        raise _too_long(limits)
    if not budget.take(len(chunk)):
        raise busy("too much is being sent at the same time")
    body += chunk
    return bool(message.get("more_body"))


def _too_long(limits: Limits) -> ApiError:
    return ApiError(
        413,
        "body_too_large",
        f"the request is longer than {limits.body_bytes:,} bytes; send fewer or smaller pictures",
    )
