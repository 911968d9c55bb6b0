"""The page: complete in itself, true to the tape, and safe whatever a config calls itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from example_plans import example_advice, example_plan
from example_tapes import example_tape
from small_specs import SPECS

from memplan.asked.recipe import Recipe
from memplan.planning.plan import plan
from memplan.planning.predicted import predicted_tape
from memplan.predict.step import write_tape
from memplan.report.html import COLUMNS, STACK, page
from memplan.tape import Category, Tape, replay, static_bytes
from memplan.tape.curves import RESIDENT, live_bytes, step_start

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
ASSETS = Path(__file__).parent.parent / "memplan" / "report" / "assets"


class Elements(HTMLParser):
    """The tags of a page with their attributes, and whether all that are opened are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "input", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def data(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    result: dict[str, Any] = json.loads(found[1])
    return result


def without_assets(text: str) -> str:
    for name in ("uplot/uPlot.min.css", "uplot/uPlot.iife.min.js", "uplot/LICENSE", "page.css", "page.js"):
        content = (ASSETS / name).read_text(encoding="utf-8")
        assert content in text
        text = text.replace(content, f"({name})\n")
    return re.sub(r'(id="data">).*?(</script>)', r"\1(the chart's data)\2", text)


def step(mode: str, layers: int = 3, **options: Any) -> Tape:
    return write_tape(
        SPECS["llama"](layers), Recipe(trainer="peft", mode=mode, **options).resolved(), folded=False
    )


def test_the_page(golden: Callable[[str, str], None]) -> None:
    text = page(example_plan().telling(advice=(example_advice(),)), example_tape(), ("mode", "r"))
    golden("page.html", without_assets(text))


def test_it_is_sound_html_that_loads_nothing() -> None:
    elements = Elements(page(example_plan(), example_tape()))
    assert elements.open == []
    policy = next(a["content"] for tag, a in elements.tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    for tag, attributes in elements.tags:
        assert tag not in ("link", "img", "iframe", "object", "base", "form")
        assert not {"src", "href", "srcset", "action"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)


def test_the_licence_of_the_chart_library_is_in_every_page() -> None:
    text = page(example_plan(), example_tape())
    assert "Copyright (c) 2022 Leon Sorokin" in text
    assert "uPlot (v1.6.32)" in text


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_the_chart_is_the_tapes(mode: str) -> None:
    tape = step(mode, seq_len=64, gradient_accumulation_steps=2)
    chart = data(page(example_plan(mode=mode), tape))
    start, live = step_start(tape), live_bytes(tape)
    assert chart["x"] == sorted(set(chart["x"]))
    sums = [512 * sum(column) for column in zip(*chart["live"], strict=True)]
    assert sums == [live[start + event] for event in chart["events"]]
    wide = -(-(len(live) - start) // COLUMNS)
    assert all(abs(x - event) < wide for x, event in zip(chart["x"], chart["events"], strict=True))
    before = static_bytes(tape)
    assert 512 * chart["ground"] == sum(before[category] for category in RESIDENT)
    peak, at = replay(tape), chart["peak"]
    assert sums[at] == peak.allocated_bytes == max(sums)
    for (field, _), column in zip(chart["categories"], chart["live"], strict=True):
        assert 512 * column[at] == peak.by_category[Category(field)]
    phase, layer, operation, module = chart["where"][at]
    texts = chart["texts"]
    assert (texts[phase], layer, texts[operation], texts[module]) == (
        peak.phase.value,
        peak.layer,
        peak.operation,
        peak.module,
    )
    assert [(name, begin) for name, begin, _ in chart["phases"]][:2] == [
        ("forward", 0),
        ("backward", chart["phases"][0][2]),
    ]
    for numbers in chart["held"]:
        told = [
            512 * chart["kinds"][kind][1] * count
            for kind, count in zip(numbers[::2], numbers[1::2], strict=True)
        ]
        assert told == sorted(told, reverse=True)
        assert all(0 <= chart["kinds"][kind][2] < len(chart["categories"]) for kind in numbers[::2])


def test_a_large_model_stays_under_a_megabyte_and_keeps_its_peak() -> None:
    recipe = Recipe(trainer="peft")
    answer, tape = plan("llama-70b", recipe), predicted_tape("llama-70b", recipe)
    text = page(answer, tape)
    assert len(tape.events) > 50_000
    assert len(text.encode()) < 400_000
    chart = data(text)
    assert COLUMNS < len(chart["x"]) <= 2 * COLUMNS
    assert 512 * sum(column[chart["peak"]] for column in chart["live"]) == answer.peak.tensor_bytes
    assert re.search(r"\d\d,\d{3} allocations and releases", text)


def test_what_configs_say_is_text() -> None:
    answer = example_plan()
    model = answer.model.model_copy(
        update={"name": HOSTILE, "hub_id": "x" + HOSTILE, "architecture": HOSTILE, "note": HOSTILE}
    )
    fit = answer.fits[0].model_copy(update={"gpu": HOSTILE})
    peak = answer.peak.model_copy(update={"operation": HOSTILE, "module": HOSTILE, "layer": None})
    answer = answer.model_copy(
        update={"model": model, "peak": peak, "libraries": {HOSTILE: HOSTILE}}
    ).telling(advice=(example_advice(HOSTILE),), fits=(fit,))
    tape = example_tape()
    tape.operations = [HOSTILE] * len(tape.operations)
    tape.modules = [HOSTILE] * len(tape.modules)
    text = page(answer, tape)
    assert HOSTILE not in text
    assert "<img" not in text
    assert text.count("<script") == text.count("</script") == 2
    assert unescape(text).count(HOSTILE) >= 10
    assert HOSTILE in data(text)["texts"]
    elements = Elements(text)
    assert elements.open == []
    assert not any(tag == "img" or any(n.startswith("on") for n in a) for tag, a in elements.tags)


def test_what_is_no_sign_is_shown_on_the_page() -> None:
    """Escape sequences, which `cat` would obey, and marks that turn around the text beside them."""
    spec = SPECS["llama"](2).model_copy(update={"name": "a\x1b[31m\u202eb\ud800"})
    text = page(plan(spec, Recipe(trainer="peft")), predicted_tape(spec, Recipe(trainer="peft")))
    assert "<h1>a\u241b[31m\ufffdb\ufffd</h1>" in text
    assert all(line.isprintable() for line in text.split("</style>")[1].split("<script>")[0].split("\n"))


def test_no_text_becomes_markup_in_the_browser() -> None:
    """page.js puts texts in as text; names from a trace would be code otherwise."""
    script = (ASSETS / "page.js").read_text(encoding="utf-8")
    for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch("):
        assert danger not in script


def test_parts_without_content_are_left_out() -> None:
    answer = example_plan().telling(fits=())
    text = page(answer, example_tape())
    assert "Cards" not in text
    assert "To fit" not in text


def test_every_category_has_its_place_and_colours() -> None:
    assert sorted(STACK) == sorted(category.value for category in Category)
    light, dark = (
        (ASSETS / "page.css").read_text(encoding="utf-8").split("@media (prefers-color-scheme: dark)")
    )
    for field in STACK:
        assert re.search(rf"--{field}: #[0-9a-f]{{6}}", light), field
        assert re.search(rf"--{field}: #[0-9a-f]{{6}}", dark), field


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser, which CI has not")
def test_a_browser_runs_it(tmp_path: Path) -> None:
    tape = step("qlora", seq_len=64)
    (tmp_path / "page.html").write_text(page(example_plan(), tape), encoding="utf-8")
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    more = "--disable-background-networking --disable-component-update --virtual-time-budget=2000 --dump-dom"
    process = subprocess.run(
        ["chromium", *options.split(), *more.split(), f"--user-data-dir={tmp_path}", tmp_path / "page.html"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    peak = replay(tape)
    when = re.search(r'<div id="when">(.*?)</div>', process.stdout)
    assert when is not None
    size = f"{peak.allocated_bytes / 2**20:.1f} MiB"
    assert when[1] == (
        f"{size}, the peak: {peak.phase.value} of layer {peak.layer}, at {peak.operation} in {peak.module}"
        f" (event {live_bytes(tape).index(peak.allocated_bytes) + 1 - step_start(tape):,})"
    )
    assert "<canvas" in process.stdout
    rows = re.search(r'<tbody id="tensors">(.*?)</tbody>', process.stdout)
    assert rows is not None
    assert rows[1].count("<tr>") == 8
