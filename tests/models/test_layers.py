"""The layer to explain: found in a dry run, for every family of models that is named in the README."""

import re

import numpy as np
import pytest
import torch
from networks import Detector, Enlarging, Shuffling, SmallVolumeCNN, TokenLabels, WithPositions
from timm.models import SwinTransformer, VisionTransformer
from torch import nn
from transformers import (
    AutoModel,
    DabDetrConfig,
    DeformableDetrConfig,
    DetrConfig,
    Dinov2Config,
    HieraConfig,
    Mask2FormerConfig,
    ResNetConfig,
    RTDetrConfig,
    RTDetrResNetConfig,
    RTDetrV2Config,
    SwinConfig,
    YolosConfig,
)
from typer.testing import CliRunner

from tucker_cam import TSM
from tucker_cam.cli import app
from tucker_cam.models import NoLayerError, find_target_layer, load_model
from tucker_cam.models.layers import choose_layers, common_transform, dry_run
from tucker_cam.models.reshape import (
    TokensToMaps,
    channels_last_to_maps,
    only_map,
    pyramid_to_maps,
    spatial_output,
)


def vit(**options):
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, **options)


def swin():
    return SwinTransformer(img_size=28, patch_size=2, window_size=7, embed_dim=24, depths=(1, 1), num_heads=(2, 2))


def dinov2():
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    return AutoModel.from_config(config)


def swin_with_tokens():
    return AutoModel.from_config(
        SwinConfig(image_size=32, patch_size=2, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4)
    )


def hugging_face_resnet():
    return AutoModel.from_config(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    )


@pytest.mark.parametrize(
    ("model", "size", "name", "shape", "transform"),
    [
        (vit, 32, "norm", (1, 17, 16), TokensToMaps(1, 1.0)),
        (lambda: vit(reg_tokens=4), 32, "norm", (1, 21, 16), TokensToMaps(5, 1.0)),
        (lambda: vit(class_token=False, global_pool="avg"), 32, "norm", (1, 16, 16), TokensToMaps(0, 1.0)),
        (lambda: vit(class_token=False, global_pool="map"), 32, "norm", (1, 16, 16), TokensToMaps(0, 1.0)),
        (swin, 28, "norm", (1, 7, 7, 48), channels_last_to_maps),
        (dinov2, 28, "layernorm", (1, 5, 16), TokensToMaps(1, 1.0)),
        (swin_with_tokens, 32, "layernorm", (1, 64, 24), TokensToMaps(0, 1.0)),
        (hugging_face_resnet, 32, "encoder.stages.1", (1, 12, 4, 4), None),
    ],
    ids=["ViT", "registers", "no class token", "attention pooling", "Swin", "DINOv2", "Swin in tokens", "HF ResNet"],
)
def test_the_last_layer_with_a_spatial_map_is_found_with_its_transform(model, size, name, shape, transform):
    layer = find_target_layer(model(), torch.rand(1, 3, size, size))
    assert (layer.name, layer.shape, layer.reshape_transform) == (name, shape, transform)


