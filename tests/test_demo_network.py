"""The real network and real photographs: what the maps must equal, on features as they come."""

from functools import partial

import pytest
import references
import skimage.data
import torch
from numpy.testing import assert_allclose
from PIL import Image

from tucker_cam import features
from tucker_cam.decomposition.projection import combined_map, leading_map
from tucker_cam.models import find_target_layer, load_model

PHOTOGRAPHS = ["coffee", "chelsea", "astronaut"]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def demo():
    return load_model("demo")


@pytest.fixture(scope="module")
def images(demo):
    photographs = [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOGRAPHS]
    return torch.stack([demo.preprocess(photograph) for photograph in photographs])


def test_the_network_recognises_the_photographs(demo, images):
    with torch.no_grad():
        probabilities = demo.model(images).softmax(1)
    assert probabilities[0, 967] > 0.9  # espresso
    assert probabilities[1].argmax() in (281, 282, 285)  # tabby, tiger cat, Egyptian cat


def test_the_target_layer_is_the_head(demo):
    name, layer, *_ = find_target_layer(demo.model, torch.zeros(1, 3, 224, 224))
    assert (name, layer) == ("bn2", demo.model.bn2)


@pytest.mark.parametrize(("layer", "shape"), [("blocks", (320, 7, 7)), ("bn2", (1280, 7, 7))])
@pytest.mark.parametrize(
    ("project", "oracle"),
    [
        (leading_map, references.tensorly_tsm),
        (combined_map, references.mtsm),
        (partial(combined_map, combine="energy"), partial(references.mtsm, combine="energy")),
        (partial(combined_map, center=True), references.multivec_eigencam),
        (partial(combined_map, center=True, combine="energy"), partial(references.multivec_eigencam, combine="energy")),
    ],
    ids=["tsm", "mtsm", "mtsm-energy", "multivec-eigencam", "multivec-eigencam, energy"],
)
def test_the_maps_of_real_features_are_tensorlys_or_those_of_a_plain_svd(demo, images, layer, shape, project, oracle):
    (batch,) = features(demo.model, [getattr(demo.model, layer)], images)
    assert batch.shape[1:] == shape
    for saliency, image in zip(project(batch), batch.numpy(), strict=True):
        assert_allclose(references.scaled(saliency), references.scaled(oracle(image)), atol=TOLERANCE)
