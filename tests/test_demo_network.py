"""The real network and real photographs: what the maps must equal, on features as they come."""

import pytest
import references
import skimage.data
import torch
from numpy.testing import assert_allclose
from PIL import Image
from registry import every_method_and_its_oracle

from tucker_cam.models import load_model

PHOTOGRAPHS = ["coffee", "chelsea", "astronaut"]


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


@pytest.mark.parametrize(("layer", "shape"), [("blocks", (320, 7, 7)), ("bn2", (1280, 7, 7))])
@every_method_and_its_oracle
def test_the_maps_of_real_features_are_the_references(demo, images, layer, shape, method, oracle):
    with method(demo.model, [getattr(demo.model, layer)]) as cam:
        saliency = cam(images)
        (batch,) = cam.activations_and_grads.activations
    assert batch.shape[1:] == shape
    assert_allclose(saliency, references.explained(oracle, batch, size=(224, 224)), atol=1e-5)