@pytest.mark.parametrize("size", [(32, 48), (48, 32)])
def test_tokens_of_a_picture_that_is_not_square_are_laid_out_in_its_proportions(size):
    model = VisionTransformer(img_size=size, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    layer = find_target_layer(model, torch.rand(1, 3, *size))
    tokens = torch.randn(2, *layer.shape[1:])
    maps = layer.reshape_transform(tokens)
    assert maps.shape == (2, 16, size[0] // 8, size[1] // 8)
    # The patch of row 1, column 2 stands after a class token and a whole row.
    assert torch.equal(maps[:, :, 1, 2], tokens[:, 1 + size[1] // 8 + 2])


def test_so_many_tokens_that_they_are_no_picture_are_one_clear_error():
    with pytest.raises(ValueError, match=r"a grid of patches 1 times as high as wide, got \(1, 12, 8\)"):
        TokensToMaps(1, 1.0)(torch.zeros(1, 12, 8))


def test_channels_last_are_moved_first():
    output = torch.rand(2, 3, 4, 5)
    assert torch.equal(channels_last_to_maps(output)[1, 4], output[1, :, :, 4])


def test_a_pyramids_levels_are_stacked_at_the_middle_size():
    levels = {"0": torch.rand(1, 2, 16, 16), "1": torch.rand(1, 3, 8, 8), "2": torch.full((1, 1, 4, 4), 7.0)}
    maps = pyramid_to_maps(levels | {"pool": torch.rand(1, 3, 1, 1)})
    assert maps.shape == (1, 6, 8, 8)
    assert torch.equal(maps[:, 2:5], levels["1"])
    torch.testing.assert_close(maps[:, 5], torch.full((1, 8, 8), 7.0))


class Dense(nn.Module):
    """A backbone that returns its maps by name, and a head of convolutions, as in segmentation and detection."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = backbone, nn.LazyConv2d(2, 1)

    def forward(self, x):
        return self.head(next(iter(self.backbone(x).values())))


class Named(nn.Module):
    def __init__(self, *names):
        super().__init__()
        self.names = names
        self.steps = nn.ModuleList(nn.LazyConv2d(4, 3, stride=2, padding=1) for _ in names)

    def forward(self, x):
        maps = {}
        for name, step in zip(self.names, self.steps, strict=True):
            maps[name] = x = step(x)
        return maps


def test_what_follows_a_backbone_that_returns_its_maps_by_name_is_a_head():
    layer = find_target_layer(Dense(Named("out")), torch.rand(1, 3, 16, 16))
    assert (layer.name, layer.reshape_transform) == ("backbone.steps.0", None)


def test_a_feature_pyramid_is_a_layer_of_its_own():
    model = Dense(Named("0", "1"))
    layer = find_target_layer(model, torch.rand(1, 3, 16, 16))
    assert (layer.name, layer.shape, layer.reshape_transform) == ("backbone", (1, 8, 8, 8), pyramid_to_maps)
    with TSM(model, [layer.module], layer.reshape_transform) as cam:
        assert cam(torch.rand(2, 3, 16, 16)).shape == (2, 16, 16)


class InTuple(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return (self.conv(x) + 1,)


def test_a_layer_that_returns_its_map_in_a_tuple_is_read():
    model = Unpacked(InTuple())
    layer = find_target_layer(model, torch.rand(1, 3, 8, 8))
    assert (layer.name, layer.reshape_transform) == ("inner", only_map)
    with TSM(model, [layer.module], layer.reshape_transform) as cam:
        assert cam(torch.rand(1, 3, 8, 8)).shape == (1, 8, 8)


class Unpacked(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0].mean((2, 3))


def test_a_small_part_that_pools_maps_is_a_head_and_its_inside_is_not_explained():
    class AttentionPool(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return (self.scores(x).flatten(2).softmax(2) * x.flatten(2)).sum(2)

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), AttentionPool())
    assert find_target_layer(model, torch.rand(1, 3, 8, 8)).name == "1"


def test_a_detectors_head_that_takes_several_maps_is_not_explained():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.boxes = nn.Conv2d(4, 2, 1)

        def forward(self, maps):
            return torch.cat([self.boxes(each).flatten(2) for each in maps], 2), None

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)
            self.head = Head()

        def forward(self, x):
            first = self.first(x)
            return self.head([first, self.second(first)])

    assert find_target_layer(Detector(), torch.rand(1, 3, 32, 32)).name == "second"


def test_a_wrapper_that_normalises_the_picture_is_no_head():
    inner = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 500))
    model = nn.Sequential(nn.InstanceNorm2d(3), inner)
    assert find_target_layer(model, torch.rand(1, 3, 8, 8)).name == "1.0"


def test_a_module_that_is_called_twice_counts_where_it_is_recorded_at_its_first_call():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 4, 3), relu, nn.AdaptiveAvgPool2d(1))
    assert find_target_layer(model, torch.rand(1, 3, 12, 12)).name == "2"


def test_a_detectors_queries_are_no_patches_though_they_are_a_square_number():
    """100 queries of a picture of 640 would be patches of 64; of 800 they would be larger than any network's."""
    assert spatial_output(torch.rand(1, 100, 8), torch.rand(1, 3, 800, 800)) is None
    assert spatial_output(torch.rand(1, 100, 8), torch.rand(1, 3, 160, 160)) is not None
    assert spatial_output(torch.rand(1, 1, 8), torch.rand(1, 3, 32, 32)) is None


def test_a_part_that_returns_its_tokens_in_an_output_object_is_no_head():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(8, 8)

        def forward(self, tokens):
            return {"last_hidden_state": self.mix(tokens)}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.wide = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 400)
            self.encoder = Wrapped()

        def forward(self, x):
            tokens = self.patches(x).flatten(2).mT
            return self.wide(self.encoder(tokens)["last_hidden_state"].mean(1))

    assert find_target_layer(Model(), torch.rand(1, 3, 32, 32)).name == "encoder.mix"


def test_a_video_networks_last_volume_is_found():
    layer = find_target_layer(SmallVolumeCNN(), torch.rand(1, 1, 4, 6, 6))
    assert (layer.name, layer.shape) == ("conv", (1, 6, 4, 6, 6))


STEM = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "layer_type": "basic"}
LEVELS = ["stage2", "stage3", "stage4"]
SIZES = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
DETR = SIZES | {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 16, "backbone": None}
REAL_TIME = {
    **SIZES,
    "d_model": 32,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [16, 24, 32],
    "decoder_in_channels": [32] * 3,
    "decoder_layers": 2,
    "num_queries": 16,
    "num_denoising": 0,
}
MASKS = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "encoder_feedforward_dim": 32}
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def last_map():
    return ResNetConfig(**STEM, out_features=["stage4"])


def real_time():
    return RTDetrResNetConfig(**STEM, out_features=LEVELS)


def masks():
    backbone = SwinConfig(
        embed_dim=12, depths=[1] * 4, num_heads=[2] * 4, window_size=4, out_features=["stage1", *LEVELS]
    )
    return Mask2FormerConfig(
        backbone_config=backbone,
        **MASKS,
        dim_feedforward=32,
        num_attention_heads=2,
        encoder_layers=1,
        decoder_layers=2,
        num_queries=16,
    )


@pytest.mark.parametrize(
    "config",
    [
        lambda: DetrConfig(backbone_config=last_map(), d_model=32, **DETR),
        lambda: DabDetrConfig(backbone_config=last_map(), hidden_size=32, **DETR),
        lambda: DeformableDetrConfig(
            backbone_config=ResNetConfig(**STEM, out_features=LEVELS), num_feature_levels=3, d_model=32, **DETR
        ),
        lambda: RTDetrConfig(backbone_config=real_time(), **REAL_TIME),
        lambda: RTDetrV2Config(backbone_config=real_time(), **REAL_TIME),
        masks,
        lambda: YolosConfig(image_size=[128, 128], patch_size=16, num_detection_tokens=5, **VIT),
    ],
    ids=["DETR", "DAB-DETR", "Deformable DETR", "RT-DETR", "RT-DETRv2", "Mask2Former", "YOLOS"],
)
def test_a_detectors_queries_are_not_taken_for_positions(config):
    """16 queries are as many as the patches of 32 pixels; YOLOS has its queries after the patches."""
    torch.manual_seed(0)
    with pytest.raises(NoLayerError) as raised:
        find_target_layer(AutoModel.from_config(config()), torch.zeros(1, 3, 128, 128))
    # What can be named instead: convolutions, which are no queries.
    assert any(isinstance(layer.module, nn.Conv2d) for layer in raised.value.layers)
    assert not any(layer.shape[-2:] == (16, 32) for layer in raised.value.layers if layer.name.endswith("decoder"))


def test_patches_in_an_order_of_their_own_are_no_map():
    assert [layer.name for layer in dry_run(Shuffling(), torch.zeros(1, 3, 64, 64)).doubtful] == ["mix"]


def test_hieras_map_is_found_where_its_tokens_are_in_the_pictures_order():
    config = HieraConfig(embed_dim=16, image_size=[128, 128], depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2])
    run = dry_run(AutoModel.from_config(config), torch.zeros(1, 3, 128, 128))
    assert run.target.shape == (1, 16, 128)
    # The first stage has them window by window.
    assert "encoder.stages.0.layers.0.mlp.fc1" in [layer.name for layer in run.doubtful]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        # As segmentation_models_pytorch has it: convolution, enlarging, activation; with more classes than channels.
        (lambda: nn.Sequential(encoder_decoder(), head(1)), "0"),
        (lambda: nn.Sequential(encoder_decoder(), head(21)), "0"),
        (lambda: nn.Sequential(*encoder_decoder(), *head(1)), "3"),
        (lambda: Enlarging(3), "decoder"),
        (lambda: Enlarging(5), "decoder"),
        (Detector, "neck"),
        (TokenLabels, "norm"),
    ],
    ids=[
        "one class",
        "many classes",
        "flat",
        "the shape of a picture",
        "enlarged outside",
        "a head for levels",
        "a head for tokens",
    ],
)
def test_what_the_model_puts_out_is_a_prediction_and_the_layer_before_is_explained(model, name):
    torch.manual_seed(0)
    assert find_target_layer(model(), torch.rand(1, 3, 64, 64)).name == name


