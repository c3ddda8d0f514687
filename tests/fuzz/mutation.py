"""Inputs for fuzzing, each a function of its seed: valid examples, damaged, and messages made up field by field.

Nothing here looks at what an input does; `guided` has atheris do that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

LONGEST = 8192
"""Bytes of an input, about; what is larger is tried apart, in `test_sizes`."""

NUMBERS: tuple[bytes, ...] = (
    *(b"0 -1 1 2 -0 0.0 -0.0 1e-320 5e-324 1e308 1e309 -1e309 nan inf -inf NaN Infinity 1_0 0x10 0.1 1.0".split()),
    *(b"2147483648 4294967296 9007199254740993 9223372036854775808 18446744073709551616 1e999999999".split()),
    *(b"true false null".split()),
    *("\N{ARABIC-INDIC DIGIT ONE}".encode(), b"9" * 400, b"1" * 5000, b"1e" + b"9" * 30),
)
PIECES: tuple[bytes, ...] = (
    *(b"\x00", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xc3\x28", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\x1f\x8b"),
    *(b"\r", b"\n", b"\r\n", b"\x0b", b"\x0c", b"\x1c", b"\x85", b"\t", b" ", b'"', b"'", b"\\", b",", b":", b"="),
    *(b"{", b"}", b"[", b"]", b"#", b"\\u0000", b"\\ud800", b'""', b"{}", b"[]", b"[" * 3000, b'{"a":' * 3000, b"''' "),
    *(b"\x80" * 10, b"\xff" * 10 + b"\x01", b"a" * 300, "\N{SNOWMAN}".encode() * 20),
)

FLOATS = (*(0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e3, 86_400_000.0), *(5e-324, 1e-45, 1e308, math.inf, -math.inf, math.nan))
INTEGERS = (0, 1, 2, 3, 16, 64, 100, 255, 256, 512, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
TEXTS = (
    "",
    "a",
    "hello",
    "chat",
    "user",
    " ",
    "\x00",
    "\x7f",
    "ü",
    "\U0001f600",
    "\ud7ff",
    *(n * "x" for n in (64, 65, 129)),
)

Generator = Callable[[Random], bytes]


def mutated(draw: Random, examples: Sequence[bytes], words: Sequence[bytes] = ()) -> bytes:
    """An example with one to a few changes, most often few."""
    data = bytearray(draw.choice(examples))
    for _ in range(min(12, 1 + int(draw.expovariate(1.2)))):
        _change(draw, data, examples, words)
    return bytes(data[:LONGEST])


def _change(draw: Random, data: bytearray, examples: Sequence[bytes], words: Sequence[bytes]) -> None:
    at = draw.randint(0, len(data))
    end = min(len(data), at + min(64, 1 + int(draw.expovariate(0.15))))
    kind = draw.randrange(12)
    if kind == 0 and data:
        data[at - 1] ^= 1 << draw.randrange(8)
    elif kind == 1 and data:
        data[at - 1] = draw.randrange(256)
    elif kind == 2:
        del data[at:end]
    elif kind == 3:
        data[at:at] = data[at:end] * draw.choice((1, 2, 50))
    elif kind == 4:
        data[at:end] = draw.choice(PIECES)
    elif kind == 5:
        data[at:end] = draw.choice(NUMBERS)
    elif kind == 6:
        data[at:at] = draw.choice(words or PIECES)
    elif kind == 7:
        other = draw.choice(examples)
        data[at:] = other[draw.randint(0, len(other)) :]
    elif kind >= 9:
        _replace_number(draw, data, at)
    else:
        del data[at:]


def _replace_number(draw: Random, data: bytearray, at: int) -> None:
    """The next run of digits becomes another number: what is around it stays valid."""
    digits = b"0123456789.-+e"
    while at < len(data) and data[at] not in digits[:10]:
        at += 1
    end = at
    while end < len(data) and data[end] in digits:
        end += 1
    data[at:end] = draw.choice(NUMBERS)


def made_up(draw: Random, kind: type[Message]) -> Message:
    """A message of that kind that parses; about as often within its limits as not."""
    message = kind()
    density = draw.choice((0.1, 0.3, 0.8))
    for field in kind.DESCRIPTOR.fields:
        if draw.random() < density:
            _fill(draw, message, field)
    return message


def change(draw: Random, message: Message) -> None:
    """One field of it, or of a message in it, is made up anew."""
    field = draw.choice(message.DESCRIPTOR.fields)
    inside = field.message_type is not None and not field.is_repeated and message.HasField(field.name)
    if inside and draw.random() < 0.9:
        change(draw, getattr(message, field.name))
    else:
        message.ClearField(field.name)
        _fill(draw, message, field)


def _fill(draw: Random, message: Message, field: FieldDescriptor) -> None:
    if not field.is_repeated:
        if field.message_type is None:
            setattr(message, field.name, _scalar(draw, field))
        else:
            getattr(message, field.name).CopyFrom(made_up(draw, _class_of(message, field)))
        return
    values = getattr(message, field.name)
    for _ in range(draw.choice((0, 1, 1, 2, 3, 17, 65))):
        if field.message_type is None:
            values.append(_scalar(draw, field))
        else:
            values.add().CopyFrom(made_up(draw, _class_of(message, field)))


def _class_of(message: Message, field: FieldDescriptor) -> type[Message]:
    value = getattr(message, field.name)
    return type(value.add()) if field.is_repeated else type(value)


def _scalar(draw: Random, field: FieldDescriptor) -> Any:
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return draw.choice(TEXTS)
    if field.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return draw.choice(FLOATS) if draw.random() < 0.5 else draw.uniform(0, 3)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return draw.random() < 0.5
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return draw.choice((0, 1, 2, 3, 4, 5, -1, 2**31 - 1))
    return draw.choice(INTEGERS)
