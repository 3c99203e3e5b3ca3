"""What stands before the API: the key, and the limit on a request's size."""

from __future__ import annotations

import hmac
from typing import Any

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rankwise.errors import (
    AnswerFailed,
    Overloaded,
    RankwiseError,
    ServerStopping,
    Unauthorized,
    UnknownModel,
)

# Status, type and code of an error, by its class; the first row that fits.
_ERRORS: tuple[tuple[type[RankwiseError], int, str, str | None], ...] = (
    (Unauthorized, 401, "authentication_error", "invalid_api_key"),
    (UnknownModel, 404, "not_found_error", "model_not_found"),
    (Overloaded, 429, "rate_limit_error", "overloaded"),
    (ServerStopping, 503, "server_error", "stopping"),
    (AnswerFailed, 500, "server_error", None),
    (RankwiseError, 400, "invalid_request_error", None),
)


def error_body(message: str, kind: str, code: str | None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def rankwise_error_body(error: RankwiseError) -> tuple[int, dict[str, Any]]:
    """The status of an error, and its body; the code is the error's name where OpenAI has none."""
    status, kind, code = next(row[1:] for row in _ERRORS if isinstance(error, row[0]))
    return status, error_body(str(error), kind, code or type(error).__name__)


def error_response(error: RankwiseError) -> JSONResponse:
    """What a client gets for an error."""
    status, body = rankwise_error_body(error)
    return JSONResponse(body, status, {"Retry-After": "1"} if status in (429, 503) else None)


class Guard:
    """Lets only requests to ``/v1`` through that bring the key, and none that is too large."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, max_body: int) -> None:
        self.app, self.max_body = app, max_body
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self._expected is not None and scope["path"].startswith("/v1") and not self._is_authorised(scope):
            refused = Unauthorized("expected the header `Authorization: Bearer KEY` with the server's API key")
            await error_response(refused)(scope, receive, send)
            return
        await self.app(scope, self._limited(receive), send)

    def _is_authorised(self, scope: Scope) -> bool:
        given = Headers(scope=scope).get("authorization", "")
        return hmac.compare_digest(given.encode(), self._expected or b"")

    def _limited(self, receive: Receive) -> Receive:
        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.max_body:
                raise HTTPException(413, f"the request: expected at most {self.max_body} bytes, found more: shorten it")
            return message

        return limited
