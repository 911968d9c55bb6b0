"""JSON and YAML from strangers, read within bounds: a few bytes can become many times as many in memory."""

from __future__ import annotations

import json
from typing import Any

from memplan.errors import printable

# A list or an object takes 60 bytes and more for the two that it is in the file, a short text 70 for four;
# the rest grows eightfold at most. What memplan reads has far fewer: the tape of 126 layers has thousands of
# lists and texts, the config.json of a classifier two texts for each of its labels.
MOST_CONTAINERS = 1 << 17
MOST_TEXTS = 1 << 20

_MOST_PARTS = 100_000  # of a YAML text, with every alias written out
_MOST_NESTED = 32
_MOST_DIGITS = 40


class TooManyParts(ValueError):
    """A file holds more than any of its kind. ``str(error)`` goes on after the file's name."""


def read_json(content: bytes, *, once: bool = False) -> Any:
    """The value of a JSON text, whose length the caller has bounded; ``once``: no key may stand twice.

    Raises TooManyParts, and as ``json.loads`` does ValueError or RecursionError.
    """
    if content.count(b"[") + content.count(b"{") > MOST_CONTAINERS:
        raise TooManyParts(f"holds more than {MOST_CONTAINERS:,} lists and objects")
    if content.count(b'"') > 2 * MOST_TEXTS:
        raise TooManyParts(f"holds more than {MOST_TEXTS:,} texts")
    return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object if once else None)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _once([key for key, _ in pairs])
    return dict(pairs)


def read_yaml(text: str) -> Any:
    """The value of a YAML text, whose length the caller has bounded: PyYAML reads 100 KiB a second. It is
    measured before it is made, for a few aliases of aliases unfold to more than there is memory for.

    Raises TooManyParts, whose words say why the text is nothing that anybody wrote, YAMLError for what is no
    YAML, ValueError of a value, and ImportError without PyYAML.
    """
    import yaml

    loader = yaml.SafeLoader(text)
    known: dict[int, int] = {}  # parts, aliases written out, of nodes that are done
    open_: set[int] = set()

    def parts(node: yaml.Node, depth: int) -> int:
        if id(node) in known:
            return known[id(node)]
        if id(node) in open_:
            raise TooManyParts("an alias stands inside of what it names")
        if depth > _MOST_NESTED:
            raise TooManyParts("it is nested too deeply")
        inside: list[yaml.Node] = []
        if isinstance(node, yaml.ScalarNode):
            if node.tag.endswith((":int", ":float")) and len(node.value) > _MOST_DIGITS:
                raise TooManyParts("it holds a number that is too long")
        else:
            inside = [x for pair in node.value for x in (pair if isinstance(pair, tuple) else (pair,))]
            if isinstance(node, yaml.MappingNode):
                _once([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        open_.add(id(node))
        count = 1 + sum(parts(one, depth + 1) for one in inside)
        open_.discard(id(node))
        if count > _MOST_PARTS:
            raise TooManyParts(f"its aliases unfold to more than {_MOST_PARTS:,} parts")
        known[id(node)] = count
        return count

    try:
        node = loader.get_single_node()
        if node is None:
            return None
        parts(node, 0)
        try:
            return loader.construct_document(node)
        except (AttributeError, KeyError, TypeError):  # PyYAML's, of `!!timestamp` before what is no time
            raise TooManyParts("a tag in it does not suit what it stands before") from None
    except RecursionError:  # while it is taken apart
        raise TooManyParts("it is nested too deeply") from None
    finally:
        loader.dispose()


def _once(keys: list[str]) -> None:
    """Readers take the last of two equal keys and say nothing."""
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise TooManyParts(f"it has the key {printable(key[:40])} twice")
        seen.add(key)
