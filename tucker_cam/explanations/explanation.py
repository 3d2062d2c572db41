"""What was found out about one picture: its maps, what they are drawn on, and how they are shown."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pytorch_grad_cam.utils.image import show_cam_on_image

from tucker_cam.pictures.view import View
from tucker_cam.text import printable

# What the network did not see keeps this much of its brightness.
_DIMMED = 0.4
_SHOWN_HEIGHT = 240


@dataclass(frozen=True)
class Explanation:
    r"""What was found out about one picture.

    Attributes:
        name: of the picture.
        picture: as the user has it, upright and whole; of a clip its first frame. Where only the network's input was
            given, that, with its normalisation undone.
        seen: what the network saw, height x width x 3 in [0, 1]; of a clip its first frame.
        view: where in the picture that is; None where it is no box of it.
        maps: by method, float32 in [0, 1], height x width as the network saw it (time x height x width for clips).
        components: MTSM's strongest components $a_i^\top F_{(1)}$, count x layer height x layer width, signed; none
            unless asked for.
        values: all singular values, descending; none unless asked for.
    """

    name: str
    picture: Image.Image
    seen: NDArray[np.float32]
    view: View | None
    maps: Mapping[str, NDArray[np.float32]]
    components: NDArray[np.float32]
    values: NDArray[np.float32]

    def overlay(self, method: str | None = None, *, view: Literal["picture", "network"] = "picture") -> Image.Image:
        """Draw a map over the picture, in the host's colours.

        Args:
            method: its name; None for the first.
            view: ``picture`` draws it at its place in the user's own picture, whole and at its own size, with what the
                network did not see dimmed; ``network`` over what the network saw.

        Raises:
            KeyError: there is no map of this method.
        """
        saliency = self.maps[next(iter(self.maps)) if method is None else method]
        frame = saliency if saliency.ndim == 2 else saliency[0]
        if view == "network" or self.view is None:
            return Image.fromarray(show_cam_on_image(self.seen, frame, use_rgb=True))
        height, width = frame.shape
        across, down = width / self.view.width, height / self.view.height
        matrix = (across, 0, -self.view.left * across, 0, down, -self.view.top * down)
        laid, size = Image.fromarray(np.ascontiguousarray(frame)), self.picture.size
        placed = np.asarray(laid.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))
        x, y = np.arange(size[0]) + 0.5, np.arange(size[1])[:, None] + 0.5
        inside = (x >= self.view.left) & (x < self.view.left + self.view.width)
        inside = inside & (y >= self.view.top) & (y < self.view.top + self.view.height)
        picture = np.asarray(self.picture, dtype=np.float32) / 255
        drawn = show_cam_on_image(picture, placed, use_rgb=True)
        dimmed = np.uint8(255 * _DIMMED * picture)
        return Image.fromarray(np.where(inside[..., None], drawn, dimmed))

    def save(self, folder: str | Path) -> list[Path]:
        """Write the overlay of each method as ``NAME_METHOD.png``, and return the files.

        Raises:
            OSError: they cannot be written.
        """
        paths = []
        for method in self.maps:
            path = Path(folder, f"{self.name}_{method}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            self.overlay(method).save(path)
            paths.append(path)
        return paths

    def __repr__(self) -> str:
        return f"<Explanation of {self.name}: {', '.join(self.maps)}>"

    def _repr_html_(self) -> str:
        """Return the picture beside its overlays, for a notebook: nothing is fetched."""
        shown = {printable(self.name): self.picture} | {method: self.overlay(method) for method in self.maps}
        figures = "".join(
            f'<figure style="margin:0"><img src="{_data_uri(image)}" alt="{escape(title)}">'
            f"<figcaption>{escape(title)}</figcaption></figure>"
            for title, image in shown.items()
        )
        return f'<div style="display:flex;flex-wrap:wrap;gap:8px">{figures}</div>'


def _data_uri(image: Image.Image) -> str:
    small, buffer = image.copy(), BytesIO()
    small.thumbnail((4 * _SHOWN_HEIGHT, _SHOWN_HEIGHT))
    small.save(buffer, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}"
