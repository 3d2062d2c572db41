"""Starts the command line, as ``tucker-cam`` or as ``python -m tucker_cam``."""

import io
import sys
from typing import Any

from tucker_cam.extras import install
from tucker_cam.interrupts import INTERRUPTED, importing

_OF_THE_COMMAND_LINE = ("filelock", "rich", "threadpoolctl", "typer")


class _UnlessClosed(io.FileIO):
    """Drops what is written to a pipe that nobody reads any longer, so that the work continues after ``| head -1``."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def main() -> None:
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not stream.isatty():
            raw = io.BufferedWriter(_UnlessClosed(stream.fileno(), "w", closefd=False))
            text = io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering)
            setattr(sys, name, text)
    try:
        with importing():
            from tucker_cam.cli import app

        app()
    except ModuleNotFoundError as error:
        if error.name not in _OF_THE_COMMAND_LINE:
            raise
        sys.exit(f"the command line needs the package {error.name}: {install('demo')}")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
