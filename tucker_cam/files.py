"""Picture files in, upright RGB pictures out; and what is written takes its name only when it is whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


def open_picture(path: Path) -> Image.Image:
    """Open a picture as RGB, turned as its EXIF data says.

    Raises:
        OSError: the file is missing, no picture, broken, or too large to be meant (Pillow's limit against
            decompression bombs); the message is one line for a user.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a picture, found {'a folder' if path.is_dir() else 'no such file'}")
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture)
            if upright.mode.startswith("I"):
                # Pillow would cut 16-bit greys off at 255 instead of scaling them.
                upright = Image.fromarray((np.asarray(upright) / 257).clip(0, 255).astype(np.uint8))
            return upright.convert("RGB")
    except UnidentifiedImageError as error:
        raise OSError(f"{path}: expected a picture (PNG, JPEG, WebP ...), found a file of another kind") from error
    except Image.DecompressionBombError as error:
        raise OSError(f"{path}: expected a picture of sane size, found a huge one ({error})") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise OSError(f"{path}: expected a whole picture, found a broken one ({error})") from error


def printable(text: str) -> str:
    """Return a text as any terminal can show it: bytes of a file's name that are no UTF-8 are written as escapes."""
    return text.encode(errors="backslashreplace").decode()


@contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """Give a path to write to, which takes its real name only when the block ends without an error.

    Raises:
        OSError: the path is there, and is no file; or it cannot be written.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: expected a file to write, found a folder or a device")
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