def encoder_decoder():
    return nn.Sequential(nn.Conv2d(3, 64, 4, 4), nn.ReLU(), nn.ConvTranspose2d(64, 16, 2, 2), nn.ReLU())


def head(classes):
    return nn.Sequential(nn.Conv2d(16, classes, 3, padding=1), nn.UpsamplingBilinear2d(scale_factor=2), nn.Sigmoid())


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3)), "2"),
        (lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8)), "3"),
        (lambda: nn.Sequential(vit().patch_embed, *vit().blocks), "2"),
    ],
    ids=["convolutions", "a narrowing block", "ViT blocks"],
)
def test_a_backbone_that_puts_out_its_maps_keeps_its_last_layer(model, name):
    torch.manual_seed(0)
    assert find_target_layer(model(), torch.rand(1, 3, 32, 32)).name == name


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 2)),
        # Tokens that are 11 x 11 of something, but not patches of a picture of 28 x 28.
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.Linear(676, 121), nn.Linear(121, 64)),
    ],
    ids=["MLP", "tokens on no grid"],
)
def test_a_model_that_ends_without_a_spatial_map_is_refused(model):
    with pytest.raises(ValueError, match=r"feature maps \(B, C, H, W\) or a picture's tokens, found none"):
        find_target_layer(model, torch.zeros(1, 3, 28, 28))


