"""Measurements as files, held against the plan, and reported. Those here nobody made: they are invented."""

from __future__ import annotations

import base64
import errno
import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome as Printed
from example_measurements import CARD, HOST, example

from memplan.errors import MemplanError
from memplan.report.verify import html, markdown, verdict
from memplan.verify.compare import compare
from memplan.verify.measurement import Evidence, Measurement, Outcome, OutOfMemory, Run, read, write

# -- files -------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    measured = example()
    path = write(measured, tmp_path / "new")
    assert re.fullmatch(r"20261125T120000_Card-of-a-test_small_qlora_[0-9a-f]{8}\.json", path.name)
    assert read(path) == measured
    assert [file.name for file in (tmp_path / "new").iterdir()] == [path.name]


def test_nothing_is_ever_replaced(tmp_path: Path) -> None:
    path = write(example(), tmp_path)
    before = path.read_bytes()
    with pytest.raises(MemplanError, match="never replaced"):
        write(example(), tmp_path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
    assert write(example(date="2026-11-25T12:00:01+00:00"), tmp_path) != path


def test_a_tape_inside_has_the_bounds_of_one(tmp_path: Path) -> None:
    bomb = base64.b64encode(gzip.compress(b" " * (65 << 20))).decode()
    measured = read(write(example(tape=bomb), tmp_path))
    with pytest.raises(MemplanError, match="larger than 64 MiB, so it is no tape"):
        measured.read_tape()
    path = tmp_path / "lists.json"
    path.write_bytes(b"[" + b"[]," * (1 << 17) + b"1]")
    with pytest.raises(MemplanError, match="more than 131,072 lists and objects, so it is no measurement"):
        read(path)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MemplanError, match=r"can't be written .*: No space left on device"):
        write(example(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    path = write(example(), tmp_path)
    assert read(path) == example()
    with pytest.raises(MemplanError, match="never replaced"):
        write(example(), tmp_path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda d: d.update(format="other"), "is no measurement"),
        (lambda d: d.update(schema_version=2), "of version 2"),
        (lambda d: d.pop("device"), "damaged measurement: device"),
        (lambda d: d["steps"][0].update(allocated_bytes=-1), "steps.0.allocated_bytes"),
        (lambda d: d["recipe"].update(mode="half"), "recipe"),
        (lambda d: d.update(provenance="predicted"), "provenance"),
    ],
)
def test_files_that_are_no_measurements(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], complaint: str
) -> None:
    document = json.loads(example().model_dump_json())
    change(document)
    path = tmp_path / "file.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(MemplanError, match=complaint) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_short(tmp_path: Path) -> None:
    path = write(example(), tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(MemplanError, match="no valid JSON"):
        read(path)


def test_a_damaged_tape_is_found_when_it_is_read() -> None:
    for tape in ("!", "AAAA"):
        with pytest.raises(MemplanError, match="small, qlora, 1 × 64"):
            example(tape=tape).read_tape()


# -- comparison --------------------------------------------------------------------------------------------


def test_errors_in_bytes_and_per_cent() -> None:
    measured = example(excess=1 << 20)
    found = compare(measured)
    assert found.allocated.error == -(1 << 20)
    assert found.allocated.percent == pytest.approx(100 * -(1 << 20) / measured.steps[-1].allocated_bytes)
    assert found.tensors.error == 0  # the events say less than the allocator's counter: block sizes
    assert found.reserved.error == -(1 << 20)
    assert found.on_card.measured == measured.steps[-1].driver_bytes - (100 << 20)  # type: ignore[operator]
    assert found.diff is not None
    assert found.diff.equal
    assert found.reason is None


def test_what_is_reserved_is_simulated() -> None:
    found = compare(example())
    assert found.reserved.error == found.allocated.error == 0
    assert found.reserved.predicted is not None
    assert found.on_card.predicted == found.reserved.predicted + (832 << 20)
    assert found.fits_predicted is True
    assert compare(example(device=HOST)).reserved.predicted is None


def test_a_capped_run_is_simulated_with_its_cap() -> None:
    peak = compare(example()).allocated.predicted
    assert peak is not None
    found = compare(example(run=Run(cap_bytes=peak // 2, cap_name="half")))
    assert found.fits_predicted is False
    # a cap beyond the card is none: set_per_process_memory_fraction(1.0)
    beyond = compare(example(run=Run(cap_bytes=1 << 50, cap_name="all")))
    assert beyond.room == compare(example()).room


def test_a_host_has_no_workspaces() -> None:
    card, host = compare(example()), compare(example(device=HOST))
    assert card.allocated.predicted is not None
    assert host.allocated.predicted == card.allocated.predicted - 2 * 8_519_680
    assert host.fits_predicted is None
    assert "CPU storages" in host.label


def test_the_steady_step_is_not_the_first() -> None:
    measured = example(tape_step=None, tape=None)
    assert measured.steady == measured.steps[2]
    assert measured.model_copy(update={"steps": measured.steps[:1]}).steady is None


def out_of_memory(cap: int) -> Measurement:
    event = OutOfMemory(step=1, phase="forward", requested_bytes=512, allocated_bytes=cap, reserved_bytes=cap)
    return example(
        outcome=Outcome(kind="out of memory", event=event),
        run=Run(cap_bytes=cap, cap_name="small card"),
        steps=(),
        evidence=None,
        tape=None,
        tape_step=None,
    )


def test_out_of_memory_is_a_result() -> None:
    as_planned = compare(out_of_memory(1 << 20))
    assert (as_planned.fits_predicted, as_planned.fits_measured) == (False, False)
    assert verdict(as_planned) == "Out of memory in step 1 (forward), as the plan said."
    surprise = compare(out_of_memory(1 << 32))
    assert surprise.fits_predicted is True
    assert "though the plan said that it fits" in verdict(surprise)


def test_retries_are_said() -> None:
    steps = tuple(step.model_copy(update={"alloc_retries": 2}) for step in example().steps)
    assert any("retry 2 times" in remark for remark in compare(example(steps=steps)).remarks)


def test_a_training_that_does_not_learn_is_doubted() -> None:
    evidence = Evidence(
        first_loss=1.0,
        last_loss=1.0,
        trained_tensors=1,
        changed_tensors=0,
        frozen_tensors=1,
        frozen_changed=1,
        gradients_finite=False,
    )
    assert len(evidence.doubts) == 4
    assert not evidence.real


# -- reports -----------------------------------------------------------------------------------------------


def test_markdown_and_html_have_the_same_numbers() -> None:
    measured = example(excess=4096)
    found = compare(measured)
    number = f"{measured.steps[-1].allocated_bytes:,}"
    for text in (markdown(measured, found), html(measured, found)):
        assert number in text
        assert "-4,096" in text
        assert "4.0000 → 2.0000" in text
    assert "<script" not in html(measured, found)
    assert "http" not in html(measured, found)


def test_html_is_escaped() -> None:
    measured = example(device=CARD.model_copy(update={"name": "<b>card</b>"}))
    assert "<b>card" not in html(measured, compare(measured))


def test_report_without_a_gpu_says_that_measurements_wait(
    tmp_path: Path, memplan: Callable[..., Printed]
) -> None:
    write(example(device=HOST, counted="CPU storages"), tmp_path)
    outcome = memplan("report", tmp_path)
    assert outcome.status == 0
    gpus, hosts = outcome.out.split("## Trained on a CPU")
    assert "No measurement on a GPU is among these" in gpus
    assert "|" not in gpus
    assert "small, qlora" in hosts


def test_report_keeps_cards_and_hosts_apart(tmp_path: Path, memplan: Callable[..., Printed]) -> None:
    write(example(excess=4 << 20), tmp_path)
    write(out_of_memory(1 << 20), tmp_path)
    write(example(device=HOST, counted="CPU storages"), tmp_path)
    outcome = memplan("report", tmp_path)
    gpus, hosts = outcome.out.split("## Trained on a CPU")
    assert "### Card of a test" in gpus
    assert "driver 1.2" in gpus
    assert "out of memory, as predicted (cap: small card)" in gpus
    assert "Worst cases" in gpus
    assert "block sizes only" in gpus
    assert "Worst cases" not in hosts
    rows = json.loads(memplan("report", tmp_path, "--json").out)["measurements"]
    assert len(rows) == 3
    assert all("tape" not in row["measurement"] for row in rows)


def test_report_replaces_what_is_between_its_marks(tmp_path: Path, memplan: Callable[..., Printed]) -> None:
    write(example(), tmp_path / "m")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- measured -->\nold\n<!-- /measured -->\nafter\n", encoding="utf-8")
    outcome = memplan("report", tmp_path / "m", "--into", page)
    assert outcome.status == 0
    assert outcome.out.startswith("wrote the report of 1 measurement into ")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- measured -->\n## Measured on GPUs")
    assert text.endswith("<!-- /measured -->\nafter\n")
    assert "old" not in text
    page.write_text("nothing", encoding="utf-8")
    outcome = memplan("report", tmp_path / "m", "--into", page)
    assert outcome.status == 2
    assert "has no place for it" in outcome.err
    assert page.read_text(encoding="utf-8") == "nothing"


HOSTILE = "A|B `c` <script>x</script>\n\n# <!-- /measured -->\r| --- |\u2028[a](b) **c** __d__ \x1b[2J"


def test_names_stay_text_in_the_report(tmp_path: Path, memplan: Callable[..., Printed]) -> None:
    """Whatever a file of measurements calls its card, model and libraries, the page has the same lines."""
    plain = example(excess=1 << 20, run=Run(cap_bytes=1 << 33, cap_name="cap"))
    hostile = plain.model_copy(
        update={
            "date": HOSTILE,
            "libraries": {HOSTILE: HOSTILE},
            "device": plain.device.model_copy(update={"name": HOSTILE, "driver": HOSTILE}),
            "model": plain.model.model_copy(update={"name": HOSTILE}),
            "run": plain.run.model_copy(update={"cap_name": HOSTILE}),
        }
    )
    pages = []
    for name, measured in (("plain", plain), ("hostile", hostile)):
        write(measured, tmp_path / name)
        page = tmp_path / f"{name}.md"
        page.write_text("<!-- measured -->\n<!-- /measured -->\nafter\n", encoding="utf-8")
        for _ in range(2):  # what is between the marks is found again
            assert memplan("report", tmp_path / name, "--into", page).status == 0
        pages.append(page.read_text(encoding="utf-8"))
    assert list(map(shape, pages[1].splitlines())) == list(map(shape, pages[0].splitlines()))
    assert pages[1].count("<") == pages[1].count("<!-- ") == 2
    assert "### A\\|B \\`c\\` &lt;script>x&lt;/script>␊␊# &lt;!-- /measured -->" in pages[1]
    text = markdown(hostile, compare(hostile))
    assert list(map(shape, text.splitlines())) == list(
        map(shape, markdown(plain, compare(plain)).splitlines())
    )
    assert "<" not in text


def shape(line: str) -> tuple[str, int]:
    """What a line of Markdown is: how it begins, and how many cells it has."""
    start = re.match(r"#+ |\*\*|\| |<!|", line)
    assert start is not None
    return start[0], len(re.findall(r"(?<!\\)\|", line))


def test_report_writes_to_no_other_file(tmp_path: Path, memplan: Callable[..., Printed]) -> None:
    """Not through a link that somebody has put where a temporary file may be, nor in a link's place."""
    victim, page, link = tmp_path / "victim", tmp_path / "real.md", tmp_path / "page.md"
    victim.write_text("precious", encoding="utf-8")
    page.write_bytes(b"before\r\n<!-- measured --><!-- /measured -->\r\nafter\r\n")
    page.chmod(0o600)
    link.symlink_to(page)
    planted = [tmp_path / ".page.md.part", tmp_path / ".real.md.part"]
    for path in planted:
        path.symlink_to(victim)
    (tmp_path / "m").mkdir()
    assert memplan("report", tmp_path / "m", "--into", link).status == 0
    assert victim.read_text(encoding="utf-8") == "precious"
    assert link.is_symlink()
    assert page.stat().st_mode & 0o777 == 0o600
    text = page.read_bytes()
    assert text.startswith(b"before\r\n<!-- measured -->\n## Measured on GPUs")
    assert text.endswith(b"<!-- /measured -->\r\nafter\r\n")
    assert {path.name for path in tmp_path.iterdir()} == {"victim", "real.md", "page.md", "m"} | {
        path.name for path in planted
    }


def test_what_is_in_the_repository_can_be_read_and_is_not_of_a_gpu_nobody_had() -> None:
    from memplan.verify.measurement import read_all

    folder = Path(__file__).parent.parent / "data" / "measurements"
    for path, measured in read_all(folder):
        assert measured.outcome.kind in ("trained", "out of memory", "failed"), path
        assert (measured.counted == "CPU storages") == (measured.device.kind == "cpu"), path
        if measured.tape is not None:
            assert measured.read_tape() is not None
