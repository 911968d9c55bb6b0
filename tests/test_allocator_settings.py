"""PYTORCH_ALLOC_CONF, read as PyTorch reads it: CPU builds of torch have its parser too."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.asked.alloc_conf import AllocatorSettings, parse_settings
from memplan.errors import MemplanError

MIB = 1 << 20
GOOD = [
    "",
    "max_split_size_mb:20",
    "max_split_size_mb:512,expandable_segments:True",
    "large_segment_size_mb:33,max_non_split_rounding_mb:40",
    "garbage_collection_threshold:0.8",
    "roundup_power2_divisions:8",
    "roundup_power2_divisions:[256:1,512:2,>:4]",
    "roundup_power2_divisions:[>:4]",
    " expandable_segments : False , max_split_size_mb : 64 ",
    "pinned_use_background_threads:True",
]
BAD = [
    ("max_split_size_mb:19", "too small"),
    ("large_segment_size_mb:10", "more than 10"),
    ("large_segment_size_mb:33,max_split_size_mb:20", "at least 33"),
    ("garbage_collection_threshold:1", "between 0 and 1"),
    ("garbage_collection_threshold:0", "between 0 and 1"),
    ("roundup_power2_divisions:3", "power of two"),
    ("roundup_power2_divisions:[300:2]", "power of two"),
    ("expandable_segments:true", "True or False"),
    ("expandable_segments True", "key:value"),
    ("max_split_size_mb:abc", "whole number"),
    ("max_split_size_mb", "key:value"),
]


@pytest.mark.parametrize("text", GOOD)
def test_what_is_read_pytorch_reads(text: str) -> None:
    parse_settings(text)
    assert _pytorch(text) is None


@pytest.mark.parametrize(("text", "why"), BAD)
def test_what_is_refused_pytorch_refuses(text: str, why: str) -> None:
    with pytest.raises(MemplanError, match=why):
        parse_settings(text)
    assert _pytorch(text) is not None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("expandable_segment:True", "did you mean expandable_segments"),
        ("backend:cudaMallocAsync", "PyTorch's own allocator"),
        ("per_process_memory_fraction:1.5", "between 0 and 1"),
    ],
)
def test_what_pytorch_refuses_on_a_gpu_only(text: str, why: str) -> None:
    with pytest.raises(MemplanError, match=why):
        parse_settings(text)


@given(st.text(alphabet="abmxs_:,[]0123456789.>TrueFals ", max_size=60))
def test_anything_else_is_settings_or_one_sentence(text: str) -> None:
    with suppress(MemplanError):
        assert isinstance(parse_settings(text), AllocatorSettings)


def test_units() -> None:
    read = parse_settings("max_split_size_mb:128,roundup_power2_divisions:[256:1,512:2,1024:4,>:8]")
    assert read.max_split_size == 128 * MIB
    # ">" fills from the last interval named, not from the one after it (parseRoundUpPower2Divisions)
    assert [read.divisions(size * MIB) for size in (1, 255, 256, 600, 1024, 4096)] == [1, 1, 1, 2, 8, 8]
    assert parse_settings("roundup_power2_divisions:[256:0]").divisions(512 * MIB) == 0


def _pytorch(text: str) -> str | None:
    """What PyTorch complains of, None if nothing."""
    torch = pytest.importorskip("torch")
    try:
        torch._C._accelerator_setAllocatorSettings(text)
    except (ValueError, RuntimeError) as error:
        return str(error)
    finally:
        torch._C._accelerator_setAllocatorSettings("")
    return None
