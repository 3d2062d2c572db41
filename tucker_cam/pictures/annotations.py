"""Finds a folder's pictures and, if boxes or masks are given, the mask of each one's objects as the network sees it."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple
from xml.etree.ElementTree import ParseError

import numpy as np
import torch
from defusedxml import ElementTree
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from tucker_cam.arguments import check_choice
from tucker_cam.errors import BadFileError, BadValueError
from tucker_cam.models import Network
from tucker_cam.models.network import preprocessed
from tucker_cam.pictures.files import open_image, open_picture
from tucker_cam.pictures.sources import (
    ANNOTATED,
    PICTURES,
    SINGLE_OBJECTS,
    files_below,
    is_annotation,
    random_sample,
    without_results,
)

Annotations = Literal["boxes", "masks", "none"]
# The size of a picture as it is shown, and as its file stores it.
_Sizes = tuple[tuple[int, int], tuple[int, int]]

_WHERE = "by a picture's name, boxes are found beside it or in annotations, masks in masks or SegmentationClass"
_BLURRING = ("AVIF", "JPEG", "JPEG2000", "WEBP")
_NOT_SCORED = "so not scored on localisation"


class Sample(NamedTuple):
    """A picture in a folder: its path below the folder, with slashes, its file, and its annotation's file, if any."""

    name: str
    picture: Path
    annotation: Path | None


class Samples(NamedTuple):
    """A folder's pictures, sorted by name, the kind of their annotations, and messages on what looks wrong."""

    samples: list[Sample]
    annotations: Annotations
    remarks: list[str]


class NetworkView(NamedTuple):
    """The network's input for a sample, the mask of its objects (bool, height x width), and messages on what is odd."""

    network_input: Tensor
    mask: Tensor
    remarks: list[str]


def find_samples(folder: Path, *, annotations: Annotations | None = None, limit: int | None = None) -> Samples:
    """Find the pictures in a folder, at any depth, and their annotations.

    The layouts of torchvision's `ImageFolder`, `VOCDetection` and `VOCSegmentation` are read as they are. Boxes are
    Pascal VOC XML files with the picture's name, beside it or in a folder ``annotations``. Masks are pictures with its
    name in a folder ``masks`` or ``SegmentationClass``. If you ask for one kind of `annotations`, pictures without it
    are left out; None keeps all, with boxes if there are any, else masks. For what else is left out see `find_sources`.

    Raises:
        OSError, ValueError: the folder does not exist, or holds no pictures or none with these annotations.
    """
    if annotations is not None:
        check_choice("annotations", annotations, Annotations)
    if not folder.is_dir():
        there = "a file" if folder.exists() else "none of that name"
        raise BadFileError(f"{folder}: expected a folder of pictures, found {there}")
    files: dict[Annotations, list[Path]] = {"boxes": [], "masks": [], "none": []}
    for path in sorted(without_results(files_below(folder, PICTURES | {".xml"}), folder)):
        if path.suffix.lower() == ".xml":
            files["boxes"].append(path)
        elif SINGLE_OBJECTS not in path.relative_to(folder).parts:
            files["masks" if is_annotation(path, folder) else "none"].append(path)
    pictures = files.pop("none")
    if not pictures:
        raise BadValueError(f"{folder}: expected pictures ({' '.join(sorted(PICTURES))}) at any depth, found none")
    found: dict[Annotations, dict[Path, Path | None]] = {"none": {}}
    for each, paths in files.items():
        by_name = {path.with_suffix(""): path for path in paths}
        found[each] = {picture: _annotation(picture, folder, each, by_name) for picture in pictures}
    used = {annotation for by_picture in found.values() for annotation in by_picture.values()}
    remarks = _overlooked(pictures, [path for paths in files.values() for path in paths if path not in used])
    first: Annotations = next((each for each in files if any(found[each].values())), "none")
    kind = annotations or first
    samples = [Sample(path.relative_to(folder).as_posix(), path, found[kind].get(path)) for path in pictures]
    if annotations in files:
        samples = [sample for sample in samples if sample.annotation is not None]
    if not samples:
        found_none = f"{folder}: expected pictures with {kind}, found none among {len(pictures)}"
        raise BadValueError("; ".join([found_none, *remarks]))
    return Samples(random_sample(samples, limit), kind, remarks)


def network_view(sample: Sample, annotations: Annotations, network: Network) -> NetworkView:
    """Read and preprocess a sample and its annotation; OSError or ValueError if either fails or they do not match."""
    picture = open_picture(sample.picture)
    network_input = preprocessed(network.preprocess, picture, str(sample.picture))
    if sample.annotation is None or annotations == "none":
        remarks = [] if annotations == "none" else [f"{sample.picture}: without {annotations}, {_NOT_SCORED}"]
        return NetworkView(network_input, torch.zeros(network_input.shape[-2:], dtype=torch.bool), remarks)
    with open_image(sample.picture) as stored:
        sizes, orientation = (picture.size, stored.size), stored.getexif().get(ExifTags.Base.Orientation, 1)
    drawn = (_draw_boxes if annotations == "boxes" else _read_mask)(sample.annotation, sizes)
    # The annotation goes through the model's own preprocessing, so it is resized and cropped exactly as the picture is.
    black_and_white = Image.fromarray(drawn).convert("RGB")
    if black_and_white.size != picture.size:
        # The annotation was drawn on the file as it is stored, so it is turned as the photograph was.
        black_and_white.getexif()[ExifTags.Base.Orientation] = orientation
        black_and_white = ImageOps.exif_transpose(black_and_white)
    mask_input = preprocessed(network.preprocess, black_and_white, str(sample.annotation))
    # Whatever is bright in a black picture is padding.
    black_input = preprocessed(network.preprocess, Image.new("RGB", picture.size), str(sample.annotation))
    white, padding = (torch.from_numpy(network.picture(each)[..., 0] > 0.5) for each in (mask_input, black_input))
    mask = white & ~padding
    why = "its object is cropped away or too small for the network" if drawn.any() else "without an object"
    remarks = [] if mask.any() else [f"{sample.annotation}: {why}, {_NOT_SCORED}"]
    return NetworkView(network_input, mask, remarks)


