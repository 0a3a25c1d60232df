r"""Mathematics without scripts: what arithmatex marked as TeX becomes MathML, which browsers set by themselves.

`$…$` arrives as `<span class="arithmatex">\(…\)</span>` and `$$…$$` as a `div` with `\[…\]`, from pages and docstrings
alike. Spacing and large brackets want a font made for mathematics: the one that comes with ziamath goes into the site.
"""

from __future__ import annotations

import html
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fontTools.ttLib import TTFont
from latex2mathml.converter import convert

_TEX = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)
_HAT = re.compile(r"<mo>&#x0005E;</mo>")
_ROOTS = ("uni221A.s1", "uni221A.s2", "uni221A.s3", "uni221A.s4", "uni221A.x", "uni221A.t")


def on_page_content(content: str, **_: Any) -> str:
    """Every formula of a page, its docstrings included."""
    return _TEX.sub(lambda found: mathml(html.unescape(found["tex"]), display=found["tag"] == "div"), content)


def mathml(tex: str, *, display: bool) -> str:
    """One formula; a displayed one may be wider than the page, and then scrolls by itself.

    Raises:
        ValueError: a command that nothing is known of, which would be shown as it is.
    """
    formula: str = convert(tex.strip(), display="block" if display else "inline")
    if "\\" in re.sub(r"<[^>]*>", "", formula):
        raise ValueError(f"no MathML for a command in: {tex.strip()}")
    formula = _HAT.sub('<mo stretchy="false">&#x002C6;</mo>', formula)  # the accent, not the operator
    return f'<div class="formula">{formula}</div>' if display else formula


def on_post_build(config: Any, **_: Any) -> None:
    """The font, beside the stylesheet that names it."""
    ziamath = find_spec("ziamath")  # found, not imported: only its font is wanted
    if ziamath is None or ziamath.origin is None:
        raise ModuleNotFoundError("ziamath, which brings the font for mathematics, is not installed: run `make docs`.")
    font = TTFont(Path(ziamath.origin).parent / "fonts" / "STIXTwoMath-Regular.ttf")
    _alike_roots(font)
    font.flavor = "woff"
    font.save(Path(config["site_dir"]) / "stylesheets" / "math.woff")


def _alike_roots(font: TTFont) -> None:
    """Tall root signs as wide as the small one: browsers leave room for the widest beside every root."""
    width = font["hmtx"]["uni221A"][0]
    for name in _ROOTS:
        glyph, (advance, bearing) = font["glyf"][name], font["hmtx"][name]
        glyph.coordinates.scale((width / advance, 1.0))
        glyph.coordinates.toInt()
        glyph.recalcBounds(font["glyf"])
        font["hmtx"][name] = (width, round(bearing * width / advance))
