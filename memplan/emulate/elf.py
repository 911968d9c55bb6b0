"""What a shared object asks of others: read from its ELF tables, so that nothing of it is run.

Source: the System V ABI, gabi chapter 5, and "ELF symbol versioning" (Ulrich Drepper); 64 bits,
little-endian, which x86-64 and arm64 Linux both are.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path

_DYNSYM, _DYNAMIC, _VERNEED, _VERSYM = 11, 6, 0x6FFFFFFE, 0x6FFFFFFF
_NEEDED = 1


@dataclass
class Asked:
    """``needed``: names of libraries; ``versions``: by library, the version whose symbols are asked of it;
    ``symbols``: undefined names by their version (None: without one)."""

    needed: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    symbols: dict[str | None, set[str]] = field(default_factory=dict)


def asked(path: Path) -> Asked:
    """What a shared object asks. Raises OSError; ValueError if the file is no such object."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:6] != b"\x7fELF\x02\x01":
            raise ValueError(f"{path.name} is no 64-bit shared object")
        return _Reader(data).asked()


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        offset, size, count = struct.unpack_from("<Q", data, 40)[0], *struct.unpack_from("<HH", data, 58)
        # of each section: type, offset, size, link
        self.sections = [
            (kind, *struct.unpack_from("<QQI", data, offset + number * size + 24))
            for number in range(count)
            for kind in struct.unpack_from("<I", data, offset + number * size + 4)
        ]

    def _section(self, kind: int) -> tuple[int, int, int] | None:
        """Offset, size, and the offset of its strings."""
        for found, offset, size, link in self.sections:
            if found == kind:
                return offset, size, self.sections[link][1]
        return None

    def _text(self, at: int) -> str:
        return self.data[at : self.data.find(b"\0", at)].decode()

    def asked(self) -> Asked:
        result = Asked()
        if (dynamic := self._section(_DYNAMIC)) is not None:
            offset, size, strings = dynamic
            for tag, value in struct.iter_unpack("<QQ", self.data[offset : offset + size]):
                if tag == _NEEDED:
                    result.needed.append(self._text(strings + value))
        versions = self._versions(result)
        table, marks = self._section(_DYNSYM), self._section(_VERSYM)
        if table is None:
            return result
        offset, size, strings = table
        numbers: tuple[int, ...] = ()
        if marks is not None:
            numbers = struct.unpack_from(f"<{marks[1] // 2}H", self.data, marks[0])
        symbols = struct.iter_unpack("<IBBHQQ", self.data[offset : offset + size])
        for number, (name, _info, _other, section, _value, _size) in enumerate(symbols):
            if section == 0 and name:
                version = versions.get(numbers[number] & 0x7FFF) if numbers else None
                result.symbols.setdefault(version, set()).add(self._text(strings + name))
        return result

    def _versions(self, result: Asked) -> dict[int, str]:
        """Names of versions by the numbers that symbols carry."""
        found: dict[int, str] = {}
        needs = self._section(_VERNEED)
        if needs is None:
            return found
        at, _, strings = needs
        while True:
            _version, count, file, first, following = struct.unpack_from("<HHIII", self.data, at)
            entry = at + first
            for _ in range(count):
                _hash, _flags, number, name, next_entry = struct.unpack_from("<IHHII", self.data, entry)
                found[number] = self._text(strings + name)
                result.versions[self._text(strings + file)] = found[number]
                entry += next_entry
            if not following:
                return found
            at += following
