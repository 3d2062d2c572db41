"""Imports the user's own class or function from a name such as MODULE:NAME; this runs code that the user asked for."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from tucker_cam.errors import BadValueError
from tucker_cam.text import kind_and_line


def from_own_module(spec: str) -> Callable[..., object]:
    """Return the class or other callable that MODULE:NAME names; the working directory is put on the path.

    Raises:
        ValueError: the module cannot be imported, or it has no callable of this name.
    """
    module_name, _, name = spec.partition(":")
    # The working directory is on the path with python -m, but not with the command line's own script.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = import_module(module_name)
    except (Exception, SystemExit) as error:
        # A script that does its work or parses arguments when it is imported may end the program with SystemExit.
        raise BadValueError(f"{module_name} could not be imported ({kind_and_line(error)})") from error
    found: object = getattr(module, name, None)
    if not callable(found):
        raise BadValueError(f"{module_name} has no function or class {name!r}")
    return found
