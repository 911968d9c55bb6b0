"""How a model is called: the words of its name, its page on the Hub, and what says that a copy is quantised.

``llama70b``, ``Llama 70B`` and ``llama-70b`` are the same words; ``qwen-27b`` is not ``qwen2-7b``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from math import log

from memplan.errors import SpecError, shown

# 8x7b, a3b (active parameters), 70b, 3.1, 128k; and letters.
_WORD = re.compile(
    r"\d+x\d+(?:\.\d+)?b(?![a-z])|a\d+(?:\.\d+)?b(?![a-z])|\d+(?:\.\d+)*(?:[bmk](?![a-z]))?|[a-z]+"
)
_NAME = re.compile(r"[\w .:+-]+", re.ASCII)
_SIZE = re.compile(r"(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])")

# The word with which the part of a name begins that tells how its weights are stored, and what they are then.
_STORED = {
    "bnb": "bitsandbytes", "awq": "awq", "gptq": "gptq", "fp": "fp8", "nvfp": "nvfp4", "mxfp": "mxfp4",
    "gguf": "gguf", "mlx": "mlx", "exl": "exl2", "quantized": "compressed-tensors", "w": "compressed-tensors",
}  # fmt: skip
_BITS = {"bnb": ("4", "8"), "fp": ("8",), "nvfp": ("4",), "mxfp": ("4",), "w": ("4", "8"), "exl": ("2", "3")}

_HUB = re.compile(r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)|hf:/)/(.*)", re.IGNORECASE)
_OLLAMA = re.compile(r"(?:https?://)?(?:www\.)?ollama\.com/(?:library/)?([\w.:-]+)/?", re.IGNORECASE)
_OTHER_PAGES = {
    "datasets": "a data set", "spaces": "a Space", "papers": "a paper", "collections": "a collection",
    "docs": "documentation", "blog": "a post", "buckets": "a bucket",
}  # fmt: skip
_INSTEAD = "give the page of a model, its Hub id or the path of its config.json"


@dataclass(frozen=True, slots=True)
class Stored:
    """What a name says of a checkpoint's weights: ``method`` as a quantization_config calls it; ``mixed``:
    some layers are kept in 16 bits."""

    method: str
    bits: int | None = None
    mixed: bool = False

    @property
    def config(self) -> dict[str, object]:
        """The quantization_config of such a checkpoint, as far as its name tells it. Those that are called
        bnb-4bit are Unsloth's and made after its fashion: nf4, quantised twice, computing in bfloat16."""
        if self.method != "bitsandbytes":
            return {"quant_method": self.method}
        four = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
        }
        return {"quant_method": self.method, **(four if self.bits == 4 else {"load_in_8bit": True})}


@dataclass(frozen=True, slots=True)
class Name:
    """A name in words: lower-case, without what separates them. ``organisation`` is empty where none is."""

    organisation: str
    words: tuple[str, ...]
    stored: Stored | None = None


def read(text: str) -> Name | None:
    """The words of a name or a Hub id; None of what is neither."""
    organisation, slash, last = text.strip().lower().rpartition("/")
    if not _NAME.fullmatch(last) or "/" in organisation or (slash and not organisation):
        return None
    found, stored = _stored(words(last))
    return Name(organisation, found, stored) if found else None


def words(text: str) -> tuple[str, ...]:
    """The words of a text, without a v before a number; 70 B are 70b."""
    found: list[str] = []
    for word in _WORD.findall(text.lower()):
        if word in ("b", "m") and found and found[-1].replace(".", "", 1).isdecimal():
            found[-1] += word
        else:
            if found and found[-1] == "v" and word[0].isdecimal():
                found.pop()
            found.append(word)
    return tuple(found)


def _stored(found: tuple[str, ...]) -> tuple[tuple[str, ...], Stored | None]:
    """The words without those that tell how the weights are stored."""
    for at, word in enumerate(found[1:], 1):
        after = found[at + 1] if at + 1 < len(found) else ""
        if word in _STORED and (word not in _BITS or after in _BITS[word]):
            mixed = word == "bnb" and found[at - 1] == "unsloth"
            bits = int(after) if word == "bnb" else None
            return found[: at - 1 if mixed else at], Stored(_STORED[word], bits, mixed)
        if word in ("4", "8") and after == "bit" and at + 2 == len(found):
            return found[:at], Stored("bitsandbytes", int(word))
    return found, None


# -- pages ---------------------------------------------------------------------------------------------------


def of_page(text: str) -> tuple[str, str | None] | None:
    """The name that a page is about, and the revision that it shows if that is another than main; None of
    what is no page. Raises SpecError of pages that show no model."""
    text = text.strip()
    if ollama := _OLLAMA.fullmatch(text):
        return ollama[1], None
    hub = _HUB.fullmatch(text)
    if hub is None:
        if re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE):
            text = re.sub(r"//[^/@]*@", "//…@", text)  # a password is not repeated
            raise SpecError(f"{shown(text)} is no page of the Hub: {_INSTEAD}")
        return None
    parts = [part for part in re.split(r"[?#]", hub[1])[0].split("/") if part]
    if parts[:2] == ["api", "models"]:
        parts = parts[2:]
    if parts and parts[0] in _OTHER_PAGES:
        raise SpecError(f"{shown(text)} is {_OTHER_PAGES[parts[0]]}, not a model: {_INSTEAD}")
    if len(parts) < 2 or not all(re.fullmatch(r"[\w.-]+", part, re.ASCII) for part in parts[:2]):
        raise SpecError(f"{shown(text)} shows no one model: {_INSTEAD}")
    shows = len(parts) > 3 and parts[2] in ("tree", "blob", "resolve", "raw")
    revision = parts[3] if shows and parts[3] != "main" else None
    return "/".join(parts[:2]), revision


# -- neighbours ----------------------------------------------------------------------------------------------


def size_of(found: tuple[str, ...]) -> float | None:
    """The parameters that a name tells, in billions: 56 of 8x7b."""
    for word in found:
        if size := _SIZE.fullmatch(word):
            return int(size[1] or 1) * float(size[2]) / (1 if size[3] == "b" else 1000)
    return None


def neighbours(text: str, known: dict[str, tuple[str, float | None]], most: int = 3) -> list[str]:
    """The names near to one that is not known: of the same family, or of one spelled much like it, and of
    about the same size where it tells one. ``known``: the model and its billions of parameters by each name;
    of several names of one model the nearest."""
    asked = words(text.rpartition("/")[2])
    family, size = _family(asked), size_of(asked)
    asked = _without_size(asked)
    best: dict[str, tuple[float, str]] = {}
    for name, (model, billions) in known.items():
        theirs = words(name)
        if SequenceMatcher(None, family, _family(theirs)).ratio() < 0.75:
            continue
        apart = abs(log(billions / size)) if size and billions else 0.0
        if apart > log(2.2):
            continue
        theirs = _without_size(theirs)  # which is weighed by how far apart they are
        shared = 2 * len({*asked} & {*theirs}) / (len(asked) + len(theirs) or 1)
        likeness = shared + SequenceMatcher(None, text.lower(), name).ratio() / 10 - apart / 2
        if likeness > best.get(model, (-1.0, ""))[0]:
            best[model] = likeness, name
    return [name for _, name in sorted(best.values(), key=lambda one: -one[0])[:most]]


def _without_size(found: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for word in found if not _SIZE.fullmatch(word))


def _family(found: tuple[str, ...]) -> str:
    return next((word for word in found if word.isalpha() and word not in ("meta", "the")), "")
