"""The layer to explain: found in a dry run, for every family of models that is named in the README."""

import pytest
import torch
from networks import Wired, dense, detector, enlarging, shuffling, token_labels, with_positions
from timm.models import VisionTransformer
from torch import nn
from torchvision import transforms
from torchvision.models import resnet18
from transformers import AutoModel, DetrConfig, HieraConfig, ResNetConfig, SwinConfig, YolosConfig

from tucker_cam import TSM
from tucker_cam.models import Network, NoLayerError, find_target_layer, load_model
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


def swin_with_tokens():
    return AutoModel.from_config(
        SwinConfig(image_size=32, patch_size=2, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4)
    )


def pyramid():
    """Return a backbone that returns two maps by name, and a head that makes more channels of one."""

    def run(self, x):
        first = self.first(x)
        return {"0": first, "1": self.second(first)}

    convolutions = {"first": nn.Conv2d(3, 4, 3, 2, 1), "second": nn.Conv2d(4, 4, 3, 2, 1)}
    return dense(Wired(run, **convolutions), nn.Conv2d(4, 9, 1))


def with_attention():
    def run(self, x):
        tokens = self.body.forward_features(x)
        return tokens + self.bias, (tokens @ tokens.mT)[:, None]

    body = Wired(run, body=vit(), bias=nn.Parameter(torch.ones(16)))
    return nn.Sequential(body, Wired(lambda self, seen: self.linear(seen[0][:, 0]), linear=nn.Linear(16, 3)))


def in_tuple():
    inner = Wired(lambda self, x: (self.conv(x) + 1,), conv=nn.Conv2d(3, 4, 3))
    return Wired(lambda self, x: self.inner(x)[0].mean((2, 3)), inner=inner)


@pytest.mark.parametrize(
    ("model", "name", "shape", "transform"),
    [
        pytest.param(lambda: vit(reg_tokens=4), "norm", (1, 21, 16), TokensToMaps(5, 1.0), id="registers"),
        pytest.param(
            lambda: vit(class_token=False, global_pool="map"),
            "norm",
            (1, 16, 16),
            TokensToMaps(0, 1.0),
            id="attention pooling of tokens",
        ),
        pytest.param(swin_with_tokens, "layernorm", (1, 64, 24), TokensToMaps(0, 1.0), id="Swin in tokens"),
        pytest.param(with_attention, "0", (1, 17, 16), TokensToMaps(1, 1.0), id="tokens before their attention"),
        pytest.param(pyramid, "backbone", (1, 8, 16, 16), pyramid_to_maps, id="a pyramid"),
        pytest.param(in_tuple, "inner", (1, 4, 30, 30), only_map, id="a map in a tuple"),
    ],
)
def test_the_last_layer_with_a_spatial_map_is_found_with_its_transform(model, name, shape, transform):
    network = model()
    layer = find_target_layer(network, torch.rand(1, 3, 32, 32))
    assert (layer.name, layer.shape, layer.reshape_transform) == (name, shape, transform)
    with TSM(network, [layer.module], layer.reshape_transform) as cam:
        assert cam(torch.rand(2, 3, 32, 32)).shape == (2, 32, 32)


