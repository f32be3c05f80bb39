"""One error body for everything that is not a 2xx:

{"error": {"code", "message", "type", "param", "cure", "request_id"}}

A request with several problems has them all (the first 20) in `details`; those of conversations are also in `findings`,
the first 1,000 word for word and all counted, as those of an export are. What the caller has sent is never repeated:
it may be private, and it may be something that JSON cannot say.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from difflib import get_close_matches
from http import HTTPStatus
from math import ceil
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from pydantic_core import ErrorDetails
from sqlalchemy.exc import DataError, SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from repertory.contracts import Hyperparameters
from repertory.data.findings import CODES, Findings, findings_of
from repertory.errors import ErrorInfo, InvalidInput, RepertoryError, Unavailable
from repertory.logs import without_text
from repertory.service.store import NOT_NOW, reason

log = structlog.get_logger()

MAX_DETAILS = 20
MAX_PATH_CHARACTERS = 200
CLIENT_CLOSED_REQUEST = 499  # nobody reads it; it is nginx's number for the log


class ApiError(RepertoryError):
    """An error of the transport, which has a status of its own."""

    def __init__(self, status: int, code: str, message: str, cure: str, *, param: str | None = None) -> None:
        super().__init__(message, code=code, cure=cure, param=param)
        self.status = status


class InvalidRequest(InvalidInput):
    """One problem or several with what was sent."""

    def __init__(self, problems: Sequence[ErrorInfo]) -> None:
        first = problems[0]
        super().__init__(first.message, code=first.code, cure=first.cure, param=first.param)
        self.problems = problems


class Problem(BaseModel):
    code: str
    message: str
    param: str | None  # a path into the request
    cure: str


class Error(Problem):
    type: str
    request_id: str
    details: list[Problem] = []  # where there are several


class ErrorBody(BaseModel):
    error: Error


# What any route may answer besides its own, for the description of the API.
DOCUMENTED: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": HTTPStatus(status).phrase}
    for status in (400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 500, 503, 504)
}


def install(app: FastAPI) -> None:
    """Every exception that can reach the edge, and the answer it gets."""

    @app.exception_handler(RepertoryError)
    async def known(request: Request, error: RepertoryError) -> Response:
        problems = error.problems if isinstance(error, InvalidRequest) else ()
        return error_response(error.info, request.state.request_id, problems)

    @app.exception_handler(RequestValidationError)
    async def invalid_path_or_query(request: Request, error: RequestValidationError) -> Response:
        return await known(request, InvalidRequest([problem(details) for details in error.errors()]))

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        response = error_response(_of_routing(error.status_code), request.state.request_id)
        if error.status_code == 405:
            response.headers["allow"] = _allowed(request)
        return response

    async def storage(request: Request, error: Exception) -> Response:
        assert isinstance(error, SQLAlchemyError)
        log.error("the database does not answer", reason=reason(error))
        busy = Unavailable("The database is busy or cannot be written.", code="storage_unavailable")
        return await known(request, busy)

    for kind in NOT_NOW:
        app.add_exception_handler(kind, storage)

    @app.exception_handler(OSError)
    async def no_room(request: Request, error: OSError) -> Response:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise error
        log.error("a disk is full", **without_text(error))
        full = ApiError(507, "storage_full", "A disk of the service is full.", "Make room, and send it again.")
        return await known(request, full)

    @app.exception_handler(DataError)
    async def nothing_to_store(request: Request, _error: DataError) -> Response:
        """PostgreSQL's texts cannot hold a NUL, which no identifier of ours has."""
        return await known(request, InvalidInput("The request holds a character that no identifier has."))

    @app.exception_handler(ClientDisconnect)
    async def nobody_listens(_request: Request, _error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)


def error_body(info: ErrorInfo, request_id: str, problems: Sequence[ErrorInfo] = ()) -> dict[str, Any]:
    body: dict[str, Any] = {
        "code": info.code,
        "message": info.message,
        "type": _type(info.status),
        "param": info.param,
        "cure": info.cure,
        "request_id": request_id,
    }
    in_conversations = [each for each in problems if (each.param or "").startswith("conversations")]
    if in_conversations:
        body["findings"] = _findings(in_conversations)
    if len(problems) > 1:
        body["details"] = [
            {"code": each.code, "message": each.message, "param": each.param, "cure": each.cure}
            for each in problems[:MAX_DETAILS]
        ]
    return {"error": body}


