"""The wheel: built, installed away from the checkout, and run there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the installed wheel."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, ROOT], check=True)
    (wheel,) = wheels.glob("memplan-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    return target


def run(site: Path, *arguments: str) -> str:
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=site.parent,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.slow
def test_data_is_found_in_an_installed_wheel(site: Path) -> None:
    code = "from memplan.resources import data_file; print(data_file('model_specs.json').parent)"
    assert run(site, "-c", code).strip() == str(site / "memplan" / "data")
    assert {path.name for path in (site / "memplan" / "data").iterdir()} == {"model_specs.json", "gpus.json"}


@pytest.mark.slow
def test_an_installed_wheel_plans(site: Path) -> None:
    answer = run(site, "-m", "memplan", "llama-70b", "--mode", "qlora", "--r", "8")
    assert "GiB allocated (predicted)" in answer


@pytest.mark.slow
def test_an_installed_wheel_draws(site: Path) -> None:
    page = site.parent / "page.html"
    run(site, "-m", "memplan", "llama-3.2-1b", "--html", str(page))
    assert "uPlot" in page.read_text(encoding="utf-8")
    assert (site / "memplan" / "report" / "assets" / "uplot" / "LICENSE").is_file()
    (metadata,) = site.glob("memplan-*.dist-info")
    assert list((metadata / "licenses").rglob("uplot/LICENSE"))


@pytest.mark.slow
def test_a_wheel_says_that_it_is_typed(site: Path) -> None:
    assert (site / "memplan" / "py.typed").exists()


@pytest.mark.slow
def test_a_wheel_has_the_kernels_under_a_name_of_its_own(site: Path) -> None:
    code = "from memplan.kernels import strips; print(strips.__file__)"
    assert run(site, "-c", code).strip() == str(site / "memplan" / "kernels" / "strips.py")
    assert {path.name for path in (site / "memplan" / "kernels").glob("*.py")} == {
        "__init__.py", *(path.name for path in (ROOT / "kernels").glob("*.py"))
    }  # fmt: skip
    assert not (site / "kernels").exists()
