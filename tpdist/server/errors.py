"""Every failure of a request as an HTTP status and OpenAI's error body; nothing else answers with an error.

ApiError                 its own status, type and code
RequestError             400 or 503, from sampling parameters, the tokenizer or the cluster
RequestValidationError   400, pydantic's first complaint in one line
HTTPException            404 unknown URL, 405 wrong method
anything else            500, logged with its traceback; the client learns nothing of it
"""

import logging
from typing import Any

import msgspec
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from tpdist.errors import RequestError

logger = logging.getLogger(__name__)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    500: "internal_server_error",
    503: "service_unavailable",
}
MAX_SHOWN_CHARS = 80


class ApiError(HTTPException):
    """A request that ends with `status_code`. `param` is the field to blame, `code` OpenAI's machine-readable reason.

    An HTTPException, because FastAPI turns any other exception of a body parser into an answer of its own.
    """

    def __init__(
        self,
        status_code: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status_code, detail=message, headers=headers)
        self.param = param
        self.code = code


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error shape."""
    return {"error": {"message": message, "type": _type_of(status), "param": param, "code": code}}


def error_response(error: Exception) -> Response:
    """The answer to a request that failed with `error`; an error we did not expect is logged."""
    status, body = describe(error)
    headers = dict(error.headers or {}) if isinstance(error, StarletteHTTPException) else {}
    return Response(msgspec.json.encode(body), status, headers=headers, media_type="application/json")


def describe(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body of `error`."""
    if isinstance(error, ApiError):
        return error.status_code, error_body(error.status_code, error.detail, param=error.param, code=error.code)
    if isinstance(error, RequestError):
        return error.status, error_body(error.status, str(error), param=error.param)
    if isinstance(error, RequestValidationError):
        param, message = _complaint(error)
        return 400, error_body(400, message, param=param)
    if isinstance(error, StarletteHTTPException):
        return error.status_code, error_body(error.status_code, str(error.detail))
    logger.error("a request failed through a bug", exc_info=error)
    return 500, error_body(500, "internal error; the server's log has the details")


def install_handlers(app: FastAPI) -> None:
    """Give every error of `app` OpenAI's shape."""

    async def handle(request: Request, error: Exception) -> Response:
        return error_response(error)

    async def handle_http(request: Request, error: Exception) -> Response:
        return error_response(_with_url(request, error))

    app.add_exception_handler(StarletteHTTPException, handle_http)
    for kind in (RequestValidationError, RequestError, Exception):
        app.add_exception_handler(kind, handle)


def _type_of(status: int) -> str:
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "internal_server_error")


def _with_url(request: Request, error: Exception) -> Exception:
    """Name method and path in the router's own 404 and 405."""
    if isinstance(error, ApiError) or not isinstance(error, StarletteHTTPException):
        return error
    call = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return ApiError(404, f"there is no {call}; see /docs for what is", code="unknown_url")
    if error.status_code == 405:
        headers = dict(error.headers or {})
        return ApiError(405, f"{call} is not possible: wrong method", code="method_not_allowed", headers=headers)
    return error


def _complaint(error: RequestValidationError) -> tuple[str | None, str]:
    """The field to blame and one line about it, from the most exact of pydantic's errors."""
    first = max(error.errors(), key=lambda found: len(found["loc"]))
    context = first.get("ctx") or {}
    param = _path((*first["loc"], *([context["field"]] if "field" in context else [])))
    if param is None:
        return None, _complaint_about_body(first)
    if first["type"] == "missing":
        return param, f"{param} is required"
    if first["type"] in _OWN_TYPES:
        return param, f"{param} {first['msg']}"
    return param, f"{param}: {first['msg']}, got {_shown(first['input'])}"


_OWN_TYPES = frozenset({"unsupported", "unknown_field", "prompt", "stop", "value"})


def _complaint_about_body(first: dict[str, Any]) -> str:
    if first["type"] == "missing":
        return "the request has no body; send a JSON object with Content-Type: application/json"
    if isinstance(first["input"], bytes):
        return "the body was not read as JSON; send it with Content-Type: application/json"
    return f"the body must be a JSON object, got {_shown(first['input'])}"


def _path(location: tuple[int | str, ...]) -> str | None:
    """("body", "messages", 0, "content") -> "messages[0].content". Names of union members are pydantic's, not ours."""
    path = ""
    for step in location[1:]:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step not in _UNION_MEMBERS:
            path += f".{step}" if path else step
    return path[:MAX_SHOWN_CHARS] or None


_UNION_MEMBERS = frozenset({"str", "list[TextPart]"})


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 3] + "..."
