"""Defines the errors that a user can fix, each also a fitting built-in error, and `Failure`, which holds one."""

import re
from typing import NamedTuple

from tucker_cam.text import one_line


class TuckerCamError(Exception):
    """Something that you passed cannot be used; the message says what was expected, what came and what to do."""


class BadValueError(TuckerCamError, ValueError):
    """An argument has the right type, but a value that cannot be used."""


class BadTypeError(TuckerCamError, TypeError):
    """An argument has a type that cannot be used."""


class BadFileError(TuckerCamError, OSError):
    """A file, folder or URL cannot be read or written."""


class MissingPackageError(TuckerCamError, ModuleNotFoundError):
    """A package of an extra is not installed; the message holds the command that installs it."""


class Failure(NamedTuple):
    """A picture that could not be read, explained, scored or written.

    Attributes:
        name: the picture's name, or what was passed if it leads to no picture.
        error: the reason, with its traceback.
        method: the method that failed while others did not; empty if no method has a result for the picture.
    """

    name: str
    error: Exception
    method: str = ""

    def __str__(self) -> str:
        line = one_line(self.error)
        name = f"{self.name}, {self.method}" if self.method else self.name
        # The line may begin with the whole path, which ends in the name.
        return line if re.match(rf"(.*/)?{re.escape(name)}[:,] ", line) else f"{name}: {line}"