@pytest.mark.parametrize("size", [(32, 48), (48, 32)])
def test_tokens_of_a_picture_that_is_not_square_are_laid_out_in_its_proportions(size):
    model = VisionTransformer(img_size=size, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    layer = find_target_layer(model, torch.rand(1, 3, *size))
    tokens = torch.randn(2, *layer.shape[1:])
    maps = layer.reshape_transform(tokens)
    assert maps.shape == (2, 16, size[0] // 8, size[1] // 8)
    # The patch of row 1, column 2 stands after a class token and a whole row.
    assert torch.equal(maps[:, :, 1, 2], tokens[:, 1 + size[1] // 8 + 2])
    # Swin's, channels last, are only turned.
    assert torch.equal(channels_last_to_maps(maps.permute(0, 2, 3, 1)), maps)


@pytest.mark.parametrize("size", [(256, 128), (64, 128)])
def test_the_layer_is_found_for_long_inputs_across_which_its_maps_hardly_differ(size):
    model = resnet18()
    assert find_target_layer(model, torch.rand(1, 3, *size)).name == "layer4"
    loaded = load_model(Network(model, takes=torch.rand(1, 3, *size)))
    assert loaded.description.endswith(f"layer4 512x{size[0] // 32}x{size[1] // 32}")
    assert loaded.spatial_layers[-1].name == "layer4"
    resized = transforms.Compose([transforms.Resize(size), transforms.ToTensor()])
    assert load_model(Network(model, resized)).layer_names == ["layer4"]


def test_tokens_of_images_of_other_proportions_than_a_models_picture_are_laid_out_in_theirs():
    model = vit(dynamic_img_size=True)
    images = torch.rand(1, 3, 72, 128)
    assert load_model(Network(model, takes=images)).reshape_transform.aspect == 72 / 128
    # As many as a square of 12 x 12 has.
    square = load_model(model)
    with pytest.raises(ValueError, match=r"1 times as high as wide, for which .* made, got 72 x 128"):
        TSM(square.model, square.target_layers, square.reshape_transform)(images)


def test_the_layer_of_a_network_that_takes_bytes_is_found():
    model = Wired(lambda self, x: self.vit(x / 255), vit=vit())
    assert find_target_layer(model, torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).name == "vit.norm"


def test_so_many_tokens_that_they_are_no_picture_are_one_clear_error():
    with pytest.raises(ValueError, match=r"a grid of patches 1 times as high as wide, got \(1, 12, 8\)"):
        TokensToMaps(1, 1.0)(torch.zeros(1, 12, 8))


def test_a_pyramids_levels_are_stacked_at_the_middle_size():
    levels = {"0": torch.rand(1, 2, 16, 16), "1": torch.rand(1, 3, 8, 8), "2": torch.full((1, 1, 4, 4), 7.0)}
    maps = pyramid_to_maps(levels | {"pool": torch.rand(1, 3, 1, 1)})
    assert maps.shape == (1, 6, 8, 8)
    assert torch.equal(maps[:, 2:5], levels["1"])
    torch.testing.assert_close(maps[:, 5], torch.full((1, 8, 8), 7.0))


STEM = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "layer_type": "basic"}
SIZES = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
DETR = SIZES | {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 16, "backbone": None}
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize(
    "config",
    [
        lambda: DetrConfig(backbone_config=ResNetConfig(**STEM, out_features=["stage4"]), d_model=32, **DETR),
        lambda: YolosConfig(image_size=[128, 128], patch_size=16, num_detection_tokens=5, **VIT),
    ],
    ids=["DETR", "YOLOS"],
)
def test_a_detectors_queries_are_not_taken_for_positions(config):
    """16 queries are as many as the patches of 32 pixels; YOLOS has its queries after the patches."""
    torch.manual_seed(0)
    with pytest.raises(NoLayerError, match=r"feature maps \(B, C, H, W\) or a picture's tokens, found none") as raised:
        find_target_layer(AutoModel.from_config(config()), torch.zeros(1, 3, 128, 128))
    # What can be named instead: convolutions, which are no queries.
    assert any(isinstance(layer.module, nn.Conv2d) for layer in raised.value.layers)
    assert not any(layer.shape[-2:] == (16, 32) for layer in raised.value.layers if layer.name.endswith("decoder"))


def test_hieras_map_is_found_where_its_tokens_are_in_the_pictures_order():
    config = HieraConfig(embed_dim=16, image_size=[128, 128], depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2])
    run = dry_run(AutoModel.from_config(config), torch.zeros(1, 3, 128, 128))
    # What the stage adds to, and not only what it adds.
    assert (run.target.name, run.target.shape) == ("encoder.stages.3", (1, 16, 128))
    # The first stage has them window by window.
    assert "encoder.stages.0.layers.0.mlp.fc1" in run.named.keys() - {layer.name for layer in run.layers}


def encoder_decoder():
    return nn.Sequential(nn.Conv2d(3, 64, 4, 4), nn.ReLU(), nn.ConvTranspose2d(64, 16, 2, 2), nn.ReLU())


def head(classes):
    return nn.Sequential(nn.Conv2d(16, classes, 3, padding=1), nn.UpsamplingBilinear2d(scale_factor=2), nn.Sigmoid())


def level_pool():
    """Return a network with a head that takes two maps, returns two in tuples, and is not the model's output."""

    def run(self, x):
        first = self.first(x)
        return sum(each.mean((2, 3)) for (each,) in self.boxes([first, self.second(first)]))

    boxes = Wired(lambda self, maps: [(self.predict(each),) for each in maps], predict=nn.Conv2d(4, 2, 1))
    return Wired(run, first=nn.Conv2d(3, 4, 3, 2, 1), second=nn.Conv2d(4, 4, 3, 2, 1), boxes=boxes)


def narrowing(part):
    return nn.Sequential(nn.Conv2d(3, 64, 7), nn.ReLU(), part)


def class_maps():
    parts = {"features": nn.Conv2d(3, 64, 7), "classes": nn.Conv2d(64, 8, 1)}
    return Wired(lambda self, x: self.classes(self.features(x)).mean((2, 3)), **parts)


def beside(auxiliary):
    """Return a network with a part for the loss alone after its last layer, or one in which that part is the last."""

    def run(self, x):
        maps = self.features(x)
        part = self.part(maps)
        return self.classes((maps if auxiliary else part).mean((2, 3)))

    parts = {"features": nn.Conv2d(3, 64, 7), "part": nn.Sequential(nn.Conv2d(64, 5, 1), nn.ReLU())}
    return Wired(run, **parts, classes=nn.Linear(64 if auxiliary else 5, 4))


def narrowing_to(answer):
    parts = {"features": nn.Conv2d(3, 64, 7), "part": nn.Conv2d(64, 5, 1)}
    return Wired(lambda self, x: answer(self.part(self.features(x)).mean((2, 3))), **parts)


def pooled_to_one_size(*parts):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), *parts, nn.AdaptiveAvgPool2d(5), nn.Flatten(), nn.Linear(200, 4)
    )


