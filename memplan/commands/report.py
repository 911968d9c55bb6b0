"""``memplan report``: all measurements together."""

from __future__ import annotations

import argparse
from pathlib import Path

from memplan.commands.arguments import Parser, add_json
from memplan.errors import MemplanError, reason, shown
from memplan.streams import remark, say

FOLDER = "measurements"
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"

_MOST_BYTES = 64 << 20

EXAMPLES = """\
Every file of the folder is read, checked and held against the plan that this
memplan makes. Measurements on GPUs and trainings on a CPU are never put
together.

examples:
  memplan report
  memplan report ./my-measurements --into page.md
"""


def parser() -> Parser:
    """The arguments that ``memplan report`` takes."""
    result = Parser("report", "All measurements against the plan.", "[FOLDER] [options]", EXAMPLES)
    result.add_argument(
        "folder",
        metavar="FOLDER",
        nargs="?",
        default=None,
        help="of measurements, as verify and campaign write them with --out (default: ./measurements)",
    )
    result.add_argument(
        "--into",
        metavar="FILE",
        default=None,
        help=f"replace what stands between {BEGIN} and {END} in a file",
    )
    add_json(result)
    return result


def run(arguments: argparse.Namespace) -> int:
    """Print the section, or write it into a file and say so; 0."""
    from memplan.report.measured import section
    from memplan.verify.compare import as_json, compare
    from memplan.verify.measurement import read_all

    folder = Path(arguments.folder if arguments.folder is not None else FOLDER)
    if arguments.folder is not None and not folder.is_dir():
        raise MemplanError(f"there is no folder {shown(str(folder))}")
    files = read_all(folder, remark) if folder.is_dir() else ()
    pairs = [(measured, compare(measured)) for _, measured in files]
    if arguments.json:
        from memplan.report.machine import print_list

        print_list("measurements", [as_json(measured, found) for measured, found in pairs])
    elif arguments.into is not None:
        _replace(Path(arguments.into), section(pairs))
        measurements = f"{len(pairs)} measurement{'' if len(pairs) == 1 else 's'}"
        say(f"wrote the report of {measurements} into {shown(arguments.into)}\n")
    else:
        say(section(pairs))
    return 0


def _replace(path: Path, text: str) -> None:
    from memplan.files import write_whole

    where = shown(str(path))
    try:
        if path.exists() and not path.is_file():
            raise MemplanError(f"{where} is no file with a page")
        if path.stat().st_size > _MOST_BYTES:
            raise MemplanError(f"{where} is larger than {_MOST_BYTES >> 20} MiB, too large for a page")
        page = path.read_bytes().decode("utf-8")  # its line ends stay as they are
    except (OSError, ValueError) as error:
        raise MemplanError(f"{where} can't be read: {reason(error)}") from None
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise MemplanError(f"{where} has no place for it: write {BEGIN} and {END} where it belongs")
    write_whole(path, f"{head}{BEGIN}\n{text}{END}{tail}".encode(), "the page")
