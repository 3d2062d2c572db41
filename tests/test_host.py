"""Every way pytorch-grad-cam itself uses a CAM class, with ours put in.

This module also runs with the oldest versions of grad-cam and tensorly that are supported.
"""

from importlib.metadata import version

import networks
import numpy as np
import pytest
import references
import torch
import torchvision
import ttach
from networks import hook_count, images
from numpy.testing import assert_allclose
from packaging.version import Version
from pytorch_grad_cam import EigenCAM, FinerCAM
from pytorch_grad_cam.metrics.cam_mult_image import CamMultImageConfidenceChange
from pytorch_grad_cam.metrics.road import ROADCombined
from pytorch_grad_cam.utils.image import scale_cam_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget, ClassifierOutputTarget
from pytorch_grad_cam.utils.reshape_transforms import (
    fasterrcnn_reshape_transform,
    swinT_reshape_transform,
    vit_reshape_transform,
)
from registry import CLASSES, every_class
from timm.models import SwinTransformer, VisionTransformer

since_1_5_7 = pytest.mark.skipif(Version(version("grad-cam")) < Version("1.5.7"), reason="came with grad-cam 1.5.7")


@pytest.fixture(scope="module")
def backbones():
    torch.manual_seed(0)
    resnet, vgg = torchvision.models.resnet18(weights=None), torchvision.models.vgg11(weights=None)
    return {"resnet18": (resnet, [resnet.layer4[-1], resnet.layer4[-2]]), "vgg11": (vgg, [vgg.features[-1]])}


def assert_is_a_map(saliency, batch):
    assert saliency.dtype == np.float32
    assert saliency.shape == (len(batch), *batch.shape[2:])
    assert saliency.min() >= 0
    assert saliency.max() <= 1
    assert (saliency.reshape(len(batch), -1).std(axis=1) > 0.01).all()


def assert_is_the_map(saliency, cam, batch):
    """Compare with the oracle's maps of what the layers put out, brought to the picture's size as the host does."""
    assert_is_a_map(saliency, batch)
    outputs, transform = {}, cam.reshape_transform or (lambda output: output)
    handles = [
        layer.register_forward_hook(lambda layer, _, output: outputs.update({layer: output}))
        for layer in cam.target_layers
    ]
    with torch.no_grad():
        cam.model(batch)
    for handle in handles:
        handle.remove()
    layers = [transform(outputs[layer]) for layer in cam.target_layers]
    expected = references.explained(CLASSES[type(cam)], *layers, size=batch.shape[:1:-1])
    assert_allclose(saliency, expected, atol=1e-5)


@pytest.mark.parametrize("network", ["resnet18", "vgg11"])
@pytest.mark.parametrize(("batch_size", "width", "height"), [(2, 64, 64), (1, 64, 96)])
@pytest.mark.parametrize("target_category", [None, 100])
@pytest.mark.parametrize("aug_smooth", [False, True])
@pytest.mark.parametrize("eigen_smooth", [True, False])
@every_class
def test_all_cam_models_can_run(
    backbones, network, batch_size, width, height, target_category, aug_smooth, eigen_smooth, method
):
    model, target_layers = backbones[network]
    batch = torch.rand(batch_size, 3, height, width)
    cam = method(model=model, target_layers=target_layers)
    cam.batch_size = 4
    targets = None if target_category is None else [ClassifierOutputTarget(target_category)] * batch_size
    saliency = cam(input_tensor=batch, targets=targets, aug_smooth=aug_smooth, eigen_smooth=eigen_smooth)
    assert_is_a_map(saliency, batch)
    if not aug_smooth:
        assert_is_the_map(saliency, cam, batch)


@since_1_5_7
@every_class
def test_refine_cam_and_arcc_accept_it(backbones, method):
    from pytorch_grad_cam.metrics.arcc import ARCC
    from pytorch_grad_cam.refine_cam import RefineCAM

    model, target_layers = backbones["resnet18"]
    batch, targets = torch.rand(2, 3, 96, 96), [ClassifierOutputTarget(243)] * 2
    refined = RefineCAM(model=model, target_layers=target_layers, base_method=method)
    maps = refined(input_tensor=batch, targets=targets)
    single = [method(model, [layer])(batch) for layer in target_layers]
    assert_allclose(maps, scale_cam_image(np.prod(single, axis=0)), atol=1e-5)
    for base in (refined, method(model, target_layers)):
        scores = ARCC(base_method=base)(batch, maps, targets, model)
        assert scores.shape == (2,)
        assert ((scores >= 0) & (scores <= 1)).all()


@since_1_5_7
@every_class
def test_sess_accepts_it(backbones, method):
    from pytorch_grad_cam import SESS

    model, target_layers = backbones["resnet18"]
    batch = torch.rand(2, 3, 64, 64)
    for arguments in ({}, {"tta_transforms": None}):
        with SESS(model, target_layers[:1], base_method=method, num_scales=2, **arguments) as cam:
            assert_is_a_map(cam(batch, [ClassifierOutputTarget(1)] * 2), batch)
            assert_is_a_map(cam(batch), batch)
    assert not target_layers[0]._forward_hooks


@every_class
def test_the_hosts_metrics_accept_its_maps(backbones, method):
    model, target_layers = backbones["resnet18"]
    batch = torch.rand(2, 3, 64, 64)
    maps = method(model, target_layers)(batch)
    targets = [ClassifierOutputSoftmaxTarget(3)] * 2
    for metric in (CamMultImageConfidenceChange(), ROADCombined(percentiles=[20, 80])):
        assert np.isfinite(metric(batch, maps, targets, model)).all()