def pooled_sum():
    parts = {"first": nn.Conv2d(3, 8, 3), "short": nn.Conv2d(3, 8, 3), "pool": nn.AdaptiveAvgPool2d(5)}
    return Wired(lambda self, x: self.pool(self.first(x) + self.short(x)).sum((2, 3)), **parts)


def attention():
    parts = {"features": nn.Conv2d(3, 8, 7), "weights": nn.Conv2d(8, 1, 1), "classes": nn.Linear(8, 4)}

    def run(self, x):
        maps = self.features(x)
        return self.classes((maps * self.weights(maps).sigmoid()).mean((2, 3)))

    return Wired(run, **parts)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        # As segmentation_models_pytorch has it: convolution, enlarging, activation; with more classes than channels.
        pytest.param(lambda: nn.Sequential(nn.Sequential(encoder_decoder(), head(1))), "0.0", id="a head in a wrapper"),
        pytest.param(lambda: nn.Sequential(encoder_decoder(), head(21)), "0", id="a head for many classes"),
        pytest.param(lambda: nn.Sequential(*encoder_decoder(), *head(1)), "3", id="a flat head"),
        pytest.param(lambda: enlarging(3), "decoder", id="a head with the shape of a picture"),
        pytest.param(lambda: enlarging(5), "decoder", id="a head that is enlarged outside"),
        pytest.param(detector, "neck", id="a head for levels"),
        pytest.param(level_pool, "second", id="a head that takes two maps"),
        pytest.param(token_labels, "norm", id="a head for tokens"),
        pytest.param(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3)), "2", id="convolutions"),
        pytest.param(lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), "1", id="the size of a picture"),
        pytest.param(lambda: narrowing(nn.Conv2d(64, 8, 1)), "1", id="a head that narrows"),
        pytest.param(class_maps, "features", id="maps of the classes, averaged outside"),
        pytest.param(attention, "features", id="attention of one channel"),
        pytest.param(lambda: beside(auxiliary=True), "features", id="an auxiliary head"),
        pytest.param(lambda: beside(auxiliary=False), "part", id="a neck"),
        pytest.param(lambda: narrowing_to(lambda found: None), "part", id="a neck without an output"),
        pytest.param(lambda: narrowing_to(lambda found: found.argmax(1)), "part", id="a neck of classes alone"),
        pytest.param(
            lambda: narrowing_to(lambda found: torch.zeros(3, 4)), "part", id="a neck and numbers that are the same"
        ),
        pytest.param(pooled_sum, "pool", id="a pooling of a sum"),
        pytest.param(pooled_to_one_size, "1", id="a pooling of all maps to one size"),
        pytest.param(lambda: pooled_to_one_size(nn.MaxPool2d(30)), "1", id="a pooling of one position to many"),
        pytest.param(
            lambda: narrowing(nn.Sequential(nn.Conv2d(64, 8, 1), nn.BatchNorm2d(8))), "2", id="a block does too"
        ),
        pytest.param(lambda: nn.Sequential(vit().patch_embed, *vit().blocks), "2", id="ViT blocks"),
    ],
)
def test_a_head_is_not_explained_but_the_last_layer_before_it(model, name):
    assert find_target_layer(model(), torch.rand(1, 3, 32, 32)).name == name


