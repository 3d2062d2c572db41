"""Errors that a user can mend: one kind, and each is also the built-in kind that fits. What failed is a value."""

import re
from typing import NamedTuple

from tucker_cam.text import one_line


class TuckerCamError(Exception):
    """What was given cannot be used; the message says what was expected, what came and what to do."""


class BadValueError(TuckerCamError, ValueError):
    """An argument of the right type has a value that cannot be used."""


class BadTypeError(TuckerCamError, TypeError):
    """An argument is of a type that cannot be used."""


class BadFileError(TuckerCamError, OSError):
    """A file, folder or URL cannot be read or written."""


class MissingPackageError(TuckerCamError, ModuleNotFoundError):
    """A package of an extra is not installed; the message holds the command that installs it."""


class Failure(NamedTuple):
    """A picture that could not be read, explained, scored or written.

    Attributes:
        name: of the picture, or what was given in its place.
        error: why; with its traceback.
        method: the one that failed, where others did not; empty where it is the picture that has nothing.
    """

    name: str
    error: Exception
    method: str = ""

    def __str__(self) -> str:
        line = one_line(self.error)
        name = f"{self.name}, {self.method}" if self.method else self.name
        # The line may begin with the whole path, of which the name is the end.
        return line if re.match(rf"(.*/)?{re.escape(name)}[:,] ", line) else f"{name}: {line}"
