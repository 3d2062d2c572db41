"""Tiny models as the hubs keep them: folders of Hugging Face's and torch.hub's kind."""

from pathlib import Path

from transformers import AutoModel, BitImageProcessorPil, ConvNextImageProcessorPil, Dinov2Config, ResNetConfig

HUBCONF = """
from torchvision.models import resnet18

def resnet50(pretrained=True, **kwargs):
    return resnet18(weights=None)

def unreachable(pretrained=True, **kwargs):
    raise OSError('no route to host')

def bare():
    return resnet18(weights=None)

def exits():
    raise SystemExit(0)

def none():
    return None
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
    vicreg = Path("facebookresearch/vicreg")
    vicreg.mkdir(parents=True)
    (vicreg / "hubconf.py").write_text(HUBCONF)
