"""What a client is told when its request is not met: OpenAI's JSON, whatever the reason.

In: a status and a reason. Out: {"error": {"message", "type", "param", "code"}}.
"""

import math
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

UNREAD = (408, 413)  # a body that was not read to its end: no other request can follow it
TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class Refused(HTTPException):
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

    def response(self) -> JSONResponse:
        """Return the answer."""
        return JSONResponse(self.body(), self.status_code, self.headers)


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return OpenAI's JSON of an error."""
    # What a client sent may be quoted here; half a surrogate pair has no UTF-8.
    message = message.encode(errors="backslashreplace").decode()
    param = param and param.encode(errors="backslashreplace").decode()
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
