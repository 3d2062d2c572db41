"""Every way pytorch-grad-cam itself uses a CAM class, with ours put in."""

from importlib.metadata import version

import numpy as np
import pytest
import torch
import torchvision
from packaging.version import Version
from pytorch_grad_cam import EigenCAM
from pytorch_grad_cam.metrics.cam_mult_image import CamMultImageConfidenceChange
from pytorch_grad_cam.metrics.road import ROADCombined
from pytorch_grad_cam.utils.image import scale_cam_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget, ClassifierOutputTarget
from pytorch_grad_cam.utils.reshape_transforms import (
    fasterrcnn_reshape_transform,
    swinT_reshape_transform,
    vit_reshape_transform,
)
from timm.models import SwinTransformer, VisionTransformer
from torch import nn

from tucker_cam import MTSM, TSM, MultivecEigenCAM

METHODS = [TSM, MTSM, MultivecEigenCAM]
every_method = pytest.mark.parametrize("method", METHODS)
since_1_5_7 = pytest.mark.skipif(Version(version("grad-cam")) < Version("1.5.7"), reason="came with grad-cam 1.5.7")


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    resnet, vgg = torchvision.models.resnet18(weights=None), torchvision.models.vgg11(weights=None)
    return {"resnet18": (resnet, [resnet.layer4[-1], resnet.layer4[-2]]), "vgg11": (vgg, [vgg.features[-1]])}


def assert_is_a_map(saliency, batch):
    assert saliency.dtype == np.float32
    assert saliency.shape == (len(batch), *batch.shape[2:])
    assert saliency.min() >= 0
    assert saliency.max() <= 1
    assert (saliency.reshape(len(batch), -1).std(axis=1) > 0.01).all()


@pytest.mark.parametrize("network", ["resnet18", "vgg11"])
@pytest.mark.parametrize(("batch_size", "width", "height"), [(2, 32, 32), (1, 32, 40), (2, 64, 96)])
@pytest.mark.parametrize("target_category", [None, 100])
@pytest.mark.parametrize("aug_smooth", [False, True])
@pytest.mark.parametrize("eigen_smooth", [True, False])
@every_method
def test_all_cam_models_can_run(
    networks, network, batch_size, width, height, target_category, aug_smooth, eigen_smooth, method
):
    model, target_layers = networks[network]
    batch = torch.rand(batch_size, 3, height, width)
    cam = method(model=model, target_layers=target_layers)
    cam.batch_size = 4
    targets = None if target_category is None else [ClassifierOutputTarget(target_category)] * batch_size
    saliency = cam(input_tensor=batch, targets=targets, aug_smooth=aug_smooth, eigen_smooth=eigen_smooth)
    expected = EigenCAM(model, target_layers)(batch, targets)
    assert saliency.shape == expected.shape
    assert saliency.dtype == expected.dtype
    assert saliency.min() >= 0
    assert saliency.max() <= 1


@since_1_5_7
@every_method
def test_refine_cam_and_arcc_accept_it(networks, method):
    from pytorch_grad_cam.metrics.arcc import ARCC
    from pytorch_grad_cam.refine_cam import RefineCAM

    model, target_layers = networks["resnet18"]
    batch, targets = torch.rand(2, 3, 96, 96), [ClassifierOutputTarget(243)] * 2
    refined = RefineCAM(model=model, target_layers=target_layers, base_method=method)
    maps = refined(input_tensor=batch, targets=targets)
    single = [method(model, [layer])(batch) for layer in target_layers]
    np.testing.assert_allclose(maps, scale_cam_image(np.prod(single, axis=0)), atol=1e-5)
    for base in (refined, method(model, target_layers)):
        scores = ARCC(base_method=base)(batch, maps, targets, model)
        assert scores.shape == (2,)
        assert ((scores >= 0) & (scores <= 1)).all()


@since_1_5_7
@every_method
def test_sess_accepts_it(networks, method):
    from pytorch_grad_cam import SESS

    model, target_layers = networks["resnet18"]
    batch = torch.rand(2, 3, 64, 64)
    for arguments in ({}, {"tta_transforms": None}):
        with SESS(model, target_layers[:1], base_method=method, num_scales=2, **arguments) as cam:
            assert_is_a_map(cam(batch, [ClassifierOutputTarget(1)] * 2), batch)
            assert_is_a_map(cam(batch), batch)
    assert not target_layers[0]._forward_hooks


@every_method
def test_the_hosts_metrics_accept_its_maps(networks, method):
    model, target_layers = networks["resnet18"]
    batch = torch.rand(2, 3, 64, 64)
    maps = method(model, target_layers)(batch)
    targets = [ClassifierOutputSoftmaxTarget(3)] * 2
    for metric in (CamMultImageConfidenceChange(), ROADCombined(percentiles=[20, 80])):
        assert np.isfinite(metric(batch, maps, targets, model)).all()


@every_method
def test_a_vision_transformer_with_the_hosts_reshape_transform(method):
    model = VisionTransformer(img_size=64, patch_size=16, embed_dim=48, depth=2, num_heads=2, num_classes=5)
    batch = torch.rand(2, 3, 64, 64)
    cam = method(model, [model.blocks[-1].norm1], lambda tokens: vit_reshape_transform(tokens, 4, 4))
    assert_is_a_map(cam(batch), batch)
    (modes,) = cam.modes(batch)
    assert modes.maps.shape == (2, 16, 4, 4)
    with pytest.raises(ValueError, match=r"`blocks.1.norm1`, got \(2, 17, 48\).*pass a reshape_transform"):
        method(model, [model.blocks[-1].norm1])(batch)


@every_method
def test_a_swin_transformer_with_the_hosts_reshape_transform(method):
    model = SwinTransformer(
        img_size=56, patch_size=4, window_size=7, embed_dim=24, depths=(1, 1), num_heads=(2, 4), num_classes=5
    )
    batch = torch.rand(2, 3, 56, 56)
    assert_is_a_map(method(model, [model.layers[-1].blocks[-1].norm2], swinT_reshape_transform)(batch), batch)


@every_method
def test_a_segmentation_model_that_returns_a_dict(method):
    model = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None)
    batch = torch.rand(1, 3, 64, 64)
    cam = method(model, [model.backbone.layer4])
    assert_is_a_map(cam(batch), batch)
    assert set(cam.outputs) == {"out"}


@every_method
def test_a_detector_that_returns_a_list(method):
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    batch = torch.rand(1, 3, 96, 128)
    cam = method(model, [model.backbone], reshape_transform=fasterrcnn_reshape_transform)
    assert_is_a_map(cam(batch), batch)
    assert set(cam.outputs[0]) == {"boxes", "labels", "scores"}


@every_method
def test_a_model_that_returns_none(method):
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            self.conv(x)

    model, batch = Silent(), torch.rand(2, 3, 32, 32)
    assert_is_a_map(method(model, [model.conv])(batch), batch)


@every_method
def test_a_subclass_with_its_own_get_cam_image(networks, method):
    class Inverted(method):
        def get_cam_image(self, *arguments):
            return 1 - super().get_cam_image(*arguments)

    model, target_layers = networks["resnet18"]
    batch = torch.rand(1, 3, 64, 64)
    np.testing.assert_allclose(
        Inverted(model, target_layers[:1])(batch), 1 - method(model, target_layers[:1])(batch), atol=1e-5
    )
