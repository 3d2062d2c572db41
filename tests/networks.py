"""Tiny seeded networks, one for each habit of a model that a label-free method has to put up with."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from operator import itemgetter

import torch
from pytorch_grad_cam import EigenCAM
from torch import nn
from torch.nn.functional import interpolate
from torchvision import transforms

from tucker_cam.models import Network, load_model


def images(batch=2, size=32):
    return torch.randn(batch, 3, size, size)


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def small_cnn(channels=8):
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * channels, 10),
    )


def in_place_cnn():
    """A convolution whose output the next module rewrites, as in torchvision's VGG."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Wired(nn.Module):
    """Named parts, and the function of them and the images that is the forward pass."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


def returning(make_output):
    """Return a network that runs a convolution and returns what is made of the feature maps."""
    return Wired(lambda self, x: make_output(self.conv(x)), conv=nn.Conv2d(3, 8, 3))


def passing_on():
    """Return a network whose images are the feature maps of its layer."""
    return Wired(lambda self, x: self.layer(x), layer=nn.Identity(), unused=nn.Linear(1, 1))


class FailsOnFlat(EigenCAM):
    """A method of a user's that fails where a picture is of one colour."""

    def get_cam_image(self, images, *rest):
        if (images.flatten(2).std(2) < 1e-5).all(1).any():
            raise RuntimeError("nothing to see")
        return super().get_cam_image(images, *rest)


def small_volume_cnn():
    return Wired(
        lambda self, x: self.head(self.conv(x).relu().mean((2, 3, 4))),
        conv=nn.Conv3d(1, 6, 3, padding=1),
        head=nn.Linear(6, 2),
    )


def loaded_in_a_thread():
    loading = ThreadPoolExecutor(1).submit(load_model, "torchvision:resnet18", pretrained=False)
    return loading.result(timeout=60).model


def tiny_loaded_model():
    """Return a small classifier as ``tucker-cam --model networks:tiny_loaded_model`` loads it."""
    steps = [transforms.Resize(24), transforms.CenterCrop(24), transforms.ToTensor()]
    preprocess = transforms.Compose([*steps, transforms.Normalize([0.5] * 3, [0.5] * 3)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = small_cnn()
    return Network(model, preprocess, (0.5,) * 3, (0.5,) * 3, classifies=True)


def tiny_backbone():
    """Return the same network without its last layer: it has no classes."""
    loaded = tiny_loaded_model()
    return replace(loaded, model=loaded.model[:-1], classifies=False)


def uncropped_model():
    steps = [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    return replace(tiny_loaded_model(), preprocess=transforms.Compose(steps))


def dense(backbone, head):
    """Return a backbone that returns its maps by name, and a head that makes a map of the first."""
    return Wired(lambda self, x: self.head(next(iter(self.backbone(x).values()))), backbone=backbone, head=head)


def dense_model():
    named = Wired(lambda self, x: {"out": self.conv(x)}, conv=nn.Conv2d(3, 4, 3))
    return dense(named, nn.Conv2d(4, 2, 1))


def tiny_video_network():
    convert = transforms.Compose([transforms.Resize(16), transforms.ToTensor()])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv3d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    return Network(model, lambda frames: torch.stack([convert(f) for f in frames], 1), (0,) * 3, (1,) * 3, frames=4)


def picky_preprocessing():
    """Return the network with a preprocessing that fails on very small pictures."""
    steps = [transforms.FiveCrop(20), itemgetter(4), transforms.ToTensor()]
    return replace(tiny_loaded_model(), preprocess=transforms.Compose(steps))


def demanding_model():
    """Return a network that fails on pictures of fewer than 5 x 5 pixels."""
    model = nn.Sequential(nn.Conv2d(3, 6, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return replace(uncropped_model(), model=model.requires_grad_(False), classifies=False)


def raises():
    raise RuntimeError("no weights today")


def on_levels(part):
    return Wired(lambda self, levels: [self.part(level) for level in levels], part=part)


def detector():
    """Return heads over several maps, each of which puts out a map for each of them."""

    def run(self, x):
        first = self.first(x)
        levels = self.neck([first, self.second(first)])
        return self.classes(levels), self.boxes(levels)

    parts = {"first": nn.Conv2d(3, 24, 3, 2, 1), "second": nn.Conv2d(24, 24, 3, 2, 1)}
    heads = {"classes": on_levels(nn.Conv2d(24, 90, 1)), "boxes": on_levels(nn.Conv2d(24, 4, 1))}
    return Wired(run, **parts, neck=on_levels(nn.Conv2d(24, 24, 3, padding=1)), **heads)


def token_labels():
    """Return a classifier that adds to its logits those of its strongest token, by a second head."""

    def run(self, x):
        tokens = self.norm(self.patches(x).flatten(2).mT)
        return self.head(tokens.mean(1)) + self.auxiliary(tokens).max(1).values

    heads = {"head": nn.Linear(16, 20), "auxiliary": nn.Linear(16, 20)}
    return Wired(run, patches=nn.Conv2d(3, 16, 8, 8), norm=nn.LayerNorm(16), **heads)


def enlarging(classes):
    """Return encoder, decoder and a head at a quarter of the size, whose output is enlarged."""
    return Wired(
        lambda self, x: interpolate(self.head(self.decoder(self.encoder(x))), x.shape[2:], mode="bilinear"),
        encoder=nn.Conv2d(3, 32, 4, 4),
        decoder=nn.Sequential(nn.Conv2d(32, 8, 3, padding=1), nn.ReLU()),
        head=nn.Conv2d(8, classes, 1),
    )


def shuffling():
    """Return a network with patches in an order of their own, as in a masked autoencoder's training."""

    def run(self, x):
        tokens = self.patches(x).flatten(2).mT
        return self.mix(tokens[:, torch.randperm(tokens.shape[1])]).mean(1)

    return Wired(run, patches=nn.Conv2d(3, 16, 8, 8), mix=nn.Linear(16, 16))


def with_positions():
    """Return a network that adds positions it would learn to a map, and ends in tokens on no grid of the picture."""
    return Wired(
        lambda self, x: self.queries(self.patches(x) + self.resize(self.positions)),
        positions=nn.Parameter(torch.zeros(1, 8, 28, 28)),
        resize=nn.Identity(),
        patches=nn.Conv2d(3, 8, 8, 8),
        queries=nn.Sequential(nn.Flatten(2), nn.Linear(784, 11)),
    )


def queries_model():
    """Return a network of a picture that ends in tokens on no grid of it."""
    return nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(2), nn.Linear(784, 11), nn.Linear(11, 11))
