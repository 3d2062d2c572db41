"""Files and URLs in, upright RGB pictures out; what cannot be read is an OSError with one line for a user."""

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
    """Tell a URL from a local path."""
    return "://" in path


def open_file(path: str) -> BinaryIO:
    """Open a file to read, local or at a URL that fsspec knows."""
    if is_url(path):
        import fsspec

        try:
            if "::" not in path:
                return fsspec.open(path, "rb").open()  # type: ignore[no-any-return]
            # An archive is closed with its file system, which nobody would hold.
            with fsspec.open(path, "rb") as file:
                return io.BytesIO(file.read())
        except Exception as error:
            # A file system of another kind fails in its own ways; what the server said is the cause of HTTP's.
            raise BadFileError(f"{path}: could not be opened ({one_line(error.__cause__ or error)})") from error
    # Unlike pathlib's, this tells no from yes for a name that no file can have, too.
    if not os.path.isfile(path):
        raise BadFileError(f"{path}: expected a file to read, found none, or what may not be read")
    return Path(path).open("rb")


def decode_frames(file: BinaryIO, name: str, count: int) -> list[Image.Image]:
    """Decode a picture as so many RGB frames, evenly spread, turned as its EXIF data says; one is the first.

    Of fewer frames some are shown more than once: a still picture is a clip in which nothing moves.
    """
    with _decoding(name), open_image(file) as picture:
        frames = []
        last = getattr(picture, "n_frames", 1) - 1 if count > 1 else 0
        for index in np.linspace(0, last, count).round().astype(int):
            picture.seek(int(index))
            frames.append(_upright_rgb(picture, name))
        return frames


def decoded(picture: Image.Image, name: str) -> Image.Image:
    """Return a picture that may still have to be read, as `decode_frames` does."""
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
        # Pillow's decoders, and EXIF data of its own kind, raise nearly anything.
        raise BadFileError(f"{name}: expected a whole picture, found a broken one ({error})") from error


def _upright_rgb(picture: Image.Image, name: str) -> Image.Image:
    """Return a picture as RGB, turned as its EXIF data says; OSError for what Pillow has not the right numbers of."""
    if picture.mode == "F" or (picture.mode == "I" and picture.format in ("TIFF", None)):
        # Nothing in the picture says which of its numbers are black and white.
        raise BadFileError(f"{name}: expected a picture of 8 or 16 bits a channel, found one of 32: convert it")
    tags = getattr(picture, "tag_v2", {})
    if tags.get(PLANAR_CONFIGURATION) == 2 and len(bits := tags.get(BITSPERSAMPLE, ())) > 1 and max(bits) > 8:
        raise BadFileError(f"{name}: expected the colours of a pixel together, found planes of 16 bits: convert it")
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I"):
        # Pillow would cut 16-bit greys off at 255 instead of scaling them, and takes white for black in some TIFFs.
        grey = (np.asarray(upright) / 257).clip(0, 255).astype(np.uint8)
        upright = Image.fromarray(255 - grey if tags.get(PHOTOMETRIC_INTERPRETATION) == 0 else grey)
    return upright.convert("RGB")


def open_image(file: BinaryIO | Path) -> Image.Image:
    """Open a picture of a usual format, and none beyond Pillow's limit against decompression bombs.

    Pillow knows other formats, of which PostScript would start another program on what is in the file.
    """
    Image.init()
    # Asked for a format that it has not, it fails on every picture.
    formats = [name for name in _FORMATS if name in Image.OPEN]
    picture = Image.open(file, formats=formats)
    # Pillow itself warns, and a filter of warnings would be one for all threads.
    if Image.MAX_IMAGE_PIXELS is not None and picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"{picture.width} x {picture.height} pixels")
    return picture
