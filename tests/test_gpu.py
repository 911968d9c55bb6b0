"""Facts about cards, and how they are found by name."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from memplan.asked.gpus import DEFAULT_GPUS, Gpu, find_gpu, largest_gap_mib, load_gpus
from memplan.errors import MemplanError, UnknownName

GPUS = load_gpus()
MIB = 2**20


def by_name(gpu: Gpu) -> str:
    return gpu.name


def test_there_are_enough_cards_of_every_kind_and_vendor() -> None:
    assert len(GPUS) >= 45
    assert {gpu.kind for gpu in GPUS} == {"consumer", "workstation", "datacenter"}
    assert Counter(gpu.vendor for gpu in GPUS)["amd"] >= 6


def test_an_a6000_has_48537_mib_for_pytorch_not_the_49140_of_nvidia_smi() -> None:
    a6000 = find_gpu("a6000")
    assert a6000.total_bytes == 49140 * MIB
    assert a6000.visible_bytes == 48537 * MIB
    assert not a6000.visible_is_estimate


# Totals that Modal's engineers read off nvidia-smi: github.com/modal-labs/modal-client/pull/2797
@pytest.mark.parametrize(
    ("alias", "total_mib"),
    [
        ("h100", 81559),
        ("a100-80", 81920),
        ("a100-40", 40960),
        ("a10", 23028),
        ("l40s", 46068),
        ("l4", 23034),
        ("t4", 15360),
    ],
)
def test_published_nvidia_smi_totals(alias: str, total_mib: int) -> None:
    assert find_gpu(alias).total_mib == total_mib


@pytest.mark.parametrize("gpu", GPUS, ids=by_name)
def test_pytorch_sees_less_than_the_driver_prints(gpu: Gpu) -> None:
    assert 0 < gpu.visible_bytes < gpu.total_bytes


@pytest.mark.parametrize("gpu", GPUS, ids=by_name)
def test_every_number_has_a_source(gpu: Gpu) -> None:
    total, separator, visible = gpu.source.removeprefix("total: ").partition("; visible: ")
    assert total and separator and visible
    assert ("not seen" in visible or "estimated" in visible) == gpu.visible_is_estimate


@pytest.mark.parametrize("gpu", [gpu for gpu in GPUS if gpu.visible_is_estimate], ids=by_name)
def test_an_estimate_hides_as_much_as_the_worst_card_seen(gpu: Gpu) -> None:
    assert gpu.total_bytes - gpu.visible_bytes == largest_gap_mib() * MIB


def test_the_largest_gap_is_that_of_an_a100_80gb() -> None:
    assert largest_gap_mib() == 81920 - 81039


@pytest.mark.parametrize("gpu", GPUS, ids=by_name)
def test_every_name_and_alias_finds_its_own_card(gpu: Gpu) -> None:
    for name in (gpu.name, *gpu.aliases):
        assert find_gpu(name) is gpu


def test_aliases_are_unique() -> None:
    counts = Counter(alias for gpu in GPUS for alias in gpu.aliases)
    assert [alias for alias, count in counts.items() if count > 1] == []


@pytest.mark.parametrize(
    "name", ["NVIDIA RTX A6000", "rtx-a6000", "A6000", "a6000", " RTX_A6000 ", "nvidia_rtx_a6000"]
)
def test_spelling_does_not_matter(name: str) -> None:
    assert find_gpu(name).name == "NVIDIA RTX A6000"


@given(
    st.sampled_from([alias for gpu in GPUS for alias in gpu.aliases]), st.sampled_from(["", " ", "-", "_"])
)
def test_separators_and_case_do_not_matter(alias: str, separator: str) -> None:
    assert find_gpu(alias.replace("-", separator).upper()) is find_gpu(alias)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("GeForce RTX 4090", "4090"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("Tesla V100-SXM2-16GB", "v100-16gb"),
        ("AMD Instinct MI300X", "mi300x"),
        ("Radeon RX 7900 XTX", "7900xtx"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "pro6000"),
    ],
)
def test_names_that_torch_reports_are_found(name: str, expected: str) -> None:
    assert find_gpu(name) is find_gpu(expected)


def test_an_unknown_name_brings_close_ones_and_the_list() -> None:
    with pytest.raises(UnknownName, match=r"a6000.*`memplan gpus`"):
        find_gpu("a6001")


def test_a_suggestion_names_each_card_once() -> None:
    with pytest.raises(UnknownName) as caught:
        find_gpu("rtx5091")
    assert len({find_gpu(alias).name for alias in caught.value.close}) == 3


def test_an_ambiguous_prefix_lists_its_candidates() -> None:
    with pytest.raises(MemplanError, match="could be h100-nvl, h100 or h100-pcie; `memplan gpus`"):
        find_gpu("h10")


def test_a_vague_prefix_stays_one_short_sentence() -> None:
    with pytest.raises(MemplanError, match=r"or \d+ more; `memplan gpus`"):
        find_gpu("NVIDIA RTX")


# Each is the beginning of exactly one known card and the name of another, smaller one.
@pytest.mark.parametrize("name", ["RTX 2080", "RX 7900 XT", "RTX 5070", "RTX 4060 Ti", "MI300"])
def test_a_name_is_never_completed(name: str) -> None:
    with pytest.raises(UnknownName):
        find_gpu(name)


@pytest.mark.parametrize("name", ["", "NVIDIA", "80GB", "48GiB", "gpu"])
def test_a_size_or_a_vendor_is_not_a_card(name: str) -> None:
    with pytest.raises(UnknownName):
        find_gpu(name)


def test_the_default_cards_rise_from_16_to_192_gb() -> None:
    sizes = [find_gpu(alias).visible_bytes for alias in DEFAULT_GPUS]
    assert sizes == sorted(sizes)
    assert sizes[0] < 16 * 2**30 and sizes[-1] > 190 * 2**30
    assert not any(find_gpu(alias).visible_is_estimate for alias in DEFAULT_GPUS)


def test_a_card_cannot_be_changed_or_see_more_than_it_has() -> None:
    a6000, field = find_gpu("a6000"), "total_mib"
    with pytest.raises(ValidationError):
        setattr(a6000, field, 1)
    with pytest.raises(ValidationError, match="less than total_mib"):
        Gpu.model_validate(a6000.model_dump() | {"torch_visible_mib": 49140})


def test_cards_need_no_torch() -> None:
    code = "import sys, memplan.asked.gpus as g; g.find_gpu('a6000'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
