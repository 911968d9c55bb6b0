"""Facts about cards, and how they are found by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from memplan.asked.gpus import DEFAULT_GPUS, Gpu, find_gpu, largest_gap_mib, load_gpus, of_size, several
from memplan.asked.recipe import Recipe
from memplan.device import driver
from memplan.device.driver import Installed
from memplan.device.here import find_cards
from memplan.errors import MemplanError, UnknownName
from memplan.planning.cards import remark

GPUS = load_gpus()
MIB = 2**20


def by_name(gpu: Gpu) -> str:
    return gpu.name


def test_there_are_enough_cards_of_every_kind_and_vendor() -> None:
    assert len(GPUS) >= 90
    assert {gpu.kind for gpu in GPUS} == {"consumer", "workstation", "datacenter", "slice", "shared"}
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
def test_an_estimate_hides_as_much_as_the_worst_card_seen_that_is_no_larger(gpu: Gpu) -> None:
    hidden = [
        other.total_bytes - other.visible_bytes
        for other in GPUS
        if other.total_mib <= max(gpu.total_mib, 8192)
        and not other.visible_is_estimate
        and other.kind not in ("slice", "shared")
    ]
    assert gpu.total_bytes - gpu.visible_bytes == max(hidden)


def test_larger_cards_hide_more() -> None:
    gaps = [largest_gap_mib(gib << 10) for gib in (1, 8, 16, 24, 80, 288)]
    assert gaps == sorted(gaps)
    assert gaps[1] == 8192 - 7753  # an RTX 3070
    assert gaps[4] == 81920 - 81039  # an A100


@pytest.mark.parametrize("gpu", GPUS, ids=by_name)
def test_a_card_has_about_the_memory_that_it_is_sold_with(gpu: Gpu) -> None:
    assert 0.9 * gpu.gb <= gpu.total_mib / 1024 <= 1.04 * gpu.gb


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
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", "h100-3g.40gb"),
        ("NVIDIA A100 80GB PCIe MIG 1g.10gb", "a100-1g.10gb"),
        ("NVIDIA GB10", "DGX Spark"),
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
@pytest.mark.parametrize("name", ["RTX 2080", "RX 7900 XT", "MI300"])
def test_a_name_is_never_completed(name: str) -> None:
    with pytest.raises(UnknownName):
        find_gpu(name)


def test_one_name_of_two_sizes_asks_which() -> None:
    with pytest.raises(MemplanError, match="could be 4060ti-16gb or 4060ti-8gb"):
        find_gpu("RTX 4060 Ti")


@pytest.mark.parametrize("name", ["", "NVIDIA", "gpu", "1080", "5091"])
def test_a_vendor_or_a_number_is_not_a_card(name: str) -> None:
    with pytest.raises(UnknownName):
        find_gpu(name)


# -- sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["24GB", "24", "24 gb", "24GiB", "24g", " 24 GB ", "24 GB card"])
def test_a_size_is_the_least_card_of_it(name: str) -> None:
    card = find_gpu(name)
    assert card.name == "24 GB card"
    assert card.visible_bytes == find_gpu("a10").visible_bytes
    assert card.assumed is not None
    assert "taken as the NVIDIA A10," in card.assumed and "`memplan gpus 24GB`" in card.assumed
    assert find_gpu(card.name) == card


@pytest.mark.parametrize("size", [8, 10, 11, 12, 16, 20, 23, 24, 32, 40, 48, 80, 96, 141, 180, 192, 288])
def test_a_size_promises_no_more_than_any_card_of_it_has(size: int) -> None:
    card = find_gpu(f"{size}GB")
    assert card.assumed and card.capability is not None and card.capability >= (8, 0)
    assert 0 < card.visible_bytes < card.total_bytes <= size << 30
    for gpu in of_size(size):
        if gpu.capability and gpu.capability >= (8, 0) and gpu.kind not in ("slice", "shared"):
            assert gpu.visible_is_estimate or card.visible_bytes <= gpu.visible_bytes


@pytest.mark.parametrize("name", ["0", "0GB", "-24GB", "-8", "0.5GB", "513GB", "999999999GB", "780"])
def test_a_size_that_no_card_has_is_said_to_be(name: str) -> None:
    with pytest.raises(MemplanError, match=f"a card has from 1 to 512 GB, not {name}$"):
        find_gpu(name)


@pytest.mark.parametrize("name", ["1e9GB", "24MB", "24 TB", "infGB", "nanGB", "1.2.3GB"])
def test_a_size_in_other_words_is_no_card_misspelt(name: str) -> None:
    with pytest.raises(MemplanError, match=f"a card has from 1 to 512 GB, written like 24GB, not {name}$"):
        find_gpu(name)


def test_cards_are_named_one_at_a_time() -> None:
    with pytest.raises(MemplanError, match="one card at a time, not '4090,a6000': give it for each"):
        find_gpu("4090,a6000")


@given(st.text(max_size=12) | st.from_regex(r"[0-9.x -]{1,6}(gb|GiB|xa100)?", fullmatch=True))
def test_any_text_is_a_card_or_a_memplan_error(text: str) -> None:
    try:
        said = find_gpu(text).name
    except MemplanError as error:
        said = str(error)
    assert said and "\n" not in said.replace(text, "")


# -- several cards, and those of this machine ------------------------------------------------------------


@pytest.mark.parametrize("name", ["2xA100", "2 x a100", "a100 x2", "2×a100", "2*a100"])
def test_several_cards_are_the_card_and_a_number(name: str) -> None:
    assert find_gpu(name) is find_gpu("a100")
    assert several(name) == 2
    assert several("a100") == several("24GB") == 1


def test_one_of_a_card_is_the_card_and_none_of_it_is_no_card() -> None:
    assert find_gpu("1xh100") is find_gpu("h100")
    with pytest.raises(MemplanError, match="0xa100 is no card"):
        find_gpu("0xa100")
    with pytest.raises(UnknownName):
        find_gpu("2xnothing")
    assert find_gpu("rx 7900 xtx").name == "AMD Radeon RX 7900 XTX"


def test_auto_is_what_the_driver_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {
        "NVIDIA RTX A6000": Installed(48 << 30, (8, 6)),
        "NVIDIA GeForce RTX 5060 Ti": Installed(15_900 * MIB, (12, 0)),
        "NVIDIA Next 1": Installed(500 << 30, (13, 0)),
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb": Installed(39 << 30, (9, 0)),
    }
    monkeypatch.setattr(driver, "installed", lambda: here)
    cards = find_cards("auto")
    assert [card.name for card in cards] == sorted(here, key=lambda name: here[name].nbytes)
    assert [card.gb for card in cards] == [16, 40, 48, 500]
    assert cards[-1].capability == (13, 0)
    assert cards[-1].visible_bytes == 500 << 30


def test_auto_without_a_card_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, memplan: Callable[..., Outcome]
) -> None:
    monkeypatch.setattr(driver, "installed", dict)
    outcome = memplan("fit", "llama-3.2-1b", "--gpu", "auto")
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "NVIDIA's driver shows none here: name a card" in outcome.err


def test_of_a_size_it_is_said_on_which_cards_a_run_gets_through(memplan: Callable[..., Outcome]) -> None:
    """The run needs 45.3 GiB: more than an L40S has, less than an RTX A6000."""
    asked = ["llama-3.2-1b", "--mode", "full", "--loss", "standard", "--seq-len", "16000"]
    fit = verdict_of(memplan, asked, "48GB")
    assert fit["gets_through_on"]
    for name in ("NVIDIA RTX A6000", "NVIDIA L40S"):
        alone = verdict_of(memplan, asked, name)
        assert (alone["verdict"] != "does not fit") == (name in fit["gets_through_on"])
        assert alone["gets_through_on"] == []
    said = " ".join(memplan("fit", *asked, "--gpu", "48GB").out.split())
    assert said.startswith("48 GB card: depends on which, ")
    assert "gets through on an " in said and "RTX A6000" in said.partition("It ")[0]


def verdict_of(memplan: Callable[..., Outcome], asked: list[str], gpu: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(memplan("fit", *asked, "--gpu", gpu, "--json", "--no-advise").out)[
        "fits"
    ][0]
    return found


# -- what a verdict has to say ---------------------------------------------------------------------------


def test_what_a_card_lacks_is_said_with_what_torch_does() -> None:
    bf16, fp16 = Recipe(dtype="bfloat16", compute_dtype="bfloat16"), Recipe(trainer="peft", dtype="float16")
    assert remark(find_gpu("t4"), bf16) == (
        "has no FlashAttention and no bf16, which PyTorch emulates there, slowly (--dtype fp16 is fast)"
    )
    assert remark(find_gpu("t4"), fp16) == "has no FlashAttention"
    assert "CUDA 12.6" in str(remark(find_gpu("p40"), fp16))
    assert "CUDA 12.6" in str(remark(find_gpu("v100"), bf16))
    assert "the host's, too" in str(remark(find_gpu("dgx-spark"), bf16))
    for name in ("3060", "a100", "mi300x"):
        assert remark(find_gpu(name), bf16) is None
    assert remark(find_gpu("h100-3g-40gb"), bf16, named=False) is None


@pytest.mark.parametrize("command", ["plan", "fit", "frontier", "compare"])
def test_it_is_said_wherever_a_card_is_judged(
    command: str, memplan: Callable[..., Outcome], tmp_path: Path
) -> None:
    outcome = memplan(command, "llama-3.2-1b", "--gpu", "t4")
    assert "Tesla T4: " in outcome.out
    page = tmp_path / "page.html"
    memplan("plan", "smollm2-135m", "--gpu", "t4", "--html", page)
    assert "Tesla T4: has no FlashAttention and no bf16" in page.read_text()
    assert "no FlashAttention and no bf16" in " ".join(outcome.out.split())
    verbose = ("--verbose",) if command == "plan" else ()
    told = memplan(command, "smollm2-135m", "--gpu", "24GB", *verbose).out
    assert "the least of this size" in " ".join(told.split())


def test_cards_of_a_size_are_listed(memplan: Callable[..., Outcome]) -> None:
    found = json.loads(memplan("gpus", "24GB", "--json").out)["gpus"]
    assert {card["gb"] for card in found} == {24}
    assert {"a10", "l4", "4090", "3090", "3090ti", "p40", "7900xtx"} <= {card["aliases"][0] for card in found}
    assert memplan("gpus", "24").out == memplan("gpus", "24GiB").out
    assert memplan("gpus", "4060").out.count("RTX 4060") == 3
    for wrong in ("0GB", "-8", "23GB", "nothing"):
        outcome = memplan("gpus", wrong) if wrong != "-8" else memplan("gpus", "--", wrong)
        assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1)


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
