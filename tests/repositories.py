"""Tiny models as the hubs keep them, and weights in the layouts in which self-supervised projects publish them."""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModel,
    BitImageProcessorPil,
    CLIPConfig,
    ConvNextImageProcessorPil,
    Dinov2Config,
    ResNetConfig,
    ViTMAEConfig,
)

HUBCONF = """
from torchvision.models import resnet18

def resnet50(pretrained=True, **kwargs):
    return resnet18(weights=None)

def unreachable(pretrained=True, **kwargs):
    raise OSError('no route to host')
"""


def make_repositories():
    """Make the repositories in the working directory, where their names are paths."""
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    AutoModel.from_config(resnet).save_pretrained("microsoft/resnet-50")
    ConvNextImageProcessorPil(size={"shortest_edge": 64}).save_pretrained("microsoft/resnet-50")
    dinov2 = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    AutoModel.from_config(dinov2).save_pretrained("facebook/dinov2-small")
    crop = {"height": 28, "width": 28}
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop).save_pretrained("facebook/dinov2-small")
    layer = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision, text = layer | {"image_size": 28, "patch_size": 7}, layer | {"vocab_size": 50}
    CLIPConfig(vision_config=vision, text_config=text).save_pretrained("openai/clip-vit-base-patch32")
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop).save_pretrained("openai/clip-vit-base-patch32")
    AutoModel.from_config(ViTMAEConfig(**layer, intermediate_size=16)).save_pretrained("facebook/vit-mae-base")
    BitImageProcessorPil().save_pretrained("facebook/vit-mae-base")
    vicreg = Path("facebookresearch/vicreg")
    vicreg.mkdir(parents=True)
    (vicreg / "hubconf.py").write_text(HUBCONF)


class RunsCode:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def prefixed(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


def projector(*names):
    return {name: torch.rand(5, 5) for name in names}


def optimizer(state):
    moments = {index: {"exp_avg": torch.zeros_like(value)} for index, value in enumerate(state.values())}
    return {"state": moments, "param_groups": [{"lr": 0.1}]}


def moco_v2(state, other):
    keys = ("fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias")
    weights = prefixed("module.encoder_q.", state | projector(*keys))
    weights |= prefixed("module.encoder_k.", other | projector(*keys))
    weights |= {"module.queue": torch.rand(5, 6), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    return {"epoch": 200, "arch": "resnet50", "state_dict": weights, "optimizer": optimizer(state)}


def moco_v3(state, other):
    weights = prefixed("module.base_encoder.", state | projector("fc.0.weight"))
    weights |= prefixed("module.momentum_encoder.", other | projector("fc.0.weight"))
    weights |= projector("module.predictor.0.weight")
    return {"epoch": 100, "arch": "resnet50", "state_dict": weights, "optimizer": optimizer(state)}


def swav(state, other):
    return prefixed("module.", state | projector("projection_head.0.weight", "prototypes.weight"))


def dino(state, other):
    """The full checkpoint: a student in DistributedDataParallel beside its teacher, and the command's arguments."""
    return {
        "student": prefixed("module.", prefixed("backbone.", other) | projector("head.mlp.0.weight")),
        "teacher": prefixed("backbone.", state) | projector("head.mlp.0.weight", "head.last_layer.weight_g"),
        "optimizer": optimizer(state),
        "epoch": 800,
        "args": argparse.Namespace(arch="resnet50", lr=0.3, momentum=np.float64(0.996)),
        "dino_loss": {"center": torch.zeros(1, 5)},
    }


def barlow_twins(state, other):
    """VICReg's is the same."""
    weights = prefixed("module.backbone.", state)
    weights |= projector("module.projector.0.weight", "module.projector.3.weight", "module.bn.running_mean")
    return {"epoch": 1000, "model": weights, "optimizer": optimizer(state)}


def backbone_alone(state, other):
    """As Barlow Twins and VICReg publish it beside the full checkpoint, and the converted SimCLR weights."""
    return state


def simclr(state, other):
    weights = prefixed("encoder.", state) | projector("projector.0.weight", "projector.2.weight")
    return {"epoch": 200, "arch": "resnet18", "state_dict": weights, "optimizer": optimizer(state)}


def lightning(state, other):
    return {
        "epoch": 10,
        "global_step": 5,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": prefixed("model.backbone.", state) | projector("model.projection.0.weight"),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(1.0), "dirpath": "here"}},
        "optimizer_states": [optimizer(state)],
        "hyper_parameters": {"lr": 0.1},
    }


LAYOUTS = [moco_v2, moco_v3, swav, dino, barlow_twins, backbone_alone, simclr, lightning]


def vicregl(model, *, layer_scale):
    """Name a timm ConvNeXt's weights as VICRegL's own class does, which has no layer scale by default."""
    renamed = {}
    for name, value in model.state_dict().items():
        if name.startswith("head.fc") or (name.endswith("gamma") and not layer_scale):
            continue
        for ours, theirs in [
            ("head.norm.", "norm."),
            ("stem.", "downsample_layers.0."),
            ("conv_dw", "dwconv"),
            ("mlp.fc", "pwconv"),
            (".blocks", ""),
        ]:
            name = name.replace(ours, theirs)
        parts = name.split(".")
        if parts[2:3] == ["downsample"]:
            name = ".".join(["downsample_layers", parts[1], *parts[3:]])
        renamed[name] = value
    full = prefixed("module.backbone.", renamed) | projector("module.maps_projector.0.weight")
    return {"epoch": 150, "model": full, "optimizer": optimizer(renamed)}
