"""What a client is told when its request is not met: OpenAI's JSON, whatever the reason.

In: a status and a reason. Out: {"error": {"message", "type", "param", "code"}}.
"""

import json
import math
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

MOST_OF_A_MESSAGE = 1000  # characters
UNREAD = (408, 413)  # a body that was not read to its end: no other request can follow it
TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class APIError(HTTPException):
    """A request that is not met, and why."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        """`param`: the field of the request that is to blame; `retry_after`: seconds."""
        headers = {}
        if retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(retry_after)))
        if status in UNREAD:
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
        """Return the answer."""
        return JSON(self.body(), self.status_code, self.headers)


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return OpenAI's JSON of an error."""
    message, param = quotable(message), param and quotable(param)
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def quotable(text: str) -> str:
    """Return text that quotes a client, so that it can be sent: half a surrogate pair cannot."""
    text = text if len(text) <= MOST_OF_A_MESSAGE else f"{text[:MOST_OF_A_MESSAGE]} ..."
    return text.encode(errors="backslashreplace").decode()


def to_json(content: Any) -> bytes:
    """Return JSON; what is no finite number is null, as JSON has no word for it."""
    try:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(finite(content), ensure_ascii=False, allow_nan=False)
    return text.encode(errors="backslashreplace")


def finite(content: Any) -> Any:
    """Return JSON's values with None for numbers that are not finite."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {name: finite(value) for name, value in content.items()}
    return [finite(value) for value in content] if isinstance(content, list | tuple) else content


class JSON(JSONResponse):
    """An answer in JSON, whatever numbers it holds."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return to_json(content)
