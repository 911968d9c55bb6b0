"""Changes of values and bytes that stay near the valid, and the way back to smaller ones."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from random import Random
from typing import Any

NUMBERS = (0, -1, 1, 2, 3, 7, 64, 1000, 1 << 16, 1 << 24, (1 << 24) + 1, (1 << 31) - 1, 1 << 31, 1 << 32,
           1 << 40, (1 << 63) - 1, 1 << 63, 1 << 64, 10**15, 10**400, -(1 << 63), 0.5, 1.5, -0.0, 1e-320,
           1e308, math.inf, -math.inf, math.nan)  # fmt: skip
ESCAPES = ("\x1b[31mred", "\x1b]0;title\x07", "\x9b2J", "\r\n", "\0", "\x7f")
MARKUP = ("<script>alert(1)</script>", "<!-- /measured -->", "\n# heading\n", "| a | b |", "[bold]x[/bold]")
TEXTS = (*ESCAPES, *MARKUP, "", " ", "x", "a\nb", "\ud800", "\udcff", "\u202eabc", "é" * 50, "9" * 400,
         "A" * 10_000, "../../x", "~nobody", "/dev/null", "-1", "nan", "true", "None", "%s%n", "{0}",
         "٣")  # fmt: skip


def odd(random: Random) -> Any:
    """A value that is rarely the right one."""
    return random.choice(
        (
            lambda: random.choice(NUMBERS),
            lambda: random.choice(TEXTS),
            lambda: random.choice((None, True, False)),
            lambda: random.choice(
                ([], {}, [[]], [None], {"": None}, [0] * 1000, ["x"] * 300, {"a": {"b": []}})
            ),
            lambda: nested(random.choice((3, 60, 150))),
        )
    )()


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def mutated(random: Random, value: Any) -> Any:
    """The same JSON value with one change somewhere: a value, a key or an element."""
    if isinstance(value, dict | list) and value and random.random() < 0.95:
        key = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
        copy = value.copy()
        kind = random.random()
        if kind < 0.12:
            del copy[key]
        elif kind < 0.2 and isinstance(copy, list):
            copy[key:key] = [copy[key]] * random.choice((1, 2, 1000))
        elif kind < 0.2:
            copy[random.choice((f"{key}_", *TEXTS))] = copy[key]
        elif kind < 0.25:
            copy[key] = copy[random.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))]
        else:
            copy[key] = mutated(random, value[key])
        return copy
    if isinstance(value, int | float) and not isinstance(value, bool) and random.random() < 0.6:
        return random.choice(
            (value + 1, value - 1, value * 2, value // 2, -value, value * 1000, str(value), [value])
        )
    if isinstance(value, str) and random.random() < 0.4:
        return random.choice((value + random.choice(TEXTS), value.upper(), value[:-1], value[::-1], [value]))
    return odd(random)


def often(random: Random, value: Any, most: int = 4) -> Any:
    """Some changes, rarely none."""
    for _ in range(random.choice((0, *range(1, most + 1), 1, 1))):
        value = mutated(random, value)
    return value


def flipped(random: Random, content: bytes) -> bytes:
    """The same bytes with some cut off, changed, taken out, or put in."""
    content = bytearray(content)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(content) + 1)
        match random.randrange(6):
            case 0:
                del content[at:]
            case 1 if content:
                content[at % len(content)] = random.randrange(256)
            case 2:
                del content[at : at + random.choice((1, 2, 30))]
            case 3:
                content[at:at] = random.choice(
                    (b"9" * 5000, b"[" * 3000, b"{", b'"', b"\0", b"\xff", b"\x1b[2J", b"-", b"NaN")
                )
            case 4:
                content[at:at] = content[at : at + random.choice((1, 10, 200))] * random.choice((1, 5))
            case _:
                content[at : at + 8] = random.randbytes(8)
    return bytes(content)


def encoded(value: Any) -> bytes:
    """A file's content: bytes as they are, anything else as JSON."""
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def smaller(value: Any) -> Iterator[Any]:
    """Simpler values, the simplest first."""
    match value:
        case dict():
            keys = list(value)
            for size in _sizes(len(keys)):
                for start in range(0, len(keys), size):
                    yield {key: value[key] for key in keys if key not in keys[start : start + size]}
            for key in keys:
                yield from ({**value, key: less} for less in smaller(value[key]))
        case list() | tuple() | str() | bytes():
            for size in _sizes(len(value)):
                for start in range(0, len(value), size):
                    yield value[:start] + value[start + size :]
            if isinstance(value, list):
                for number, item in enumerate(value):
                    yield from ([*value[:number], less, *value[number + 1 :]] for less in smaller(item))
        case bool() | None:
            pass
        case int() if abs(value) > 1:
            yield from (0, 1, value // 1000, value // 2)
        case float() if math.isfinite(value) and value != int(value):
            yield int(value)


def _sizes(length: int) -> Iterator[int]:
    while length:
        yield length
        length //= 2
