"""Errors in OpenAI's JSON: {"error": {"message", "type", "param", "code"}}."""

import json
import math
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

MAX_MESSAGE_LENGTH = 1000
CLOSING_STATUSES = (408, 413)  # the body was not read to its end, so close the connection
ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class APIError(HTTPException):
    """A request that is refused or has failed, and why."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        """`param`: the field that is wrong; `retry_after`: seconds."""
        headers = {}
        if retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(retry_after)))
        if status in CLOSING_STATUSES:
            headers["Connection"] = "close"
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(status, message, headers)
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """Return the JSON that OpenAI's clients read."""
        return error_body(self.status_code, self.detail, self.param, self.code)

    def response(self) -> Response:
        return SafeJSONResponse(self.body(), self.status_code, self.headers)


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    message, param = sendable(message), param and sendable(param)
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def sendable(text: str) -> str:
    """Return text that may quote a client in a form that UTF-8 can encode, at limited length."""
    text = text if len(text) <= MAX_MESSAGE_LENGTH else f"{text[:MAX_MESSAGE_LENGTH]} ..."
    return text.encode(errors="backslashreplace").decode()


def to_json(content: Any) -> bytes:
    """Return JSON, with null for NaN and infinities, which JSON cannot express."""
    try:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(nonfinite_to_none(content), ensure_ascii=False, allow_nan=False)
    return text.encode(errors="backslashreplace")


def nonfinite_to_none(content: Any) -> Any:
    """Return JSON values with None for NaN and infinities."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {name: nonfinite_to_none(value) for name, value in content.items()}
    return (
        [nonfinite_to_none(value) for value in content]
        if isinstance(content, list | tuple)
        else content
    )


class SafeJSONResponse(JSONResponse):
    """A JSON response that may hold NaN, infinities and lone surrogates."""

    def render(self, content: Any) -> bytes:
        return to_json(content)
