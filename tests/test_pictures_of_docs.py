import subprocess
import sys
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).parents[1] / "docs"


def test_the_pictures_of_the_documentation_are_made_of_two_photographs(tmp_path):
    command = [sys.executable, DOCS / "make_pictures.py", "--quick", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True, cwd=DOCS.parent)
    page = (tmp_path / "gallery" / "gallery.html").read_text()
    assert page.count('<script type="application/json">') == 2
    said = (tmp_path / "images" / "front.md").read_text()
    assert all(word in said for word in ("astronaut", "brick", "agree most", "agree least", "public domain"))
    with Image.open(tmp_path / "images" / "front.png") as front:
        opacity = front.convert("RGBA").getchannel("A")
        # Nothing around the pictures, and text that is smooth on any page.
        assert opacity.getpixel((0, 0)) == 0
        assert len(opacity.getcolors()) > 4


def test_the_pictures_that_are_kept_are_small():
    assert (DOCS / "images" / "front.png").stat().st_size < 500_000
    page = DOCS / "gallery" / "gallery.html"
    assert page.stat().st_size < 3_000_000
    assert page.read_text().count('<script type="application/json">') == 24
