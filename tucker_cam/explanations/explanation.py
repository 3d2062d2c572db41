"""What was found out about one picture: its maps, what they are drawn on, and how they are shown."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from io import BytesIO
from numbers import Real
from typing import Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from pytorch_grad_cam.utils.image import show_cam_on_image
from torch import Tensor

from tucker_cam.errors import BadValueError, Failure
from tucker_cam.methods import check_name
from tucker_cam.models import Network
from tucker_cam.pictures.held import Picture, first_frame
from tucker_cam.pictures.view import View, view_of
from tucker_cam.text import printable

# What the network did not see keeps this much of its brightness.
_DIMMED = 0.4
_SHOWN_HEIGHT = 240
_COLORMAPS = {
    name.removeprefix("COLORMAP_").lower(): getattr(cv2, name) for name in dir(cv2) if name.startswith("COLORMAP_")
}


class Look(NamedTuple):
    """How a map is drawn.

    Attributes:
        view: ``picture`` draws it at its place in the user's own picture, whole and at its own size, with what the
            network did not see dimmed; ``network`` over what the network saw.
        colormap: of OpenCV, such as ``jet``, the host's, or ``viridis``.
        alpha: the map's weight over the picture's, in [0, 1].
    """

    view: Literal["picture", "network"] = "picture"
    colormap: str = "jet"
    alpha: float = 0.5

    def check(self) -> None:
        """Raise ValueError unless there is such a look."""
        check_name("view", self.view, ("picture", "network"))
        check_name("colormap", self.colormap, _COLORMAPS)
        if not (isinstance(self.alpha, Real) and 0 <= self.alpha <= 1):
            raise BadValueError(f"expected alpha in [0, 1], got {self.alpha!r}")

    def draw(self, picture: NDArray[np.float32], saliency: NDArray[np.float32]) -> Image.Image:
        colormap = _COLORMAPS[self.colormap]
        return Image.fromarray(show_cam_on_image(picture, saliency, True, colormap, image_weight=1 - self.alpha))


DEFAULT_LOOK = Look()


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    r"""What was found out about one picture.

    Attributes:
        source: where it is from.
        size: the picture's own, width and height; None where the network's input was given.
        network_input: what it became, channels x (time x) height x width.
        network: that took it.
        maps: by method, float32 in [0, 1], height x width as the network saw it (time x height x width for clips).
        components: MTSM's strongest components $a_i^\top F_{(1)}$ at the last of the layers, count x its positions,
            signed; none unless asked for.
        values: all singular values, descending; none unless asked for.
        look: of its overlays, where nothing else is asked for.
        failures: of the methods that have no map here.
    """

    source: Picture
    size: tuple[int, int] | None
    network_input: Tensor
    network: Network
    maps: Mapping[str, NDArray[np.float32]]
    components: NDArray[np.float32]
    values: NDArray[np.float32]
    look: Look = DEFAULT_LOOK
    failures: Sequence[Failure] = ()

    @property
    def name(self) -> str:
        return self.source.name

    @cached_property
    def picture(self) -> Image.Image:
        """As the user has it, upright and whole, read again; of a clip its first frame.

        Where only the network's input was given it is that, with its normalisation undone.
        """
        picture = first_frame(self.source.read(self.network.frames))
        return Image.fromarray(np.uint8(np.rint(255 * self.seen))) if picture is None else picture

    @cached_property
    def view(self) -> View | None:
        """Where in the picture the network looked; None where that is no box of it."""
        return view_of(self.network.preprocess, self.size, self.network.frames)

    @cached_property
    def seen(self) -> NDArray[np.float32]:
        """What the network saw, height x width x 3 in [0, 1]; of a clip its first frame."""
        saw = self.network.picture(self.network_input)
        return saw if saw.ndim == 3 else saw[0]

    def overlay(
        self,
        method: str | None = None,
        *,
        view: Literal["picture", "network"] | None = None,
        colormap: str | None = None,
        alpha: float | None = None,
    ) -> Image.Image:
        """Draw a map over the picture; of a clip, over its first frame.

        Args:
            method: its name; None for the first.
            view: see `Look`, as for the next two; None for that of `look`.
            colormap: see `view`.
            alpha: see `view`.

        Raises:
            KeyError: there is no map of this method.
            ValueError: there is no such look.
        """
        look = Look(
            self.look.view if view is None else view,
            self.look.colormap if colormap is None else colormap,
            self.look.alpha if alpha is None else alpha,
        )
        look.check()
        saliency = self.maps[next(iter(self.maps)) if method is None else method]
        return self.drawn(saliency if saliency.ndim == 2 else saliency[0], look)

    def drawn(self, saliency: NDArray[np.float32], look: Look) -> Image.Image:
        """Return a map, height x width as the network saw it, over the picture."""
        if look.view == "network" or self.view is None:
            return look.draw(self.seen, saliency)
        (x, y, width, height), size = self.view, self.picture.size
        edges = np.rint([x, y, x + width, y + height]).clip(0, (*size, *size))
        left, top, right, bottom = box = tuple(edges.astype(int).tolist())
        across, down = saliency.shape[1] / width, saliency.shape[0] / height
        matrix = (across, 0, (left - x) * across, 0, down, (top - y) * down)
        laid = Image.fromarray(np.ascontiguousarray(saliency)).transform(
            (right - left, bottom - top), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
        )
        there = np.float32(1 / 255) * np.asarray(self.picture.crop(box))
        whole = ImageEnhance.Brightness(self.picture).enhance(_DIMMED)
        whole.paste(look.draw(there, np.asarray(laid)), box)
        return whole

    def __repr__(self) -> str:
        return f"<Explanation of {self.name}: {', '.join(self.maps)}>"

    def _repr_html_(self) -> str:
        """Return the picture beside its overlays, for a notebook: nothing is fetched."""
        figures = ""
        try:
            shown = {printable(self.name): self.picture} | {method: self.overlay(method) for method in self.maps}
        except BadValueError as error:
            # A network's input of other channels than a picture's.
            return f"<p>{escape(f'{self!r}: {error}')}</p>"
        for title, image in shown.items():
            small = image.copy()
            small.thumbnail((4 * _SHOWN_HEIGHT, _SHOWN_HEIGHT))
            uri, text = data_uri(small, "JPEG", quality=85), escape(title)
            figures += (
                f'<figure style="margin:0"><img src="{uri}" alt="{text}"><figcaption>{text}</figcaption></figure>'
            )
        return f'<div style="display:flex;flex-wrap:wrap;gap:8px">{figures}</div>'


def data_uri(image: Image.Image, form: str, **options: int) -> str:
    """Return an image as a page holds it in itself."""
    buffer = BytesIO()
    image.save(buffer, format=form, optimize=True, **options)
    return f"data:image/{form.lower()};base64,{b64encode(buffer.getvalue()).decode()}"
