"""Pickles of plain values, read by a machine that knows nothing else.

A pickle is a program for a machine with a stack. Python's own can be kept from calling anything, but not from
what a few bytes make it do: one large index takes 4 GB of memo, a key of tuples of tuples is hashed for ever,
and tuples nested deeply end the interpreter. This one has the instructions that snapshots are written with
(protocol 2 and later), makes nothing that is larger than what the file has of it, and takes neither tuples in
tuples nor keys that are no text.
"""

from __future__ import annotations

import struct
from typing import Any

LONGEST_NUMBER = 16  # bytes; addresses and times have 8
LAST_PROTOCOL = 5

_CALLED = {
    0x52: "a call",  # REDUCE
    0x62: "an object's state",  # BUILD
    0x81: "a call",  # NEWOBJ
    0x92: "a call",  # NEWOBJ_EX
    0x8F: "a set",  # EMPTY_SET
    0x91: "a set",  # FROZENSET
    0x90: "a set",  # ADDITEMS
    0x82: "a class of the extension registry",  # EXT1, EXT2, EXT4
    0x83: "a class of the extension registry",
    0x84: "a class of the extension registry",
    0x96: "a bytearray",  # BYTEARRAY8
    0x97: "a buffer outside",  # NEXT_BUFFER
}
_PLAIN = (int, float, str, bytes, bool, type(None))  # what tuples are of
_CONSTANTS = {0x4E: None, 0x88: True, 0x89: False}  # NONE, NEWTRUE, NEWFALSE
# of texts and bytes: how many bytes tell the length
_TEXTS = {0x8C: 1, 0x58: 4, 0x8D: 8}  # SHORT_BINUNICODE, BINUNICODE, BINUNICODE8
_BYTES = {0x43: 1, 0x42: 4, 0x8E: 8}  # SHORT_BINBYTES, BINBYTES, BINBYTES8


class NotPlain(Exception):
    """The program does more than put plain values together."""


class Damaged(Exception):
    """The program is cut short, or none."""


def read_plain(data: bytes) -> Any:
    """The value that a pickle of lists, dictionaries, tuples, texts and numbers makes.

    Raises NotPlain or Damaged, and never runs anything.
    """
    try:
        return _run(data)
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error):
        raise Damaged from None


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    marked: list[list[Any]] = []  # the stacks below the marks
    memo: dict[int, Any] = {}
    number = int.from_bytes
    at = 0  # past the end of a file that is cut short there is no instruction

    while True:
        code = data[at]
        at += 1
        # in the order of how often they come
        if code == 0x68:  # BINGET
            stack.append(memo[data[at]])
            at += 1
        elif code == 0x6A:  # LONG_BINGET
            stack.append(memo[number(data[at : at + 4], "little")])
            at += 4
        elif code == 0x94:  # MEMOIZE
            memo[len(memo)] = stack[-1]
        elif code == 0x4B:  # BININT1
            stack.append(data[at])
            at += 1
        elif code == 0x4D:  # BININT2
            stack.append(data[at] | data[at + 1] << 8)
            at += 2
        elif code == 0x4A:  # BININT
            stack.append(number(data[at : at + 4], "little", signed=True))
            at += 4
        elif code == 0x8A:  # LONG1
            end = at + 1 + data[at]
            if data[at] > LONGEST_NUMBER:
                raise NotPlain(f"a number of {data[at]} bytes")
            stack.append(number(data[at + 1 : end], "little", signed=True))
            at = end
        elif code == 0x71:  # BINPUT
            memo[data[at]] = stack[-1]
            at += 1
        elif code == 0x72:  # LONG_BINPUT
            memo[number(data[at : at + 4], "little")] = stack[-1]
            at += 4
        elif code == 0x28:  # MARK
            marked.append(stack)
            stack = []
        elif code == 0x75:  # SETITEMS
            items, stack = stack, marked.pop()
            _set(stack[-1], items)
        elif code == 0x7D:  # EMPTY_DICT
            stack.append({})
        elif code == 0x5D:  # EMPTY_LIST
            stack.append([])
        elif code == 0x65:  # APPENDS
            items, stack = stack, marked.pop()
            _list(stack[-1]).extend(items)
        elif code == 0x61:  # APPEND
            item = stack.pop()
            _list(stack[-1]).append(item)
        elif code == 0x73:  # SETITEM
            item, key = stack.pop(), stack.pop()
            _set(stack[-1], [key, item])
        elif code in _TEXTS or code in _BYTES:
            start = at + (_TEXTS.get(code) or _BYTES[code])
            at = start + number(data[at:start], "little")
            part = data[start:at]
            stack.append(part.decode("utf-8", "surrogatepass") if code in _TEXTS else part)
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif 0x85 <= code <= 0x87:  # TUPLE1, TUPLE2, TUPLE3
            length = code - 0x84
            if len(stack) < length:
                raise Damaged
            stack[-length:] = [_tuple(stack[-length:])]
        elif code == 0x74:  # TUPLE
            items, stack = stack, marked.pop()
            stack.append(_tuple(items))
        elif code == 0x29:  # EMPTY_TUPLE
            stack.append(())
        elif code == 0x47:  # BINFLOAT
            stack.append(struct.unpack_from(">d", data, at)[0])
            at += 8
        elif code == 0x95:  # FRAME
            at += 8
        elif code == 0x2E:  # STOP
            return stack.pop()
        elif code == 0x80:  # PROTO
            if data[at] > LAST_PROTOCOL:
                raise Damaged
            at += 1
        else:
            _refuse(code, data, at, stack)


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise Damaged
    return value


def _set(value: Any, items: list[Any]) -> None:
    keys = items[::2]
    if type(value) is not dict or len(items) % 2:
        raise Damaged
    if any(type(key) is not str for key in keys):
        raise NotPlain("a key that is no text")
    value.update(zip(keys, items[1::2], strict=True))


def _tuple(items: list[Any]) -> tuple[Any, ...]:
    if any(type(item) not in _PLAIN for item in items):
        raise NotPlain("a tuple of more than numbers and texts")
    return tuple(items)


def _refuse(code: int, data: bytes, at: int, stack: list[Any]) -> None:
    """Say what an instruction that is not known here would have done."""
    if code == 0x63:  # GLOBAL
        module, name, *_ = data[at : at + 200].decode("utf-8", "replace").split("\n")
        raise NotPlain(f"{module}.{name}")
    if code == 0x93:  # STACK_GLOBAL
        name, module = stack.pop(), stack.pop()
        raise NotPlain(f"{module}.{name}" if type(name) is type(module) is str else "a name")
    if code == 0x51 and stack:  # BINPERSID
        raise NotPlain("a reference to something outside")
    if code in _CALLED:
        raise NotPlain(_CALLED[code])
    raise Damaged
