"""The type checker that the suite puts over the package's interior: shapes, where a signature states shapes."""

from beartype import beartype

SHAPED = ("[Tensor,", "Unfolding", "Square", "Row", "Scalars")


def check(function):
    """Check calls of a function whose annotations are jaxtyping's; leave public boundaries to their own errors."""
    annotations = " ".join(map(str, getattr(function, "__annotations__", {}).values()))
    return beartype(function) if any(name in annotations for name in SHAPED) else function
