"""Holds, in one place, the command that installs an extra of this distribution."""


def install(extra: str) -> str:
    """Return the command, for people to read; no index has the distribution yet, so a checkout is installed."""
    return f"pip install '.[{extra}]' in a checkout of tucker_cam"
