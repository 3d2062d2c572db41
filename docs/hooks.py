"""What is called while the site is built: equations become MathML, the benchmarks' figures and examples are found.

Browsers draw MathML without a script or the network.
"""

import re
from html import unescape
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
_FETCHING_SCRIPT = re.compile(r"<script[^>]*>(?:(?!</script>).)*cdnjs(?:(?!</script>).)*</script>", flags=re.DOTALL)
_SHORT_CODE = re.compile(r"<code>([^<]{1,30})</code>")
_NOTEBOOK_LINK = re.compile(r'href="\.\./([\w-]+)\.md(#[^"]*)?"')
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the figures that the benchmarks wrote, as `results/NAME.png`, so that they stand once in the repository."""
    for figure in sorted(_RESULTS.glob("*.png")):
        files.append(File.generated(config, f"results/{figure.name}", abs_src_path=str(figure)))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Draw a page's equations, docstrings included, mark the code that stays on a line, mend a notebook's links."""
    html = _NOTEBOOK_LINK.sub(r'href="../../\1/\2"', html)
    return _SHORT_CODE.sub(r'<code class="short">\1</code>', _EQUATION.sub(_mathml, html))


def on_post_page(output: str, **_: Any) -> str:
    """Take away what a notebook's template would fetch for diagrams, of which there are none."""
    return _FETCHING_SCRIPT.sub("", output)


def _mathml(found: re.Match[str]) -> str:
    tag, equation = found.groups()
    block = tag == "div"
    mathml = convert(unescape(equation).strip(), display="block" if block else "inline")
    return f'<div class="equation">{mathml}</div>' if block else mathml


class Examples(griffe.Extension):
    """Shows the docstrings' examples as programs: the parser knows them in the plural only."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
