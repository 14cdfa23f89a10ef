"""What a request gets that cannot be answered, in OpenAI's form, and the codes of HTTP for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KINDS = {  # OpenAI's `type` of an error, by status
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """Ends a request. param: the field that is wrong; code: a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] = {},
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers)

    def body(self) -> dict[str, Any]:
        """`{"error": {...}}`, as OpenAI's clients read it."""
        kind = KINDS.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def wrong_field(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")


def too_busy(message: str) -> ApiError:
    return ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})


def unavailable(message: str) -> ApiError:
    return ApiError(503, message, code="unavailable", headers={"Retry-After": "5"})
