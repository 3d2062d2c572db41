"""The name of an extra of this distribution in, the command that installs it out: written down once."""


def install(extra: str) -> str:
    """Return the command for people; no index has the distribution yet, so it is installed from a checkout."""
    return f"pip install '.[{extra}]' in a checkout of tucker_cam"
