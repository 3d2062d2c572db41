"""A page's HTML in, the same with its equations as MathML out, which browsers draw without a script or the network."""

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs for each page, docstrings included."""
    return _EQUATION.sub(_mathml, html)


def _mathml(found: re.Match[str]) -> str:
    tag, equation = found.groups()
    block = tag == "div"
    mathml = convert(unescape(equation).strip(), display="block" if block else "inline")
    return f'<div class="equation">{mathml}</div>' if block else mathml
