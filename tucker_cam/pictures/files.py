"""Opens files and URLs as upright RGB pictures; one that cannot be read raises an OSError with a one-line message."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, PLANAR_CONFIGURATION

from tucker_cam.errors import BadFileError
from tucker_cam.text import one_line

_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP", "AVIF")


def open_picture(path: Path) -> Image.Image:
    """Open a picture as RGB, turned as its EXIF data says."""
    with open_file(str(path)) as file:
        return decode_frames(file, str(path), 1)[0]


def is_url(path: str) -> bool:
    """Return whether this is a URL and not a local path."""
    return "://" in path


def open_file(path: str) -> BinaryIO:
    """Open a file for reading, local or at a URL that fsspec knows."""
    if is_url(path):
        import fsspec

        try:
            if "::" not in path:
                return fsspec.open(path, "rb").open()  # type: ignore[no-any-return]
            # An archive is closed with its file system, to which nothing would hold a reference.
            with fsspec.open(path, "rb") as file:
                return io.BytesIO(file.read())
        except Exception as error:
            # Each kind of file system fails in its own ways; an HTTP error has the server's answer as its cause.
            raise BadFileError(f"{path}: could not be opened ({one_line(error.__cause__ or error)})") from error
    # Unlike pathlib's, this check is also False, and raises nothing, for a name that no file can have.
    if not os.path.isfile(path):
        raise BadFileError(f"{path}: expected a file to read, found none, or one that may not be read")
    return Path(path).open("rb")


def decode_frames(file: BinaryIO, name: str, count: int) -> list[Image.Image]:
    """Decode `count` evenly spread RGB frames of a picture, turned as its EXIF data says; a single one is the first.

    If the picture has fewer frames, some are repeated: a still picture is a clip in which nothing moves.
    """
    with _decoding(name), open_image(file) as picture:
        frames = []
        last = getattr(picture, "n_frames", 1) - 1 if count > 1 else 0
        for index in np.linspace(0, last, count).round().astype(int):
            picture.seek(int(index))
            frames.append(_upright_rgb(picture, name))
        return frames


def decoded(picture: Image.Image, name: str) -> Image.Image:
    """Return an opened picture, which may still have to be read, as `decode_frames` does."""
    with _decoding(name):
        return _upright_rgb(picture, name)


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    try:
        yield
    except BadFileError:
        raise
    except UnidentifiedImageError as error:
        raise BadFileError(f"{name}: expected a picture (PNG, JPEG, WebP ...), found a file of another kind") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadFileError(f"{name}: expected a picture of sane size, found a huge one ({error})") from error
    except Exception as error:
        # Pillow's decoders, and odd EXIF data, can raise almost any error.
        raise BadFileError(f"{name}: expected a whole picture, found a broken one ({error})") from error


def _upright_rgb(picture: Image.Image, name: str) -> Image.Image:
    """Return a picture as RGB, turned as its EXIF data says; OSError if Pillow cannot give its values correctly."""
    if picture.mode == "F" or (picture.mode == "I" and picture.format in ("TIFF", None)):
        # Nothing in the picture says which of its values are black and white.
        raise BadFileError(f"{name}: expected a picture of 8 or 16 bits a channel, found one of 32: convert it")
    tags = getattr(picture, "tag_v2", {})
    if tags.get(PLANAR_CONFIGURATION) == 2 and len(bits := tags.get(BITSPERSAMPLE, ())) > 1 and max(bits) > 8:
        raise BadFileError(f"{name}: expected the colours of a pixel together, found planes of 16 bits: convert it")
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I"):
        # Pillow would clip 16-bit greys at 255 instead of scaling them, and takes white for black in some TIFFs.
        grey = (np.asarray(upright) / 257).clip(0, 255).astype(np.uint8)
        upright = Image.fromarray(255 - grey if tags.get(PHOTOMETRIC_INTERPRETATION) == 0 else grey)
    return upright.convert("RGB")


def open_image(file: BinaryIO | Path) -> Image.Image:
    """Open a picture in a common format; refuse one beyond Pillow's limit against decompression bombs.

    Pillow knows other formats too, but for PostScript it would start another program on the file's content.
    """
    Image.init()
    # If asked for a format that it lacks, Pillow fails on every picture.
    formats = [name for name in _FORMATS if name in Image.OPEN]
    picture = Image.open(file, formats=formats)
    # Pillow itself only warns, and a filter for warnings would affect all threads.
    if Image.MAX_IMAGE_PIXELS is not None and picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"{picture.width} x {picture.height} pixels")
    return picture
