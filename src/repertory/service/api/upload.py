"""Multipart bodies with one file, which goes to disk as it comes: memory does not grow with it."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool

from repertory.errors import ErrorInfo, InvalidInput
from repertory.manifest import sync_folder
from repertory.service.api.errors import ApiError, InvalidRequest

PIECE_BYTES = 1 << 20  # handed to a worker thread at a time
MAX_FIELD_BYTES = 64 << 10
MAX_FIELDS = 1000
MAX_NAME_CHARACTERS = 100
FILE = "file"  # the name of its part


@dataclass
class Upload:
    """What has come so far."""

    folder: Path  # where the file goes
    limit: int  # bytes that the file may have
    fields: dict[str, list[str]] = field(default_factory=dict)
    file_name: str | None = None  # as it was sent
    file_bytes: int = 0
    is_complete: bool = False
    _file: BinaryIO | None = None
    _name: str = ""  # of the part that is being read
    _value: bytearray | None = None
    _header: bytearray = field(default_factory=bytearray)
    _header_value: bytearray = field(default_factory=bytearray)
    _disposition: bytes = b""

    def parser(self, boundary: bytes) -> MultipartParser:
        return MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin_content,
                "on_part_data": self._content,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _begin_part(self) -> None:
        self._disposition = b""

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header.clear()
        self._header_value.clear()

    def _begin_content(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = _text(options.get(b"name", b""), "name")
        if b"filename" in options or self._name == FILE:
            self._begin_file(_text(options.get(b"filename", b""), FILE))
            return
        if sum(map(len, self.fields.values())) >= MAX_FIELDS:
            raise InvalidInput(f"The form has more than {MAX_FIELDS:,} fields.", code="too_many_fields")
        self._value = bytearray()

    def _begin_file(self, name: str) -> None:
        if self._name != FILE:
            raise InvalidRequest([_problem(f"{self._name} is a file.", f"Send the export as {FILE}.", self._name)])
        if self.file_name is not None:
            raise InvalidInput(
                "The form has several files.", code="several_files", cure="Pack them as one zip archive.", param=FILE
            )
        self.file_name = name
        self._file = (self.folder / file_name(name)).open("wb")

    def _content(self, data: bytes, start: int, end: int) -> None:
        if self._value is None:
            assert self._file is not None
            self.file_bytes += end - start
            if self.file_bytes > self.limit:
                raise too_large(self.limit)
            self._file.write(memoryview(data)[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD_BYTES:
            raise InvalidInput(f"{self._name[:60]} is longer than {MAX_FIELD_BYTES >> 10} KiB.", code="field_too_long")

    def _end_part(self) -> None:
        if self._value is None:
            assert self._file is not None
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            sync_folder(self.folder)
        else:
            self.fields.setdefault(self._name, []).append(_text(bytes(self._value), self._name))
        self._value = None

    def _end(self) -> None:
        self.is_complete = True


async def receive(request: Request, folder: Path, limit: int) -> Upload:
    """The body, its file written into `folder`. Raises what is wrong with it; then the folder is to be thrown away."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise ApiError(
            415,
            "unsupported_media_type",
            "The body is not a multipart form.",
            "Send it as one: curl -F org_id=… -F file=@export.zip.",
        )
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit + MAX_FIELDS * MAX_FIELD_BYTES:
        raise too_large(limit)
    upload = Upload(folder, limit)
    try:
        parser = upload.parser(options[b"boundary"])
        waiting = bytearray()
        async for piece in request.stream():
            waiting += piece
            if len(waiting) >= PIECE_BYTES:
                await run_in_threadpool(parser.write, bytes(waiting))
                waiting.clear()
        await run_in_threadpool(parser.write, bytes(waiting))
        parser.finalize()
    except FormParserError:
        raise ApiError(400, "invalid_multipart", "The body is not a whole multipart form.", "Send it again.") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ApiError(
            507, "storage_full", "The disk of DATASET_DIR has no room for the file.", "Make room, and send it again."
        ) from None
    finally:
        upload.close()
    if not upload.is_complete:
        raise ApiError(400, "invalid_multipart", "The form ends too early.", "Send it again.")
    if upload.file_name is None:
        raise InvalidRequest([_problem("file is missing.", "Add the export: curl -F file=@export.zip.", FILE)])
    return upload


def too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        "payload_too_large",
        f"The file is larger than the {limit / (1 << 30):g} GiB that MAX_UPLOAD_GB allows.",
        "Leave its media out, send a part of the history, or raise MAX_UPLOAD_GB.",
        param=FILE,
    )


def file_name(sent: str) -> str:
    """Under which a file of that name is stored: its own last part, as far as it is harmless everywhere."""
    last = re.split(r"[/\\]", sent)[-1]
    harmless = re.sub(r"[^\w. -]+", "_", last).lstrip(". -")
    return harmless.encode()[-MAX_NAME_CHARACTERS:].decode("utf-8", "ignore").lstrip(". -") or "export"


def _text(raw: bytes, name: str) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = "\x00"
    if "\x00" in text:
        raise InvalidRequest([_problem(f"{name[:60]} is not UTF-8 text.", "Send it as UTF-8.", name[:60])])
    return text


def _problem(message: str, cure: str, param: str) -> ErrorInfo:
    return ErrorInfo(code=InvalidInput.code, message=message, cure=cure, param=param, status=422)