@every_class
def test_a_vision_transformer_with_the_hosts_reshape_transform(method):
    model = VisionTransformer(img_size=64, patch_size=16, embed_dim=48, depth=2, num_heads=2, num_classes=5)
    batch = torch.rand(2, 3, 64, 64)
    # Weights as after training: the initial ones give all positions the same mean and length.
    torch.nn.init.normal_(model.blocks[-1].norm1.weight)
    cam = method(model, [model.blocks[-1].norm1], lambda tokens: vit_reshape_transform(tokens, 4, 4))
    assert_is_the_map(cam(batch), cam, batch)


@every_class
def test_a_swin_transformer_with_the_hosts_reshape_transform(method):
    model = SwinTransformer(
        img_size=56, patch_size=4, window_size=7, embed_dim=24, depths=(1, 1), num_heads=(2, 4), num_classes=5
    )
    batch = torch.rand(2, 3, 56, 56)
    cam = method(model, [model.layers[-1].blocks[-1].norm2], swinT_reshape_transform)
    assert_is_the_map(cam(batch), cam, batch)


@pytest.mark.parametrize("network", ["segmentation", "detection"])
@every_class
def test_a_segmentation_model_or_detector_that_returns_no_tensor(method, network):
    options = {"weights": None, "weights_backbone": None}
    if network == "segmentation":
        model, reshape_transform = torchvision.models.segmentation.deeplabv3_resnet50(**options), None
        layers = [model.backbone.layer4]
    else:
        model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(**options)
        layers, reshape_transform = [model.backbone], fasterrcnn_reshape_transform
    batch = torch.rand(1, 3, 96, 128)
    cam = method(model, layers, reshape_transform)
    assert_is_the_map(cam(batch), cam, batch)
    assert isinstance(cam.outputs, dict | list)


@pytest.mark.parametrize("transforms", [None, ttach.Compose([ttach.VerticalFlip()])], ids=["the host's", "given"])
@every_class
def test_augmentation_smoothing_averages_over_the_transforms(method, transforms):
    model, batch = networks.small_cnn(), images()
    cam = method(model, [model[2]], tta_transforms=transforms)
    if transforms is None:
        plain, flipped = ([cam(given * factor) for factor in (0.9, 1, 1.1)] for given in (batch, batch.flip(-1)))
        expected = np.mean([*plain, *(saliency[..., ::-1] for saliency in flipped)], axis=0)
    else:
        expected = (cam(batch) + cam(batch.flip(-2))[:, ::-1]) / 2
    assert_allclose(cam(batch, None, True, False), expected, atol=1e-5)


@every_class
def test_hooks_are_gone_after_the_block_out_of_which_errors_come(method):
    model = networks.small_cnn()
    model[2].register_forward_hook(lambda *_: None)
    cam = method(model, [model[2]])  # which lives on after the block
    with cam:
        assert hook_count(model) > 1
    assert hook_count(model) == 1
    with pytest.raises(IndexError, match="mine"), method(model, [model[2]]):
        raise IndexError("mine")
    assert hook_count(model) == 1


@every_class
def test_two_objects_on_one_model_do_not_disturb_each_other(method):
    model, batch = networks.small_cnn(), images()
    first_alone, second_alone = (method(model, [layer])(batch) for layer in (model[0], model[2]))
    first, host, second = method(model, [model[0]]), EigenCAM(model, [model[2]]), method(model, [model[2]])
    host_alone = host(batch, None)
    assert_allclose(first(batch), first_alone, rtol=0, atol=0)
    assert_allclose(second(batch), second_alone, rtol=0, atol=0)
    assert_allclose(host(batch, None), host_alone, rtol=0, atol=0)
    first.activations_and_grads.release()
    assert_allclose(second(batch), second_alone, rtol=0, atol=0)


@every_class
def test_one_object_is_used_again_on_other_sizes_and_batches(method):
    model = networks.small_cnn()
    used_again = method(model, [model[2]])
    for batch in (images(2, 32), images(1, 48), torch.randn(3, 3, 24, 40), images(2, 32)):
        assert_allclose(used_again(batch), method(model, [model[2]])(batch), rtol=0, atol=0)


@every_class
def test_a_subclass_with_its_own_saliency_and_constructor(method):
    class Squared(method):
        def __init__(self, *arguments, power=2, **options):
            super().__init__(*arguments, **options)
            self.power = power

        def saliency(self, features):
            return super().saliency(features) ** self.power

    model, batch = networks.small_cnn(), images()
    cam = Squared(model, [model[2]], power=3)
    expected = references.explained(lambda image: CLASSES[method](image) ** 3, model[:3](batch), size=(32, 32))
    assert_allclose(cam(batch), expected, atol=1e-4)


@every_class
def test_finer_cam_accepts_it(method):
    model, batch = networks.small_cnn(), images()
    expected = method(model, [model[2]])(batch)
    cam = FinerCAM(model, [model[2]], base_method=method)
    assert_allclose(cam(batch), expected, rtol=0, atol=0)
    assert_allclose(cam(batch, [ClassifierOutputTarget(1)] * 2), expected, rtol=0, atol=0)
    del cam
    assert hook_count(model) == 0


@every_class
def test_a_volume_is_explained_and_smoothed_by_augmentation(method):
    model, batch = networks.small_volume_cnn(), torch.randn(2, 1, 6, 8, 10)
    cam = method(model, [model.conv], tta_transforms=ttach.Compose([ttach.Multiply([0.9, 1, 1.1])]))
    expected = np.mean([cam(batch * factor) for factor in (0.9, 1, 1.1)], axis=0)
    assert_allclose(cam(batch, aug_smooth=True), expected, atol=1e-6)
    assert_is_the_map(cam(batch), cam, batch)
