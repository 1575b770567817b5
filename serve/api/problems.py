"""Errors as a client of the OpenAI API gets them: a status, and a text with a short code.

Only texts that are written for users go out: those of `vlm.errors` and those made here.
Anything else is an `internal_error`, and the log has where it happened.
"""

import logging
import traceback
from typing import Any

from starlette.responses import JSONResponse

from vlm.errors import (
    ConfigError,
    ContextLengthError,
    GenerationError,
    ImageError,
    MessageError,
    QueueFullError,
)

log = logging.getLogger(__name__)

RETRY_SECONDS = 2
_IMAGE_STATUS = {
    "too_many_bytes": 413,
    "too_many_pixels": 413,
    "unsupported_format": 415,
    "unsupported_mode": 415,
    "too_thin": 422,
    "remote_url": 422,
    "private_address": 422,
    "fetch_failed": 502,
}
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_UNREAD = {408, 413, 415, 429, 503}  # the rest of the body may still be on its way; not for us
_LONGEST = 1000


class ApiError(Exception):
    """What a client did wrong, or the server cannot do.

    Args:
        status: of HTTP.
        code: a short stable word for programs.
        message: for people, with the way out.
        param: the part of the request that is meant, such as ``messages.0.content``.
        retry: seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        retry: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.retry = retry

    @property
    def body(self) -> dict[str, Any]:
        """As in the OpenAI API."""
        kind = _TYPES.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {
            "error": {
                "message": self.message[:_LONGEST],
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The reply."""
        headers = {} if self.retry is None else {"Retry-After": str(self.retry)}
        if self.status in _UNREAD:
            headers["Connection"] = "close"
        return JSONResponse(self.body, self.status, headers)


def busy(message: str, status: int = 503, code: str = "overloaded") -> ApiError:
    """There is no room now."""
    return ApiError(status, code, f"{message}; try again in a moment", retry=RETRY_SECONDS)


def problem_of(error: BaseException, param: str | None = None) -> ApiError:
    """What to tell a client of an error; one that is no client's business is logged."""
    if isinstance(error, ApiError):
        return error
    text = " ".join(str(error).split())
    if isinstance(error, ImageError):
        return ApiError(_IMAGE_STATUS.get(error.code, 400), error.code, text, param)
    if isinstance(error, ContextLengthError):
        return ApiError(422, "context_length_exceeded", text, param or "messages")
    if isinstance(error, MessageError):
        return ApiError(422, "invalid_messages", text, param or "messages")
    if isinstance(error, ConfigError):
        return ApiError(422, "invalid_value", text, param)
    if isinstance(error, QueueFullError):
        return busy("too many requests are waiting", 429, "queue_full")
    if isinstance(error, GenerationError):
        log.error("an answer failed: %s", text)
        return ApiError(500, "generation_failed", text)
    log.error("an answer failed with %s", where(error))
    return ApiError(
        500, "internal_error", "something broke inside the server; its log has the details"
    )


def where(error: BaseException) -> str:
    """Kind and place of an error. Not its text, which may quote what somebody asked."""
    frames = traceback.format_tb(error.__traceback__)
    return f"{type(error).__name__}:\n{''.join(frames)}"
