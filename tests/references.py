"""Slow float64 oracles, one image at a time, that never import tucker_cam."""

import warnings
from functools import partial

import numpy as np
import tensorly as tl
from pytorch_grad_cam.utils.image import scale_cam_image
from tensorly.decomposition import tucker


def tensorly_factor(image, rank=None):
    """Return the mode-1 factor and the norms of the core's mode-1 slices, as TensorLy's `tucker` finds them."""
    image = np.asarray(image, dtype=np.float64)
    with tl.backend_context("numpy"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # more channels than positions: it pads the factor
        core, factors = tucker(image, rank=image.shape if rank is None else rank)
    return factors[0], np.linalg.norm(core.reshape(core.shape[0], -1), axis=1)


def tensorly_tsm(image, rank=None):
    factor, _ = tensorly_factor(image, rank)
    return np.abs(np.tensordot(factor[:, 0], np.asarray(image, dtype=np.float64), axes=1))


def tensorly_mtsm(image, rank=None, combine="signed"):
    factor, norms = tensorly_factor(image, rank)
    image = np.asarray(image, dtype=np.float64)
    return combined([s * np.tensordot(a, image, 1) for s, a in zip(norms, factor.T, strict=True)], combine)


def svd_components(image, *, center=False):
    """Return the maps of the unfolding's left singular vectors, each times its value: of the full-rank Tucker, too."""
    image = np.asarray(image, dtype=np.float64)
    unfolding = image.reshape(len(image), -1)
    if center:
        unfolding = unfolding - unfolding.mean(axis=1, keepdims=True)
    vectors, values, _ = np.linalg.svd(unfolding, full_matrices=False)
    components = []
    for u, s in zip(vectors.T, values, strict=True):
        if u[np.argmax(np.abs(u))] < 0:
            u = -u
        components.append((s * u @ unfolding).reshape(image.shape[1:]))
    return components


def combined(components, combine="signed"):
    return np.abs(sum(components)) if combine == "signed" else np.sqrt(sum(part**2 for part in components))


def tsm(image):
    return np.abs(svd_components(image)[0])


def mtsm(image, combine="signed"):
    return combined(svd_components(image), combine)


def multivec_eigencam(image, combine="signed"):
    return combined(svd_components(image, center=True), combine)


def lafam(image):
    means = sum(np.asarray(channel, dtype=np.float64) for channel in image) / len(image)
    return means - means.min()


def gap_weighted(image):
    return np.abs(sum(channel.mean() * channel for channel in np.asarray(image, dtype=np.float64)))


# Of each method of this project, by its name: from channels x spatial to a map that is not yet scaled.
ORACLES = {
    "tsm": tsm,
    "mtsm": mtsm,
    "mtsm-energy": partial(mtsm, combine="energy"),
    "multivec-eigencam": multivec_eigencam,
    "lafam": lafam,
    "gap-weighted": gap_weighted,
}


def scaled(saliency):
    """Scale one map to [0, 1], as the host does before it resizes; one without contrast becomes zeros."""
    saliency = np.asarray(saliency, dtype=np.float64)
    above = saliency - saliency.min()
    return above / above.max() if above.max() > 1e-10 else np.zeros_like(above)


def explained(oracle, *layers, size=None):
    """Return what the host makes of the oracle's maps of these layers' features; the last axis of the size is first."""
    by_layer = []
    for features in layers:
        images = features.detach().cpu().double().numpy()
        moderate = [image / max(np.abs(image).max(), np.finfo(float).tiny) for image in images]
        by_layer.append(scale_cam_image([scaled(oracle(image)) for image in moderate], size))
    return scale_cam_image(np.mean(by_layer, axis=0))
