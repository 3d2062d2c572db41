"""The explanation of one picture: its maps, what they are drawn on, and how they are shown."""

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

# Parts that the network did not see keep this share of their brightness.
_DIMMED = 0.4
_SHOWN_HEIGHT = 240
_COLORMAPS = {
    name.removeprefix("COLORMAP_").lower(): getattr(cv2, name) for name in dir(cv2) if name.startswith("COLORMAP_")
}


class Look(NamedTuple):
    """How a map is drawn.

    Attributes:
        view: ``picture`` draws the map at its place in your own picture, which is shown whole and at its own size, with
            the parts that the network did not see dimmed; ``network`` draws it over what the network saw.
        colormap: an OpenCV colormap, such as ``jet``, which the host uses, or ``viridis``.
        alpha: the weight of the map over the picture, in [0, 1].
    """

    view: Literal["picture", "network"] = "picture"
    colormap: str = "jet"
    alpha: float = 0.5

    def check(self) -> None:
        """Raise ValueError if a part of the look is invalid."""
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
    r"""The maps of one picture, and what is needed to draw them.

    Attributes:
        source: where the picture is from.
        size: the picture's own width and height; None if a network input was given.
        network_input: the input that the network took, channels x (time x) height x width.
        network: the network.
        maps: by method, float32 in [0, 1], height x width as the network saw it (time x height x width for clips).
        components: MTSM's strongest components $a_i^\top F_{(1)}$ at the last of the layers, signed, count x the
            layer's positions; empty unless asked for.
        values: all singular values, descending; empty unless asked for.
        look: how overlays are drawn by default.
        failures: one for each method that has no map of this picture.
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
        """Your own picture, upright and whole, read again; of a clip, its first frame.

        If only a network input was given, it is that input with its normalisation undone.
        """
        picture = first_frame(self.source.read(self.network.frames))
        return Image.fromarray(np.uint8(np.rint(255 * self.seen))) if picture is None else picture

    @cached_property
    def view(self) -> View | None:
        """The part of the picture that the network looked at; None if that part is not a box."""
        return view_of(self.network.preprocess, self.size, self.network.frames)

    @cached_property
    def seen(self) -> NDArray[np.float32]:
        """What the network saw, height x width x 3 in [0, 1]; of a clip, its first frame."""
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
            method: the name of a method; None for the first one.
            view: see `Look`; None for the view of `look`.
            colormap: see `Look`; None for the colormap of `look`.
            alpha: see `Look`; None for the alpha of `look`.

        Raises:
            KeyError: there is no map of this method.
            ValueError: the view, colormap or alpha is invalid.
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
        """Draw a map, height x width as the network saw it, over the picture."""
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
        """Return HTML of the picture beside its overlays, for a notebook; the HTML fetches nothing."""
        figures = ""
        try:
            shown = {printable(self.name): self.picture} | {method: self.overlay(method) for method in self.maps}
        except BadValueError as error:
            # A network input whose channels are not those of a picture.
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
    """Return an image as a data URI, which a page can contain."""
    buffer = BytesIO()
    image.save(buffer, format=form, optimize=True, **options)
    return f"data:image/{form.lower()};base64,{b64encode(buffer.getvalue()).decode()}"
