"""What pictures show, in words: the captions of rendered glyphs and of handwritten digits."""

from __future__ import annotations

from typing import NamedTuple

HANDWRITTEN = "a handwritten"
"""How captions of what people wrote begin."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Typeface(NamedTuple):
    """How a font looks: its generic family, and whether it is bold or slanted."""

    family: str
    is_bold: bool
    is_italic: bool

    def __str__(self) -> str:
        words = ["bold"] * self.is_bold + ["italic"] * self.is_italic + [self.family]
        return " ".join(words)


# matplotlib's Computer Modern fonts have names that are abbreviations: bold, roman, sans, text italic, typewriter.
_COMPUTER_MODERN = {
    "cmb10": Typeface("serif", True, False),
    "cmr10": Typeface("serif", False, False),
    "cmss10": Typeface("sans", False, False),
    "cmti10": Typeface("serif", False, True),
    "cmtt10": Typeface("mono", False, False),
}


def typeface(font: str) -> Typeface:
    """How one of `glyphs.FONTS` looks, by its name."""
    if font in _COMPUTER_MODERN:
        return _COMPUTER_MODERN[font]
    family = "mono" if "Mono" in font else "serif" if "Serif" in font or font.startswith("STIX") else "sans"
    return Typeface(family, "Bol" in font, any(word in font for word in ("Oblique", "Ita")))


def name_of(character: str) -> str:
    """A letter or digit in words: "digit seven", "capital a", "small a"."""
    if character.isdigit():
        return f"digit {DIGITS[int(character)]}"
    return f"{'capital' if character.isupper() else 'small'} {character.lower()}"


def glyph_caption(font: str, character: str) -> str:
    """Such as "a bold serif capital q"."""
    return f"{_article(str(typeface(font)))} {name_of(character)}"


def digit_caption(digit: int) -> str:
    """Of one that a person wrote: "a handwritten seven"."""
    return f"{HANDWRITTEN} {DIGITS[digit]}"


def digit_of(caption: str) -> int | None:
    """The digit that a caption names, where it names one as its last word."""
    last = caption.split()[-1:] or [""]
    return DIGITS.index(last[0]) if last[0] in DIGITS else None


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
