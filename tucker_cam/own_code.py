"""Imports the user's own class or function from a name such as MODULE:NAME; this runs code that the user asked for."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from tucker_cam.errors import BadValueError, MissingPackageError


def from_own_module(spec: str) -> Callable[..., object]:
    """Return the class or other callable that MODULE:NAME names; the working directory is put on the path.

    Raises:
        ValueError: the module or the name does not exist, it is not callable, or the module's own code failed.
        ModuleNotFoundError: the module imports another one that is not installed.
    """
    module_name, _, name = spec.partition(":")
    # The working directory is on the path with python -m, but not with the command line's own script.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise MissingPackageError(f"{module_name} could not be imported ({error})", name=error.name) from error
        raise BadValueError(f"there is no module {error.name!r} here, which {spec!r} refers to") from error
    except (Exception, SystemExit) as error:
        # A script that does its work or parses arguments when it is imported may end the program with SystemExit.
        raise BadValueError(f"{module_name} could not be imported ({type(error).__name__}: {error})") from error
    found: object = getattr(module, name, None)
    if not callable(found):
        raise BadValueError(f"{module_name} has no function or class {name!r}")
    return found
