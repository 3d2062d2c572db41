"""The type checker that the suite puts over the package's interior: shapes, where a signature states shapes."""

from beartype import beartype


def check(function):
    """Check calls of a function whose annotations are jaxtyping's; leave public boundaries to their own errors."""
    annotations = getattr(function, "__annotations__", {}).values()
    return beartype(function) if any("[Tensor," in str(annotation) for annotation in annotations) else function
