"""``PYTORCH_ALLOC_CONF``: the caching allocator's settings, parsed as PyTorch parses them.

Source: ``AcceleratorAllocatorConfig::parseArgs`` (c10/core/AllocatorConfig.cpp, torch 2.13) and
``CUDAAllocatorConfig`` (c10/cuda/CUDAAllocatorConfig.cpp). tests/test_allocator_settings.py asks PyTorch's
own parser, which CPU builds have too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from memplan.errors import MemplanError, UnknownName

MIB = 1 << 20
_INTERVALS = 16  # powers of two from 1 MiB to 64 GiB (kRoundUpPowerOfTwoIntervals)
_LARGEST = 1 << 44

# Options that say nothing about device memory: known, and passed over.
_IGNORED = frozenset(
    (
        "release_lock_on_cudamalloc",
        "release_lock_on_hipmalloc",
        "pinned_use_cuda_host_register",
        "pinned_use_hip_host_register",
        "pinned_num_register_threads",
        "pinned_use_background_threads",
        "pinned_max_round_threshold_mb",
        "pinned_max_cached_size_mb",
        "pinned_reserve_segment_size_mb",
        "graph_capture_record_stream_reuse",
        "pinned_free_catch_all",
        "throw_on_cudamalloc_oom",
    )
)
_BYTES = ("max_split_size_mb", "max_non_split_rounding_mb", "large_segment_size_mb")
KNOWN = (
    *_BYTES,
    "garbage_collection_threshold",
    "roundup_power2_divisions",
    "expandable_segments",
    "per_process_memory_fraction",
    "backend",
)


@dataclass(frozen=True, slots=True)
class AllocatorSettings:
    """Bytes; ``max_split_size`` of 0: no limit. ``roundup`` holds a divisor for each power of two from
    1 MiB on, 0 or 1 for none. ``memory_fraction``: as ``set_per_process_memory_fraction``, if given."""

    max_split_size: int = 0
    max_non_split_rounding: int = 20 * MIB
    large_segment_size: int = 20 * MIB
    garbage_collection_threshold: float = 0.0
    roundup: tuple[int, ...] = ()
    expandable_segments: bool = False
    memory_fraction: float | None = None

    def limit(self, total: int) -> int | None:
        """What may be reserved of a card of ``total`` bytes; None: all that the driver gives."""
        return None if self.memory_fraction is None else int(self.memory_fraction * total)

    def divisions(self, size: int) -> int:
        """The divisor for a request of ``size`` bytes."""
        if not self.roundup:
            return 0
        return self.roundup[min(max(size.bit_length() - 21, 0), _INTERVALS - 1)]


def parse_settings(text: str) -> AllocatorSettings:
    """The settings that ``PYTORCH_ALLOC_CONF=text`` makes. Raises MemplanError with what is wrong."""
    values: dict[str, object] = {}
    for name, value in _options(text):
        if name == "expandable_segments":
            values[name] = _boolean(name, value)
        elif name == "garbage_collection_threshold":
            values[name] = _share(name, value)
        elif name == "per_process_memory_fraction":
            values["memory_fraction"] = _share(name, value, whole=True)
        elif name == "roundup_power2_divisions":
            values["roundup"] = _divisions(name, value)
        elif name in _BYTES:
            values[name.removesuffix("_mb")] = _mebibytes(name, value)
        elif name == "backend":
            if value != "native":
                raise MemplanError(
                    f"allocator setting backend:{value}: memplan simulates PyTorch's own allocator, native"
                )
        elif name not in _IGNORED:
            raise UnknownName("allocator setting", name, [*KNOWN, *_IGNORED])
    settings = AllocatorSettings(**values)  # type: ignore[arg-type]
    for name in ("max_split_size", "max_non_split_rounding"):
        if name in values and getattr(settings, name) < settings.large_segment_size:
            raise MemplanError(
                f"allocator setting {name}_mb: {getattr(settings, name) // MIB} is too small, PyTorch wants "
                f"at least {settings.large_segment_size // MIB} (large_segment_size_mb)"
            )
    return settings


def _options(text: str) -> list[tuple[str, str]]:
    """``a:1,b:[2:3,>:4]`` as pairs. White space means nothing."""
    text = re.sub(r"\s", "", text)
    pairs = []
    position = 0
    option = re.compile(r"([^:,\[\]]+):(\[[^\]]*\]|[^:,\[\]]+)(,|$)")
    while position < len(text):
        match = option.match(text, position)
        if match is None:
            raise MemplanError(
                f"the allocator settings {text[:80]!r} can't be read from {text[position : position + 40]!r} "
                "on: write key:value pairs with commas between them, such as "
                "expandable_segments:True,max_split_size_mb:512"
            )
        pairs.append((match[1], match[2]))
        position = match.end()
    return pairs


def _boolean(name: str, value: str) -> bool:
    if value not in ("True", "False"):
        raise MemplanError(f"allocator setting {name}:{value}: it is True or False, spelled so")
    return value == "True"


def _whole(name: str, value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", value):
        raise MemplanError(f"allocator setting {name}: {value!r} is no whole number")
    return int(value)


def _mebibytes(name: str, value: str) -> int:
    number = _whole(name, value)
    if name == "large_segment_size_mb" and number <= 10:
        raise MemplanError(f"allocator setting {name}:{value} is too small: PyTorch wants more than 10")
    return min(number * MIB, _LARGEST)


def _share(name: str, value: str, *, whole: bool = False) -> float:
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not (0 < share < 1 or (whole and share == 1)):
        raise MemplanError(f"allocator setting {name}:{value}: it is a share between 0 and 1, such as 0.8")
    return share


def _divisions(name: str, value: str) -> tuple[int, ...]:
    if not value.startswith("["):
        return (_power(name, value),) * _INTERVALS
    divisors = [0] * _INTERVALS
    first, last = True, 0
    for pair in value[1:-1].split(","):
        size, colon, divisor_text = pair.partition(":")
        if not colon:
            raise MemplanError(
                f"allocator setting {name}:{value}: write size:divisions pairs, such as [256:1,512:2,>:4]"
            )
        divisor = 0 if divisor_text == "0" else _power(name, divisor_text)
        if size == ">":  # from the last one named on, itself included, as PyTorch has it
            divisors[last:] = [divisor] * (_INTERVALS - last)
            continue
        at = min(_power(name, size).bit_length() - 1, _INTERVALS - 1)
        if first:
            divisors[:at] = [divisor] * at
            first = False
        divisors[at] = divisor
        last = at
    return tuple(divisors)


def _power(name: str, value: str) -> int:
    number = _whole(name, value)
    if number < 1 or number & (number - 1):
        raise MemplanError(f"allocator setting {name}: {value} is no power of two")
    return number
