"""Writes pictures and their maps to one HTML page, which needs neither a server nor a network."""

import json
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping
from hashlib import sha256
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tucker_cam.explanations.explanation import data_uri
from tucker_cam.text import printable
from tucker_cam.writing import complete_or_absent

_PICTURE_SIDE = 224
_MAP_SIDE = 56
_JPEG_QUALITY = 75
# Every map stores its palette: more than 64 entries would double its bytes and look the same.
_MAP_LEVELS = 64
# An odd number, so that zero has an entry of its own.
_COMPONENT_LEVELS = 63
_TOP_SHARE = 0.1
_FOR_SCRIPT = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&"})


def gallery_entry(
    name: str,
    picture: NDArray[np.float32],
    maps: Mapping[str, NDArray[np.float32]],
    components: NDArray[np.float32],
    values: NDArray[np.float32],
) -> dict[str, Any]:
    r"""Reduce a picture, its maps and its components to what the page shows: text, numbers and data URIs.

    The components are $a_i^\top F_{(1)}$, each coloured on its own scale, blue below and red above zero; there may be
    none. The values are all $s_i$, descending, and a ``share`` is $s_i / \sum_j s_j$. ``energy_in_top`` is the share of
    a map's sum that its highest 10 % of pixels hold. NaN and Inf count as 0.
    """
    height, width = picture.shape[:2]
    finite = _finite(values)
    shares = (finite / (finite.sum() or 1)).tolist()
    return {
        "name": printable(name),
        "aspect": width / height,
        "picture": _photograph(picture),
        "methods": {method: _method(saliency) for method, saliency in maps.items()},
        "components": [
            {"image": _diverging_map(component), "share": share}
            for component, share in zip(components, shares, strict=False)
        ],
        "first_share": shares[0],
    }


def write_gallery(path: Path, title: str, entries: Iterable[Mapping[str, Any]]) -> None:
    """Write the page from entries made by `gallery_entry`, holding only one of them in memory at a time.

    Raises:
        OSError: the file cannot be written.
        ValueError: an entry holds a number that is not finite.
    """
    template = files("tucker_cam.explanations").joinpath("gallery.html").read_text(encoding="utf-8")
    before, after = template.split("<!-- entries -->")
    before = before.replace("{{policy}}", _policy(template)).replace("{{title}}", escape(printable(title)))
    with complete_or_absent(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.write(before)
        for entry in entries:
            text = json.dumps(entry, separators=(",", ":"), allow_nan=False).translate(_FOR_SCRIPT)
            file.write(f'<script type="application/json">{text}</script>\n')
        file.write(after)


def _method(array: NDArray[np.float32]) -> dict[str, Any]:
    saliency = _finite(array).clip(0, 1)
    held = np.concatenate([[0.0], np.sort(saliency, axis=None)[::-1].cumsum()])
    # Interpolated, since a tenth of the pixels is seldom a whole number.
    top = np.interp(_TOP_SHARE * saliency.size, np.arange(len(held)), held)
    return {
        "map": _sequential_map(saliency),
        "mean_saliency": float(saliency.mean()),
        "energy_in_top": float(top / (held[-1] or 1)),
    }


def _finite(array: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.nan_to_num(array.astype(np.float64), nan=0, posinf=0, neginf=0)


def _photograph(picture: NDArray[np.float32]) -> str:
    image = Image.fromarray(np.rint(255 * _finite(picture).clip(0, 1)).astype(np.uint8))
    image.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    return data_uri(image, "JPEG", quality=_JPEG_QUALITY)


def _sequential_map(saliency: NDArray[np.float64]) -> str:
    image = Image.fromarray(saliency.astype(np.float32))
    image.thumbnail((_MAP_SIDE, _MAP_SIDE), Image.Resampling.BOX)
    # show_cam_on_image's colours, so that the page looks like the overlays.
    ramp = np.linspace(0, 255, _MAP_LEVELS).astype(np.uint8)[:, None]
    blue_green_red = cv2.applyColorMap(ramp, cv2.COLORMAP_JET)[:, 0]
    return _palette_png(np.asarray(image) * (_MAP_LEVELS - 1), blue_green_red[:, ::-1])


def _diverging_map(array: NDArray[np.float32]) -> str:
    component = _finite(array)
    scaled = component / (np.abs(component).max() or 1)
    colours = 255 * matplotlib.colormaps["RdBu_r"](np.linspace(0, 1, _COMPONENT_LEVELS))[:, :3]
    return _palette_png((scaled + 1) / 2 * (_COMPONENT_LEVELS - 1), colours)


def _palette_png(levels: NDArray[np.floating[Any]], colours: NDArray[Any]) -> str:
    image = Image.fromarray(np.rint(levels).astype(np.uint8))
    image.putpalette(np.rint(colours).astype(np.uint8).tobytes())
    return data_uri(image, "PNG")


def _policy(template: str) -> str:
    """Return a Content-Security-Policy under which the page's own style and script work, and nothing is fetched."""
    rules = ["default-src 'none'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    for element in ("style", "script"):
        (content,) = re.findall(f"<{element}>(.*?)</{element}>", template, flags=re.DOTALL)
        rules.append(f"{element}-src 'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'")
    return "; ".join(rules)