def test_a_square_number_of_queries_is_no_grid_of_patches_larger_than_any_networks():
    assert spatial_output(torch.rand(1, 100, 8), torch.rand(1, 3, 800, 800)) is None
    assert spatial_output(torch.rand(1, 100, 8), torch.rand(1, 3, 160, 160)) is not None
    assert spatial_output(torch.rand(1, 1, 8), torch.rand(1, 3, 32, 32)) is None


@pytest.mark.parametrize(
    ("model", "size", "layers", "doubtful"),
    [
        pytest.param(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 2)), 28, [], [], id="MLP"),
        # 11 x 11 of something, but not patches of a picture of 28 x 28.
        pytest.param(
            lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.Linear(676, 121), nn.Linear(121, 64)),
            28,
            ["0"],
            [],
            id="tokens on no grid",
        ),
        pytest.param(shuffling, 64, ["patches"], ["mix"], id="patches in an order of their own"),
        pytest.param(with_positions, 224, ["patches"], [], id="positions that are learnt"),
    ],
)
def test_a_model_that_ends_without_a_map_of_the_picture_has_no_target(model, size, layers, doubtful):
    run = dry_run(model(), torch.zeros(1, 3, size, size))
    assert run.target is None
    assert [layer.name for layer in run.layers] == layers
    assert [*run.named] == [*layers, *doubtful]


def test_looking_for_the_layer_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    model[2].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    find_target_layer(model, torch.randn(2, 3, 8, 8))
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_the_layer_of_a_compiled_model_is_found_also_after_it_ran():
    model, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)), torch.zeros(1, 3, 8, 8)
    compiled = torch.compile(model, backend="eager")
    compiled(images)
    assert find_target_layer(compiled, images).module is model[0]


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
    for name in ("-3", "-0", "4", "44", nn.ReLU()):
        with pytest.raises(ValueError, match=r"Sequential has no layer '.*' with a spatial map; near it: ") as refused:
            choose_layers(model, run, [name])
        near, _, rest = str(refused.value).partition("near it: ")[2].partition("; ")
        assert set(near.split(", ")) <= {"0", "1"}  # no indices
        assert rest.endswith("list all, from -2 to -1")


def test_layers_that_become_maps_in_different_ways_are_refused_together():
    model = vit()
    run = dry_run(model, torch.rand(1, 3, 32, 32))
    assert common_transform(choose_layers(model, run, ["blocks.0", "blocks.1"])) == TokensToMaps(1, 1.0)
    with pytest.raises(ValueError, match=r"in one way, got `patch_embed.proj` .* `norm`"):
        common_transform(choose_layers(model, run, ["patch_embed.proj", "norm"]))