def _findings(problems: Sequence[ErrorInfo]) -> dict[str, Any]:
    findings = Findings()
    for each in problems:
        if each.code in CODES:
            findings.add(each.code, each.param or "", None, each.message, each.cure)
    return findings_of(findings)


def error_response(info: ErrorInfo, request_id: str, problems: Sequence[ErrorInfo] = ()) -> JSONResponse:
    response = JSONResponse(error_body(info, request_id, problems), status_code=info.status)
    if info.retry_after_seconds is not None:
        response.headers["retry-after"] = str(max(1, ceil(info.retry_after_seconds)))  # never too early
    if info.status == HTTPStatus.GATEWAY_TIMEOUT:
        response.headers["x-should-retry"] = "false"  # OpenAI's client would ask for the same again, twice
    if info.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


def problem(details: ErrorDetails | dict[str, Any], known_fields: Sequence[str] = ()) -> ErrorInfo:
    """What pydantic found, in our words."""
    path = json_path(details["loc"])
    name = path.rpartition(".")[2]
    code, cure = InvalidInput.code, InvalidInput.cure
    match details["type"]:
        case "missing":
            code, cure = "missing_field", "Add it."
        case "extra_forbidden":
            code = "unknown_field"
            near = get_close_matches(name, known_fields, n=1)
            cure = f"Did you mean {near[0]}?" if near else "Remove it, or check how it is spelled in /openapi.json."
        case "string_pattern_mismatch" if name in ("org_id", "name"):
            cure = "Use 1 to 64 letters, digits, hyphens and underscores, beginning with a letter or a digit."
        case "literal_error" if name == "role":
            cure = "Call the person whose voice is learned assistant, the others user, and instructions system."
        case "unsupported":
            code, cure = "unsupported_parameter", "Leave it out."
        case "too_short" if name == "conversations":
            cure = "Send at least one conversation in which the assistant says something."
        case "int_type" | "int_from_float" | "float_type" | "bool_type":
            cure = "Send it as a bare JSON number (or true and false for a switch), without quotes."
    return ErrorInfo(code=code, message=_sentence(path, details["msg"]), cure=cure, param=path, status=422)


def json_path(location: Sequence[int | str]) -> str:
    """conversations[12].messages[3].role"""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in ("body", "query", "path", "header") and not path:
            continue
        elif part == "str" or part.startswith("list["):
            continue  # which kind of value a union's member wanted
        else:
            path += f".{part}" if path else part
    return path[:MAX_PATH_CHARACTERS]


# pydantic's beginnings, and how they read after the name of a field
_REWORDED = (
    (re.compile(r"^Field required"), "is missing"),
    (re.compile(r"^Extra inputs are not permitted"), "is not a known field"),
    (re.compile(r"^Value error, "), ""),
    (re.compile(r"^(Input|Value|String|List) should "), "must "),
    (re.compile(r" after validation, not \d+$"), ""),
)


def _sentence(path: str, message: str) -> str:
    for pattern, words in _REWORDED:
        message = pattern.sub(words, message)
    return f"{path or 'The body'} {message}."


def field_names(model: type[BaseModel]) -> list[str]:
    """Which a misspelled one may have meant."""
    return [*model.model_fields, *Hyperparameters.model_fields]


def _allowed(request: Request) -> str:
    """The methods of an address. Starlette names those of the first route alone."""
    route, first = request.scope["route"].path_format, request.url.path.split("/")[1]
    paths = request.app.openapi()["paths"]
    same = [path for path in paths if path.endswith(route) and path.split("/")[1] == first]
    return ", ".join(sorted({method.upper() for path in same for method in paths[path]}))


def _of_routing(status: int) -> ErrorInfo:
    phrase = HTTPStatus(status).phrase
    cures = {
        404: "Check the address; /openapi.json lists them all.",
        405: "Use a method that the Allow header names.",
    }
    return ErrorInfo(
        code=phrase.lower().replace(" ", "_"),
        message=f"{phrase}.",
        cure=cures.get(status, InvalidInput.cure),
        status=status,
    )


def _type(status: int) -> str:
    types = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        409: "conflict_error",
        429: "rate_limit_error",
    }
    if status >= 500:
        return "unavailable_error" if status == 503 else "server_error"
    return types.get(status, "invalid_request_error")
