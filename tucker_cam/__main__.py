"""The command line's entry: ``tucker-cam`` and ``python -m tucker_cam``."""

import sys


def main() -> None:
    try:
        from tucker_cam.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"the command line needs the package {error.name}: pip install 'tucker-cam[demo]'")
    app()


if __name__ == "__main__":
    main()
