"""MODULE:NAME in, what stands under that name in a module of the user's own out: code that the user asked to run."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from tucker_cam.errors import BadValueError, MissingPackageError


def from_own_module(spec: str) -> Callable[..., object]:
    """Return what MODULE:NAME names, a class or another callable; the working directory is put on the path.

    Raises:
        ValueError: there is no such module or name, it is not callable, or the module's own code failed.
        ModuleNotFoundError: the module imports another that is not there.
    """
    module_name, _, name = spec.partition(":")
    # As python -m has it, and the command line's own script has not.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise MissingPackageError(f"{module_name} could not be imported ({error})", name=error.name) from error
        raise BadValueError(f"there is no module {error.name!r} here, of which {spec!r} speaks") from error
    except (Exception, SystemExit) as error:
        # A script that does its work, or reads its arguments, when it is imported ends the program so.
        raise BadValueError(f"{module_name} could not be imported ({type(error).__name__}: {error})") from error
    found: object = getattr(module, name, None)
    if not callable(found):
        raise BadValueError(f"{module_name} has no function or class {name!r}")
    return found
