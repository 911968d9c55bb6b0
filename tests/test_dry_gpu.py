"""The card that is not there: its memory is counted, and that is never called a measurement."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from example_measurements import CARD, example

from memplan.asked.gpus import find_gpu
from memplan.cuda.card import Card
from memplan.emulate.cards import DRY, MULTIPROCESSORS, SHARED_KIB, description
from memplan.errors import MemplanError
from memplan.verify.measurement import write

ROOT = Path(__file__).parent.parent
GIB, MIB = 1 << 30, 1 << 20


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc")
    library = tmp_path / "card.so"
    source = ROOT / "memplan" / "emulate" / "card" / "card.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Werror", source, "-o", library], check=True)
    monkeypatch.setenv("MEMPLAN_CARD", f"2:{80 * GIB}:0:9:0:132:232448:{DRY}H100")
    loaded = ctypes.CDLL(str(library))
    loaded.card_take.argtypes = loaded.card_give.argtypes = [ctypes.c_size_t, ctypes.c_int]
    loaded.card_of.argtypes = [ctypes.c_void_p]
    loaded.card_used.restype = ctypes.c_size_t
    loaded.card_addresses.argtypes, loaded.card_addresses.restype = [ctypes.c_size_t], ctypes.c_void_p
    loaded.card_map.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    loaded.card_addresses_back.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    loaded.card_has.argtypes = [ctypes.c_void_p]
    loaded.card_copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    return loaded


def test_it_hands_out_what_it_has_and_no_more(card: ctypes.CDLL) -> None:
    assert card.card_take(79 * GIB, 0) == 0
    assert card.card_take(2 * GIB, 0) == 1
    assert card.card_used() == 79 * GIB
    card.card_give(79 * GIB, 0)
    assert card.card_take(80 * GIB, 0) == 0


@pytest.mark.parametrize("way", ["up", "down"])
def test_addresses_go_one_way(card: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """A range of whole pages above the last or below it, none of them over another."""
    monkeypatch.setenv("MEMPLAN_CARD_ADDRESSES", way)
    first, second, third = (card.card_addresses(size) for size in (1, 3 << 20, 2 << 20))
    steps = [second - first, third - second]
    assert steps == ([2 << 20, 4 << 20] if way == "up" else [-(4 << 20), -(2 << 20)])
    assert card.card_has(first) and card.card_has(third)


def test_cards_have_memory_and_addresses_of_their_own(card: ctypes.CDLL) -> None:
    assert card.card_take(79 * GIB, 0) == 0
    assert card.card_select(1) == 0
    assert card.card_used() == 0
    assert card.card_take(79 * GIB, 1) == 0
    there = card.card_addresses(GIB)
    assert card.card_select(0) == 0
    here = card.card_addresses(GIB)
    assert (card.card_of(there), card.card_of(here)) == (1, 0)
    assert card.card_select(2) == 1
    assert card.card_current() == 0


def test_addresses_are_used_again_where_no_others_are_left(card: ctypes.CDLL) -> None:
    size = 1024 * GIB
    taken = []
    while (at := card.card_addresses(size)) is not None:
        taken.append(at)
    assert len(taken) > 2 and len(set(taken)) == len(taken)
    for at in (taken[1], taken[0]):
        card.card_addresses_back(at, size)
    whole = card.card_addresses(2 * size)  # two neighbours are one range
    assert whole == min(taken[:2])
    assert card.card_addresses(size) is None


@pytest.mark.parametrize(
    ("told", "seen"), [("1", 1), ("0,1", 2), ("", 0), ("-1", 0), ("1,7", 1), ("GPU-8f6d2f5c,0", 2)]
)
def test_cards_that_a_program_is_to_see(
    card: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, told: str, seen: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
    ask = f"import ctypes; print(*map(ctypes.CDLL({card._name!r}).card_select, range(3)))"
    done = subprocess.run([sys.executable, "-c", ask], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["0"] * seen + ["1"] * (3 - seen)


def test_its_pages_exist_once_they_are_written(card: ctypes.CDLL) -> None:
    at = card.card_addresses(64 * GIB)  # more than this machine has
    assert card.card_map(at, 64 * GIB, 1) == 0
    assert card.card_has(at) and not card.card_has(id(card))
    sent, back = ctypes.create_string_buffer(b"ids and labels"), ctypes.create_string_buffer(15)
    card.card_copy(at, sent, 15)
    card.card_copy(back, at, 15)
    assert back.value == b"ids and labels"


def test_a_card_is_described_as_the_table_has_it() -> None:
    told = description(find_gpu("h200"), taken=MIB, count=4)
    count, total, taken, major, minor, multiprocessors, shared, name = told.split(":")
    assert (count, taken, major, minor, multiprocessors, shared) == ("4", str(MIB), "9", "0", "132", "232448")
    assert name == f"{DRY}NVIDIA H200"
    assert int(total) > 139 * GIB


def test_a_card_s_own_facts_and_the_plan_s_are_the_same() -> None:
    for name in (
        "Tesla T4",
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA RTX A6000",
        "NVIDIA H100 80GB HBM3",
        "NVIDIA B200",
    ):
        assert Card(find_gpu(name).capability).multiprocessors == MULTIPROCESSORS[name]
    for capability, kib in SHARED_KIB.items():
        assert Card(capability).shared_memory == kib << 10


def test_what_it_shows_is_no_measurement(tmp_path: Path) -> None:
    assert example().label == "measured"
    dry = example(device=CARD.model_copy(update={"name": f"{DRY}NVIDIA H200"}))
    assert dry.label == "emulated, no GPU"
    with pytest.raises(MemplanError, match="no measurement"):
        write(dry, tmp_path / "measurements")
    assert not (tmp_path / "measurements").exists()
    assert write(dry, tmp_path / "emulated").is_file()