def _annotation(picture: Path, folder: Path, kind: Annotations, by_name: Mapping[Path, Path]) -> Path | None:
    """Find it beside its picture, or in a folder above that mirrors its path, with or without the first part."""
    below = picture.relative_to(folder).with_suffix("").parts
    places = [picture.with_suffix("")] if kind == "boxes" else []
    for depth in reversed(range(len(below))):
        for name in ANNOTATED[kind]:
            beside = folder.joinpath(*below[:depth], name)
            places += [beside.joinpath(*rest) for rest in (below[depth:], below[depth + 1 :]) if rest]
    return next((by_name[place] for place in places if place in by_name), None)


def _overlooked(pictures: Sequence[Path], unused: Sequence[Path]) -> list[str]:
    """Return messages on annotations without a picture, and on grey folders whose names all recur in a coloured one."""
    remarks = []
    if unused:
        remarks.append(f"XML files or masks that belong to no picture: {len(unused)}, {unused[0]} among them: {_WHERE}")
    in_folder: dict[Path, dict[str, Path]] = {}
    for picture in pictures:
        in_folder.setdefault(picture.parent, {})[picture.stem] = picture
    first = {parent: _mode(next(iter(by_name.values()))) for parent, by_name in in_folder.items()}
    coloured = [in_folder[parent].keys() for parent, mode in first.items() if mode == "RGB"]
    for parent, mode in first.items():
        if mode in ("1", "L", "P") and any(in_folder[parent].keys() <= names for names in coloured):
            remarks.append(f"{parent}: taken for pictures, though these look like masks of others: {_WHERE}")
    return remarks


def _mode(picture: Path) -> str | None:
    # Pillow's decoders raise nearly anything.
    with suppress(Exception), open_image(picture) as opened:
        return opened.mode
    return None


def _draw_boxes(file: Path, sizes: _Sizes) -> NDArray[np.bool_]:
    """Return the union of the boxes in a Pascal VOC file, which counts pixels from 1 and includes both ends."""
    try:
        root = ElementTree.parse(file).getroot()
        width, height = (round(float(root.findtext(f"size/{name}") or 0)) for name in ("width", "height"))
        corners = ("xmin", "ymin", "xmax", "ymax")
        boxes = [[round(float(box.findtext(name, ""))) for name in corners] for box in root.iterfind("object/bndbox")]
    except (ParseError, ValueError, LookupError, OverflowError) as error:
        raise BadValueError(f"{file}: expected boxes as Pascal VOC XML, found something else ({error})") from error
    if not width or not height:
        width, height = sizes[0]
    _check_size(file, (width, height), sizes)
    drawn = np.zeros((height, width), dtype=bool)
    for left, top, right, bottom in boxes:
        inside = drawn[max(top - 1, 0) : max(bottom, 0), max(left - 1, 0) : max(right, 0)]
        if not inside.size:
            where = f"{left}, {top} to {right}, {bottom}"
            raise BadValueError(f"{file}: expected boxes inside the picture, {width} x {height}, found {where}")
        inside[:] = True
    return drawn


def _read_mask(file: Path, sizes: _Sizes) -> NDArray[np.bool_]:
    """Return where a mask is not black; if its palette starts with black, as VOC's, where it is neither 0 nor void.

    Where compression blurs the edges, and with other palettes, the brighter half is the object.
    """
    try:
        with open_image(file) as mask:
            mode, is_blurred, palette = mask.mode, mask.format in _BLURRING, mask.getpalette() or [0, 0, 0]
            colours = np.asarray(mask.convert("RGB")) if mode in ("P", "CMYK") else None
            values = np.atleast_3d(np.asarray(mask))
    except Exception as error:
        # Pillow's decoders raise nearly anything.
        raise BadFileError(f"{file}: expected a mask as a picture, found none or a broken one ({error})") from error
    _check_size(file, (values.shape[1], values.shape[0]), sizes)
    drawn = values > (127 if is_blurred and values.max() > 127 else 0)
    if colours is not None and (mode == "CMYK" or any(palette[:3])):
        drawn = colours > 127
    elif colours is not None:
        drawn &= (values != 255) | (colours == 255).all(-1, keepdims=True)
    elif mode.endswith("A"):
        drawn = drawn[..., :-1] & drawn[..., -1:]
    return np.asarray(drawn.any(-1))


def _check_size(file: Path, found: tuple[int, int], sizes: _Sizes) -> None:
    if found not in sizes:
        expected = "{} x {}, found one of {} x {}".format(*sizes[0], *found)
        raise BadValueError(f"{file}: expected an annotation of a picture of {expected}")
