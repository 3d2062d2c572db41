"""A folder in, its pictures out, with the object's mask as the network sees it where boxes or masks are given.

Boxes and masks go through the model's own preprocessing, as a black and white picture of the photograph's size, and so
follow its resizing and cropping to the pixel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple
from xml.etree.ElementTree import Element, ParseError

import numpy as np
import torch
from defusedxml import DefusedXmlException, ElementTree
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from tucker_cam.errors import BadFileError, BadValueError
from tucker_cam.models import Network
from tucker_cam.models.families import preprocessed
from tucker_cam.pictures.files import files_below, open_image, open_picture
from tucker_cam.pictures.sources import random_sample

Annotations = Literal["boxes", "masks", "none"]

_Role = Literal["pictures", "boxes", "masks", "misplaced", "objects"]

_ORIENTATION = 0x0112
_MODES_OF_MASKS = ("1", "L", "P")
_VOID = 255


@dataclass(frozen=True)
class Sample:
    """A picture of a folder.

    Attributes:
        name: its path below the folder, with slashes.
        picture: its file.
        annotation: the file with its boxes or its mask; None if there is none.
    """

    name: str
    picture: Path
    annotation: Path | None


class Samples(NamedTuple):
    """What a folder holds.

    Attributes:
        samples: the pictures, in the order of their names.
        annotations: what theirs are.
        remarks: a line on annotations of no picture, and one on each folder of pictures that look like masks.
    """

    samples: list[Sample]
    annotations: Annotations
    remarks: list[str]


class NetworkView(NamedTuple):
    """What the network sees of a sample.

    Attributes:
        network_input: channels x height x width.
        mask: bool, height x width, true on an object; all false where the picture has no annotation.
        remarks: what a user should know about this sample, a line each.
    """

    network_input: Tensor
    mask: Tensor
    remarks: list[str]


def find_samples(
    folder: Path, *, annotations: Annotations | None = None, limit: int | None = None, seed: int = 0
) -> Samples:
    """Find the pictures of a folder, at any depth, and their annotations.

    The layouts of torchvision's `ImageFolder`, `VOCDetection` and `VOCSegmentation` are read as they are: boxes are
    Pascal VOC XML files of the picture's name, beside it or in a folder ``annotations``; masks are pictures of its name
    in a folder ``masks`` or ``SegmentationClass``. Hidden files are left out.

    Args:
        folder: where the pictures are.
        annotations: which to take; then pictures without one are left out. None takes boxes if there are any, or
            masks, and all pictures.
        limit: take a random sample of so many pictures, the same for the same seed; a smaller sample is part of a
            larger one.
        seed: of the sample.

    Returns:
        The samples, what their annotations are, and what was overlooked.

    Raises:
        OSError: there is no such folder.
        ValueError: there are no pictures in it, or no annotations of the kind that was asked for; or the limit is
            below 1.
    """
    if not folder.is_dir():
        raise BadFileError(f"{folder}: expected a folder of pictures, found {_what_is(folder)}")
    files = _files(folder)
    pictures, files_of = files["pictures"], _by_name(files)
    if not pictures:
        raise BadValueError(f"{folder}: expected pictures ({' '.join(IMG_EXTENSIONS)}) at any depth, found none")
    remarks = _overlooked(folder, files)
    found: dict[Annotations, list[Sample]] = {
        kind: [
            Sample(path.relative_to(folder).as_posix(), path, _annotation(path, folder, kind, of_kind))
            for path in pictures
        ]
        for kind, of_kind in files_of.items()
    }
    fitting = (each for each in files_of if any(sample.annotation is not None for sample in found[each]))
    kind: Annotations = next(fitting, "none") if annotations is None else annotations
    samples = found[kind]
    if annotations in ("boxes", "masks"):
        samples = [sample for sample in samples if sample.annotation is not None]
        if not samples:
            said = "".join(f"; {remark}" for remark in remarks)
            raise BadValueError(
                f"{folder}: expected pictures with {annotations}, found none among {len(pictures)}{said}"
            )
    return Samples(random_sample(samples, limit, seed=seed), kind, remarks)


def _overlooked(folder: Path, files: Mapping[_Role, Sequence[Path]]) -> list[str]:
    """Return a line on annotations of no picture, and one on each folder of pictures that look like masks.

    The first lie in another folder than is looked into, or have other names than their pictures. The others are scored
    as pictures: they are grey or of colour numbers, and another folder has pictures of all their names in colour.
    """
    found = {
        _annotation(picture, folder, kind, of_kind)
        for kind, of_kind in _by_name(files).items()
        for picture in files["pictures"]
    }
    unused = [file for kind in ("boxes", "masks", "misplaced") for file in files[kind] if file not in found]
    remarks = []
    if unused:
        remarks.append(f"XML files or masks that belong to no picture: {len(unused)}, {unused[0]} among them: {_WHERE}")
    in_folder: dict[Path, dict[str, Path]] = {}
    for picture in files["pictures"]:
        in_folder.setdefault(picture.parent, {})[picture.stem] = picture
    first = {parent: _mode(next(iter(by_name.values()))) for parent, by_name in in_folder.items()}
    coloured = [in_folder[parent].keys() for parent, mode in first.items() if mode == "RGB"]
    for parent, mode in first.items():
        if mode in _MODES_OF_MASKS and any(in_folder[parent].keys() <= names for names in coloured):
            remarks.append(f"{parent}: taken for pictures, though these look like masks of others: {_WHERE}")
    return remarks


def network_view(sample: Sample, annotations: Annotations, network: Network) -> NetworkView:
    """Read a sample and preprocess it for the network, and its annotation with it.

    Raises:
        OSError: the picture or its mask cannot be read.
        ValueError: the annotation is none, or does not fit the picture; or the preprocessing failed on it.
    """
    picture = open_picture(sample.picture)
    network_input = preprocessed(network.preprocess, picture, str(sample.picture))
    nothing = torch.zeros(network_input.shape[-2:], dtype=torch.bool)
    if annotations == "none":
        return NetworkView(network_input, nothing, [])
    if sample.annotation is None:
        return NetworkView(
            network_input, nothing, [f"{sample.picture}: without {annotations}, so not scored on localisation"]
        )
    if annotations == "boxes":
        drawn, remarks = _draw_boxes(sample.annotation, picture.size, sample.picture)
    else:
        drawn, remarks = _read_mask(sample.annotation), []
    with open_image(sample.picture) as stored:
        stored_size, orientation = stored.size, stored.getexif().get(_ORIENTATION, 1)
    if orientation != 1 and drawn.shape[::-1] == picture.size == stored_size:
        remarks.append(f"{sample.annotation}: taken to be drawn on {sample.picture.name} as its EXIF data turns it")
    if not drawn.any():
        empty = [f"{sample.annotation}: without an object, so not scored on localisation"]
        return NetworkView(network_input, nothing, remarks + empty)
    black_and_white = Image.fromarray(drawn.astype(np.uint8) * 255)
    if black_and_white.size not in (picture.size, stored_size):
        raise _does_not_fit(sample.annotation, sample.picture, picture.size, black_and_white.size)
    if black_and_white.size != picture.size:
        # Drawn on the file as it is stored: turned as the photograph was.
        black_and_white.getexif()[_ORIENTATION] = orientation
        black_and_white = ImageOps.exif_transpose(black_and_white)
    mask_input = preprocessed(network.preprocess, black_and_white.convert("RGB"), str(sample.annotation))
    mask = torch.from_numpy(network.picture(mask_input)[..., 0] > 0.5)
    if not mask.any():
        why = "its object is cropped away or too small for the network, so not scored on localisation"
        remarks = [*remarks, f"{sample.annotation}: {why}"]
    return NetworkView(network_input, mask, remarks)


def _files(folder: Path) -> dict[_Role, list[Path]]:
    files: dict[_Role, list[Path]] = {"pictures": [], "boxes": [], "masks": [], "misplaced": [], "objects": []}
    for path in sorted(files_below(folder, {*IMG_EXTENSIONS, ".xml"})):
        files[_role(path, folder)].append(path)
    return files


def _by_name(files: Mapping[_Role, Sequence[Path]]) -> dict[Annotations, dict[Path, Path]]:
    """Return the annotations of each kind by their paths without the suffix."""
    boxes, masks = ({path.with_suffix(""): path for path in files[kind]} for kind in _ANNOTATION_FOLDERS)
    return {"boxes": boxes, "masks": masks, "none": {}}


def _mode(picture: Path) -> str | None:
    """Return how a picture holds its colours, as Pillow names it; None where it cannot be read."""
    try:
        with open_image(picture) as opened:
            return opened.mode
    except Exception:
        # Pillow's decoders raise nearly anything.
        return None


def _draw_boxes(file: Path, size: tuple[int, int], picture: Path) -> tuple[NDArray[np.bool_], list[str]]:
    """Return the union of the boxes of a Pascal VOC file, whose pixels are counted from 1 with both ends inside."""
    try:
        root = ElementTree.parse(file).getroot()
    except (ParseError, DefusedXmlException, ValueError, LookupError) as error:
        raise BadValueError(f"{file}: expected boxes as Pascal VOC XML, found something else ({error})") from error
    width, height = (_number(root, f"size/{name}", file) if root.find("size") is not None else 0 for name in _SIZE)
    if not width or not height:
        width, height = size
    if (width, height) not in (size, size[::-1]):
        raise _does_not_fit(file, picture, size, (width, height))
    drawn = np.zeros((height, width), dtype=bool)
    remarks = []
    for box in root.iterfind("object/bndbox"):
        left, top, right, bottom = (_number(box, name, file) for name in _CORNERS)
        if left > right or top > bottom or left > width or top > height or right < 1 or bottom < 1:
            raise BadValueError(
                f"{file}: expected boxes inside the picture, {width} x {height}, found {left}, {top} to {right}, "
                f"{bottom}"
            )
        if left < 0 or top < 0 or right > width or bottom > height:
            remarks.append(f"{file}: a box reaches beyond {picture.name}, and was cut off at its edge")
        drawn[max(top - 1, 0) : bottom, max(left - 1, 0) : right] = True
    return drawn, remarks


_SIZE = ("width", "height")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def _number(element: Element, name: str, file: Path) -> int:
    text = element.findtext(name)
    try:
        return round(float(text or ""))
    except (ValueError, OverflowError) as error:
        raise BadValueError(f"{file}: expected a number as <{name}>, found {text!r}") from error


def _read_mask(file: Path) -> NDArray[np.bool_]:
    """Return where a mask is not black; in one of colour numbers, as VOC's, where these are neither 0 nor 255, void.

    JPEG blurs the edges of what was drawn: there the brighter half is the object.
    """
    try:
        with open_image(file) as mask:
            values, mode, least = np.asarray(mask), mask.mode, 127 if mask.format == "JPEG" else 0
    except Exception as error:
        # Pillow's decoders raise nearly anything.
        raise BadFileError(f"{file}: expected a mask as a picture, found none or a broken one ({error})") from error
    drawn = np.asarray(values > least)
    if mode == "P":
        drawn &= values != _VOID
    elif mode in ("LA", "RGBA"):
        drawn = np.asarray(drawn[..., :-1].any(-1) & drawn[..., -1])
    elif drawn.ndim == 3:
        drawn = np.asarray(drawn.any(-1))
    return drawn


def _does_not_fit(file: Path, picture: Path, expected: tuple[int, int], found: tuple[int, int]) -> ValueError:
    return BadValueError(
        f"{file}: expected an annotation of a picture of {expected[0]} x {expected[1]} as {picture.name}, found one of "
        f"{found[0]} x {found[1]}"
    )


def _annotation(picture: Path, folder: Path, kind: Annotations, files: Mapping[Path, Path]) -> Path | None:
    """Return the annotation of this picture's name: beside it, or in an annotation folder above that mirrors its.

    Args:
        picture: the picture.
        folder: of all pictures.
        kind: of annotations that are wanted.
        files: all there are, by their paths without the suffix.
    """
    below = picture.relative_to(folder).with_suffix("")
    candidates = [picture.with_suffix("")] if kind == "boxes" else []
    for depth in range(len(below.parts) - 1, -1, -1):
        ancestor, rest = folder.joinpath(*below.parts[:depth]), below.parts[depth:]
        for name in () if kind == "none" else _ANNOTATION_FOLDERS[kind]:
            candidates += [ancestor.joinpath(name, *rest), ancestor.joinpath(name, *rest[1:])]
    return next((files[candidate] for candidate in candidates if candidate in files), None)


_ANNOTATION_FOLDERS: dict[Literal["boxes", "masks"], tuple[str, ...]] = {
    "boxes": ("annotations", "Annotations"),
    "masks": ("masks", "Masks", "SegmentationClass"),
}

_WHERE = (
    "those of a picture's name are found, boxes beside it or in a folder annotations, masks in masks or "
    "SegmentationClass"
)


def _role(path: Path, folder: Path) -> _Role:
    """Tell by its suffix and the folders above what a file is: misplaced is a picture where boxes are looked for."""
    if path.suffix.lower() == ".xml":
        return "boxes"
    parts = set(path.relative_to(folder).parts[:-1])
    if parts & {*_ANNOTATION_FOLDERS["masks"]}:
        return "masks"
    # VOC's masks of single objects, which are known and not needed.
    if "SegmentationObject" in parts:
        return "objects"
    return "misplaced" if parts & {*_ANNOTATION_FOLDERS["boxes"]} else "pictures"


def _what_is(path: Path) -> str:
    return "a file" if path.exists() else "nothing of that name"
