"""What is printed: golden files at 80 columns without colour (renew: pytest --update-golden)."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable

import pytest
from example_plans import example_advice, example_plan
from rich.console import Console

from memplan.planning.plan import Plan
from memplan.report.compare import show_comparison
from memplan.report.console import bar, paragraph, table
from memplan.report.fit import show_fit
from memplan.report.headline import verdicts
from memplan.report.plan import show_plan
from memplan.report.screen import DETAIL, Part, show
from memplan.report.wording import asked_and_default, phrases, short_card
from memplan.units import count, gib, ratio, share

MODES = ("full", "lora", "qlora")


def printed(show: Callable[[Console], None], width: int = 80, **settings: object) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False, **settings)  # type: ignore[arg-type]
    show(console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("mode", MODES)
def test_plan(mode: str, golden: Callable[[str, str], None]) -> None:
    plan = example_plan(mode=mode)
    golden(f"plan-{mode}.txt", printed(lambda console: show_plan(plan, console, given=("mode", "r"))))


@pytest.mark.parametrize("mode", MODES)
def test_all_of_a_plan(mode: str, golden: Callable[[str, str], None]) -> None:
    plan = example_plan(mode=mode)
    text = printed(lambda console: show_plan(plan, console, given=("mode", "r"), verbose=True))
    golden(f"plan-{mode}-verbose.txt", text)


def test_fit(golden: Callable[[str, str], None]) -> None:
    golden("fit.txt", printed(lambda console: show_fit(example_plan(), console, ("seq_len",))))
    golden("fit-verbose.txt", printed(lambda console: show_fit(example_plan(), console, verbose=True)))


def test_fit_says_what_to_change_first() -> None:
    plan = example_plan()
    plan = plan.telling(fits=plan.fits[1:2], advice=(example_advice(),))
    lines = printed(lambda console: show_fit(plan, console)).splitlines()
    assert lines[0].startswith("RTX A6000: does not fit, 3.16 GiB short")
    assert lines[1] == "It fits with --no-kbit-prep  (45.00 GiB): 16-bit head"
    assert "--no-kbit-prep" in "".join(lines[2:])


def test_what_there_is_no_room_for_is_named() -> None:
    def lines(count: int) -> Callable[[Console], None]:
        return lambda console: console.print("\n".join("x" * count))

    parts = [
        Part(lines(15)),
        Part(lines(9), 1, "much"),
        Part(lines(2), 2, "little"),
        Part(lines(1), DETAIL, "all"),
    ]
    text = printed(lambda console: show(parts, console, verbose=False))
    assert text.count("x") == 15
    assert text.endswith("More with --verbose: much, little, all\n")
    assert printed(lambda console: show(parts, console, verbose=True)).count("x") == 27
    few = printed(lambda console: show(parts[:1], console, verbose=False))
    assert few.count("\n") == 15  # nothing is missing, so nothing is said


def test_several_cards_in_a_sentence() -> None:
    plan = example_plan()
    together = verdicts(plan.fits)
    assert [line.text for line in together] == ["Fits the A40 (51.56) and larger, not the RTX A6000 (47.40)"]
    assert [line.verdict for line in verdicts(plan.fits[:2])] == ["does not fit", "does not fit"]
    none = verdicts([plan.fits[0]] * 4)
    assert none[0] == ("Fits none of 4 cards, up to the RTX 4090 (23.00)", "does not fit")
    everywhere = verdicts([plan.fits[3]] * 4)
    assert everywhere[0] == ("Fits all of 4 cards, down to the H100 80GB HBM3 (79.00)", "fits")


def test_compare(golden: Callable[[str, str], None]) -> None:
    plans = [example_plan(mode=mode) for mode in MODES]
    golden("compare.txt", printed(lambda console: show_comparison(plans, console)))


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_sticks_out(mode: str, width: int) -> None:
    plan = example_plan(mode=mode)
    text = printed(lambda console: show_plan(plan, console), width=width)
    if width >= 60:
        assert max(map(len, text.splitlines())) <= width
    assert all(line == line.rstrip() for line in text.splitlines() if "███" in line)


def test_a_terminal_gets_colour_and_a_file_none() -> None:
    plan = example_plan()
    coloured = printed(lambda console: show_plan(plan, console), force_terminal=True, color_system="standard")
    plain = printed(lambda console: show_plan(plan, console))
    assert "\x1b[" in coloured
    assert "\x1b[" not in plain
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain


def test_a_plan_without_cards_prints_none() -> None:
    plan = example_plan().telling(fits=())
    text = printed(lambda console: show_plan(plan, console))
    assert "Cards" not in text
    assert "simulated" not in text


def test_json_reads_back_as_the_same_plan() -> None:
    plan = example_plan()
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_every_phrase_is_either_asked_or_default() -> None:
    recipe = example_plan(r=16, seq_len=4096, optimizer="sgd", momentum=0.9).recipe
    asked, default = asked_and_default(recipe, {"r", "seq_len", "momentum"})
    assert asked == ["qlora", "r 16", "sgd with momentum 0.9", "1 × 4096 tokens"]
    assert sorted(asked + default) == sorted(phrases(recipe).values())


def test_phrases_tell_recipes_apart() -> None:
    """Two recipes that differ in anything that counts in their mode are not told in the same words."""
    options: dict[str, object] = {
        "r": 9,
        "lora_alpha": 3,
        "lora_dropout": 0.1,
        "target_modules": "q,v",
        "modules_to_save": ("lm_head",),
        "use_rslora": True,
        "use_dora": True,
        "adapter_dtype": "bfloat16",
        "dtype": "float16",
        "autocast": True,
        "quant_type": "fp4",
        "double_quant": False,
        "kbit_prep": False,
        "optimizer": "adamw_bnb_8bit",
        "max_grad_norm": 0.0,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False,
        "use_reentrant": not example_plan().recipe.use_reentrant,
        "attn": "eager",
        "loss": "liger",
        "batch_size": 2,
        "seq_len": 4096,
        "alloc_conf": "expandable_segments:True",
    }
    usual = phrases(example_plan().recipe)
    for field, value in options.items():
        assert phrases(example_plan(**{field: value}).recipe) != usual, field


def test_bar_is_never_nothing_and_fills_its_width() -> None:
    assert bar(1, 10**12, 30) == "▏"
    assert bar(10, 10, 30) == "█" * 30
    assert bar(5, 10, 30, unicode=False) == "#" * 15


def test_units() -> None:
    assert gib(0) == "0.00"
    assert gib(512) == "<0.01"
    assert gib(-512) == "-<0.01"
    assert gib(1536 * 2**30) == "1,536.00"
    assert share(0, 10) == "0.0 %"
    assert share(1, 10**9) == "<0.1 %"
    assert count(70_553_706_496) == "70.55 B"
    assert count(999) == "999"
    assert ratio(103_555_072, 70_657_261_568) == "0.15 %"
    assert ratio(1, 1) == "100 %"


def test_cards_are_told_by_what_differs() -> None:
    assert short_card("NVIDIA GeForce RTX 4090") == "RTX 4090"
    assert short_card("AMD Instinct MI300X") == "AMD Instinct MI300X"


def test_a_long_first_column_gives_way() -> None:
    text = printed(lambda console: table(console, [["x" * 90, "12.34"], ["y", "5.00"]], "<>"), width=40)
    first, second = text.splitlines()
    assert len(first) == len(second) == 40
    assert "…" in first


def test_a_paragraph_breaks_between_phrases() -> None:
    text = printed(lambda console: paragraph(console, ["one two", "three four", "five"], "label"), width=20)
    assert text == "label  one two,\n       three four,\n       five\n"


def test_json_is_json() -> None:
    assert json.loads(example_plan().model_dump_json())["peak"]["phase"] == "backward"
