"""The cards of this machine, with a driver that a C compiler makes for the occasion."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from memplan import Recipe, plan
from memplan.device import driver

SOURCE = r"""
#include <stddef.h>
#include <string.h>
int cuInit(unsigned flags) { return %(broken)d; }
int cuDeviceGetCount(int *count) { *count = 3; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal + 7; return 0; }
int cuDeviceGetName(char *name, int length, int device) {
    strncpy(name, device == 9 ? "NVIDIA RTX A6000" : "NVIDIA L4", length);
    return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)(device + 40) << 30; return 0; }
"""


def library(folder: Path, broken: int = 0) -> ctypes.CDLL:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    source, target = folder / "cuda.c", folder / "cuda.so"
    source.write_text(SOURCE % {"broken": broken})
    subprocess.run([compiler, "-shared", "-fPIC", "-o", target, source], check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture(autouse=True)
def _fresh() -> None:
    driver.present.cache_clear()


def test_without_a_driver_there_are_no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_library", lambda: None)
    assert driver.present() == {}


def test_of_cards_alike_the_smallest_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_library", lambda: library(tmp_path))
    assert driver.present() == {"NVIDIA L4": 47 << 30, "NVIDIA RTX A6000": 49 << 30}


def test_a_driver_that_does_not_start_has_no_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_library", lambda: library(tmp_path, broken=999))
    assert driver.present() == {}


def test_a_card_that_is_here_is_as_large_as_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    question = ("llama-3.2-1b", Recipe(trainer="peft", mode="lora"))
    listed = plan(*question, gpus=["a6000"]).fits[0].total_bytes
    monkeypatch.setattr(driver, "present", lambda: {"NVIDIA RTX A6000": 40 << 30})
    assert plan(*question, gpus=["a6000"]).fits[0].total_bytes == 40 << 30 != listed
