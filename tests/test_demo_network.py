"""The real network and real photographs: what the maps must equal, on features as they come."""

import numpy as np
import pytest
import references
import skimage.data
import torch
from numpy.testing import assert_allclose
from PIL import Image

from tucker_cam.decomposition.projection import combined_map, leading_map
from tucker_cam.models import find_target_layer, load_model

PHOTOGRAPHS = ["coffee", "chelsea", "astronaut"]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def demo():
    return load_model("demo")


@pytest.fixture(scope="module")
def features(demo):
    images = [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOGRAPHS]
    seen = {}
    handles = [
        layer.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output.clone()}))
        for name, layer in {"block": demo.model.blocks, "head": demo.model.bn2}.items()
    ]
    with torch.no_grad():
        seen["logits"] = demo.model(torch.stack([demo.preprocess(image) for image in images]))
    for handle in handles:
        handle.remove()
    return seen


def test_the_network_recognises_the_photographs(features):
    probabilities = features["logits"].softmax(1)
    assert probabilities[0, 967] > 0.9  # espresso
    assert probabilities[1].argmax() in (281, 282, 285)  # tabby, tiger cat, Egyptian cat


def test_the_target_layer_is_the_head(demo):
    name, layer, *_ = find_target_layer(demo.model, torch.zeros(1, 3, 224, 224))
    assert (name, layer) == ("bn2", demo.model.bn2)


@pytest.mark.parametrize(("layer", "shape"), [("block", (320, 7, 7)), ("head", (1280, 7, 7))])
def test_the_maps_of_real_features_are_tensorlys(features, layer, shape):
    batch = features[layer]
    assert batch.shape[1:] == shape
    leading, signed, energy = leading_map(batch), combined_map(batch), combined_map(batch, combine="energy")
    for i, image in enumerate(batch.numpy()):
        factor, norms = references.tensorly_factor(image)
        components = np.einsum("cr,chw->rhw", factor, image.astype(np.float64))
        weighted = norms[:, None, None] * components
        for actual, expected in [
            (leading[i], np.abs(components[0])),
            (signed[i], np.abs(weighted.sum(0))),
            (energy[i], np.sqrt((weighted**2).sum(0))),
        ]:
            assert_allclose(references.scaled(actual), references.scaled(expected), atol=TOLERANCE)


@pytest.mark.parametrize("layer", ["block", "head"])
@pytest.mark.parametrize("combine", ["signed", "energy"])
def test_the_centred_maps_of_real_features_are_those_of_a_plain_svd(features, layer, combine):
    batch = features[layer]
    actual = combined_map(batch, combine=combine, center=True)
    for saliency, image in zip(actual, batch.numpy(), strict=True):
        expected = references.scaled(references.multivec_eigencam(image, combine))
        assert_allclose(references.scaled(saliency), expected, atol=TOLERANCE)
