"""JSON documents of any size, value by value.

The containers that a reader names are walked through, and everything below them is decoded whole by the standard
library's scanner. So memory holds one message, not one export, and a truncated document gives all that is whole.

Why not ijson: it keeps the path of every value, so 100,000 opening brackets cost gigabytes, it turns half a surrogate
pair into "?" without a word, and exports of several chats would have to be parsed twice.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from enum import Enum
from typing import IO, Any

from repertory.data.export import BROKEN_ARCHIVE, CHUNK_BYTES, ExportFile

MAX_VALUE_CHARACTERS = 32 << 20  # of one value; a long conversation of an assistant has a few million

_decode = json.JSONDecoder().raw_decode


class Mark(Enum):
    BEGIN = "begin"  # a container that is walked through begins here


class BrokenJson(ValueError):
    """The document ends too early, or goes on in a way that is no JSON."""

    def __init__(self, why: str, line: int) -> None:
        super().__init__(why)
        self.why = why
        self.line = line  # from 1


def walk(
    file: ExportFile, through: frozenset[str], repair: Callable[[], Callable[[str, bool], str]] | None = None
) -> Iterator[tuple[str, Any]]:
    """(path, value) of everything in the containers `through`, in the order of the document.

    A path is written as `chats.list.item.name`; "" is the document itself, and `item` stands for any element of an
    array. A container of `through` is announced by its path and Mark.BEGIN. `repair()` makes a function from a chunk
    of text (and whether it is the last) to the text that is parsed. Raises BrokenJson.
    """
    with file.open() as stream:
        decoder = codecs.getincrementaldecoder(file.encoding)(file.errors)
        source = _Source(stream, decoder, repair() if repair else None)
        yield from _value(source, "", through)
        if source.peek():
            raise source.broken("more follows after the end of the document")


def _value(source: _Source, path: str, through: frozenset[str]) -> Iterator[tuple[str, Any]]:
    opening = source.peek()
    if path not in through or opening not in ("{", "["):
        yield path, source.decode()
        return
    yield path, Mark.BEGIN
    source.at += 1
    prefix = path + "." if path else ""
    item = prefix + "item"
    closing = "}" if opening == "{" else "]"
    if source.peek() == closing:
        source.at += 1
        return
    while True:
        name = item
        if opening == "{":
            key = source.decode()
            if not isinstance(key, str) or source.peek() != ":":
                raise source.broken("a name and a colon are expected")
            source.at += 1
            name = prefix + key
        if name in through:
            yield from _value(source, name, through)
        else:
            yield name, source.decode()
        following = source.peek()
        source.at += 1
        if following == closing:
            return
        if following != ",":
            source.at -= 1
            raise source.broken(f"a comma or {closing} is expected" if following else "the file ends too early")


class _Source:
    """The part of the document that is in memory, and the place in it that parsing has come to."""

    def __init__(
        self, stream: IO[bytes], decoder: codecs.IncrementalDecoder, repair: Callable[[str, bool], str] | None
    ) -> None:
        self.at = 0
        self._text = ""
        self._lines = 0  # line feeds before self._text
        self._ended = False
        self._trouble = "the file ends too early"
        self._stream = stream
        self._decoder = decoder
        self._repair = repair

    def peek(self) -> str:
        """The next character that is not white space, "" at the end of the document."""
        while True:
            text, at, end = self._text, self.at, len(self._text)
            while at < end and text[at] in " \n\r\t":
                at += 1
            self.at = at
            if at < end:
                return text[at]
            if self._ended:
                return ""
            self._fill()

    def decode(self) -> Any:
        """The value that begins here."""
        if not self.peek():
            raise self.broken(self._trouble)
        while True:
            try:
                value, end = _decode(self._text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string")
                self._grow_or_raise(len(self._text) if cut else error.pos, error.msg)
            except RecursionError:
                raise self.broken("it is nested too deeply") from None
            except ValueError as error:  # a number of thousands of digits
                raise self.broken(str(error)) from None
            else:
                if end < len(self._text) or self._ended:  # else a number may go on in the next chunk
                    self.at = end
                    return value
                self._fill()

    def broken(self, why: str) -> BrokenJson:
        return BrokenJson(why, self._lines + self._text.count("\n", 0, self.at) + 1)

    def _grow_or_raise(self, position: int, why: str) -> None:
        """More text where the value may only be cut; an error where no more text would help."""
        might_be_cut = position > len(self._text) - 16  # the longest escape or literal
        if self._ended:
            raise self.broken(self._trouble if might_be_cut else why)
        if not might_be_cut:
            raise self.broken(why)
        if len(self._text) - self.at > MAX_VALUE_CHARACTERS:
            raise self.broken(f"one value has more than {MAX_VALUE_CHARACTERS >> 20} million characters")
        self._fill(len(self._text) - self.at)

    def _fill(self, at_least: int = 0) -> None:
        try:
            chunk = self._stream.read(max(CHUNK_BYTES, at_least))
        except BROKEN_ARCHIVE as broken:
            chunk, self._trouble = b"", f"the archive is damaged here ({broken})"
        self._ended = not chunk
        try:
            text = self._decoder.decode(chunk, final=self._ended)
        except UnicodeDecodeError:  # UTF-16 that ends within a character
            text = ""
        if self._repair:
            text = self._repair(text, self._ended)
        self._lines += self._text.count("\n", 0, self.at)
        self._text = self._text[self.at :] + text
        self.at = 0