def test_looking_for_the_layer_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    model[2].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    find_target_layer(model, torch.randn(2, 3, 8, 8))
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_the_target_depends_on_is_upstream_and_the_head_is_not():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            # Its out_proj is a module that is never called: its weights are used.
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            tokens = x.flatten(2).mT
            return self.attention(tokens, tokens, tokens)[0].mT.unflatten(2, x.shape[2:])

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Attention(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    upstream = dry_run(model, torch.rand(1, 3, 8, 8)).upstream["2"]
    assert upstream >= {"", "0", "1", "1.attention", "1.attention.out_proj", "2"}
    assert not upstream & {"3", "4"}


def test_layers_are_chosen_by_name_and_by_negative_index():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    run = dry_run(model, torch.rand(1, 3, 8, 8))
    assert [layer.name for layer in choose_layers(model, run, ["0", "-1", "-2"])] == ["0", "1", "0"]
    for name, message in [
        ("-3", "index from -2 to -1, got -3"),
        ("-0", "index from -2 to -1, got -0"),
        ("4", "`4` has none"),
        ("44", "no layer '44'; near it: 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            choose_layers(model, run, [name])


def test_layers_that_become_maps_in_different_ways_are_refused_together():
    model = vit()
    run = dry_run(model, torch.rand(1, 3, 32, 32))
    assert common_transform(choose_layers(model, run, ["blocks.0", "blocks.1"])) == TokensToMaps(1, 1.0)
    with pytest.raises(ValueError, match=r"in one way, got `patch_embed.proj` .* `norm`"):
        common_transform(choose_layers(model, run, ["patch_embed.proj", "norm"]))


def test_the_layers_command_lists_the_candidates_and_marks_the_chosen_one():
    result = CliRunner().invoke(app, ["layers", "torchvision:resnet18", "--no-pretrained"])
    assert result.exit_code == 0, result.output
    (chosen,) = [line for line in result.output.splitlines() if "->" in line]
    assert [cell.strip() for cell in chosen.split("│")[1:-1]] == ["->", "-1", "layer4", "Sequential", "512 x 7 x 7"]
    assert "layer3.1.conv2" in result.output
    other = CliRunner().invoke(app, ["layers", "torchvision:resnet18", "--no-pretrained", "--layer", "layer3"])
    (chosen,) = [line for line in other.output.splitlines() if "->" in line]
    assert "256 x 14 x 14" in chosen


def test_positions_that_are_learnt_are_no_candidate():
    run = dry_run(WithPositions(), torch.rand(1, 3, 224, 224))
    assert run.target is None
    assert [layer.name for layer in run.layers] == ["patches"]


def test_the_layers_command_lists_the_candidates_also_where_none_is_chosen():
    result = CliRunner().invoke(app, ["layers", "networks:queries_model"])
    assert result.exit_code == 0, result.output
    assert "8 x 28 x 28" in result.output
    assert "->" not in result.output
    assert "none was chosen" in result.output
    with pytest.raises(NoLayerError, match="1 can be named, up to `0` 8x28x28"):
        load_model("networks:queries_model")


@pytest.mark.parametrize("terminal", [False, True])
def test_the_layers_command_prints_any_name_as_it_is(terminal):
    result = CliRunner().invoke(app, ["layers", "networks:marked_up_model"], env={"FORCE_COLOR": "1" * terminal})
    assert result.exit_code == 0, result.output
    assert "parts.[/x]" in result.output
    assert "parts.\\x1b[2J" in result.output
    assert "\x1b[2J" not in result.output


def test_the_table_of_layers_loses_nothing_on_a_narrow_terminal():
    arguments = ["layers", "timm:swin_tiny_patch4_window7_224", "--no-pretrained"]
    runs = [CliRunner().invoke(app, arguments, env={"COLUMNS": "60", "FORCE_COLOR": force}) for force in ("1", "")]
    narrow, piped = (re.sub(r"\x1b\[\d*m", "", run.output) for run in runs)
    assert max(map(len, narrow.splitlines())) <= 60 < max(map(len, piped.splitlines()))
    for output in (narrow, piped):
        (chosen,) = [line for line in output.splitlines() if "->" in line]
        assert "-1" in chosen
        assert "7 x 7 x 768" in chosen
        assert output.endswith("becomes maps by channels_last_to_maps\n")


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224"])
def test_a_transformers_map_shows_the_patch_that_differs(name):
    """Only one patch of the last layer's tokens is strong: its place in the picture is where the map is strongest."""
    loaded = load_model(name, pretrained=False)
    side = 14 if "vit" in name else 7

    def one_strong_patch(module, inputs, output):
        marked = torch.zeros_like(output)
        if output.dim() == 3:
            marked[:, 1 + 3 * side + 5] = 1
        else:
            marked[:, 3, 5] = 1
        return marked

    handle = loaded.target_layers[0].register_forward_hook(one_strong_patch)
    with TSM(loaded.model, loaded.target_layers, loaded.reshape_transform) as cam:
        saliency = cam(torch.rand(1, 3, 224, 224))[0]
    handle.remove()
    row, column = np.unravel_index(saliency.argmax(), saliency.shape)
    assert (int(row * side / 224), int(column * side / 224)) == (3, 5)
