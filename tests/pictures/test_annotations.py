"""Folders as users have them: boxes, masks, torchvision's layouts, and pictures of every kind."""

import numpy as np
import pytest
import torch
from annotated import BOX, VOC, write_boxes, write_mask, write_picture
from PIL import Image, ImageOps
from test_security import encoded, huge_png
from torchvision import transforms
from torchvision.datasets import VOCSegmentation

from tucker_cam.errors import TuckerCamError
from tucker_cam.models import Network
from tucker_cam.pictures.annotations import find_samples, network_view


def network(*geometry):
    steps = [*geometry, transforms.ToTensor(), transforms.Normalize([0.4] * 3, [0.2] * 3)]
    return Network(torch.nn.Identity(), transforms.Compose(steps), (0.4,) * 3, (0.2,) * 3)


def views(folder, *geometry, **options):
    samples, kind, _ = find_samples(folder, **options)
    return {sample.name: network_view(sample, kind, network(*geometry)) for sample in samples}


def only(folder, *geometry):
    (view,) = views(folder, *geometry).values()
    return view


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([(3, 2, 5, 4)], (slice(1, 4), slice(2, 5))),
        ([(1, 1, 8, 3), (1, 3, 8, 6)], (slice(None), slice(None))),
        ([(7, 5, 20, 20)], (slice(4, 6), slice(6, 8))),
    ],
)
@pytest.mark.parametrize("size", [(8, 6), (0, 0)])
def test_a_box_is_counted_from_1_with_both_ends_inside_and_cut_off_at_the_edge(tmp_path, boxes, expected, size):
    write_picture(tmp_path / "images" / "a.png")
    write_boxes(tmp_path / "annotations" / "a.xml", *boxes, size=size)
    view, mask = only(tmp_path), torch.zeros(6, 8, dtype=torch.bool)
    mask[expected] = True
    assert torch.equal(view.mask, mask)


def test_boxes_follow_the_models_resize_and_crop(tmp_path):
    # The object is marked white in the picture itself: where the network sees white, the mask must be.
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[20:50, 30:70] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    write_boxes(tmp_path / "a.xml", (31, 21, 70, 50), size=(100, 60))
    for geometry in (
        (transforms.Resize(32, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(28)),
        (transforms.Resize((24, 24)),),
        (transforms.CenterCrop(90),),
    ):
        view = only(tmp_path, *geometry)
        assert torch.equal(view.mask, view.network_input[0] * 0.2 + 0.4 > 0.5)
        assert 0 < view.mask.float().mean() < 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_of_a_turned_photograph_turn_with_it(tmp_path, orientation):
    # As cameras store it: the pixels lie, and the EXIF data says how to turn them. The boxes are of the stored pixels.
    pixels = np.zeros((40, 64, 3), np.uint8)
    pixels[8:16, 32:56] = 255
    picture = Image.fromarray(pixels)
    picture.getexif()[0x0112] = orientation
    picture.save(tmp_path / "a.png", exif=picture.getexif())
    write_boxes(tmp_path / "a.xml", (33, 9, 56, 16), size=(64, 40))
    view = only(tmp_path)
    if orientation in (5, 6, 7, 8):
        assert view.mask.shape == (64, 40)
        assert torch.equal(view.mask, view.network_input[0] > 0)
        # Those of the upright photograph stay where they are.
        write_boxes(tmp_path / "a.xml", (1, 1, 2, 64), size=(40, 64))
        assert only(tmp_path).mask.nonzero().amax(0).tolist() == [63, 1]
    else:
        # The sizes do not tell: boxes are taken to be drawn on the upright picture.
        assert view.mask.nonzero().amin(0).tolist() == [8, 32]


DRAWN = np.zeros((6, 8), np.uint8)
DRAWN[1:4, 2:5] = 1


@pytest.mark.parametrize(
    ("mode", "array"),
    [
        ("L", DRAWN * 255),
        # VOC's void is no object.
        ("P", np.where(np.arange(8) == 6, 255, DRAWN * 15).astype(np.uint8)),
        ("RGB", np.stack([0 * DRAWN, DRAWN * 200, 0 * DRAWN], -1)),
        # What is transparent is none either.
        ("RGBA", np.stack([0 * DRAWN + 200, DRAWN * 0, DRAWN * 0, DRAWN], -1)),
        ("1", DRAWN.astype(bool)),
        ("I;16", DRAWN.astype(np.uint16) * 300),
    ],
)
def test_masks_of_every_kind_are_read(tmp_path, mode, array):
    write_picture(tmp_path / "images" / "A.JPG")
    write_mask(tmp_path / "masks" / "A.PNG", array, mode)
    assert torch.equal(only(tmp_path).mask, torch.from_numpy(DRAWN).bool())


@pytest.mark.parametrize(
    ("kind", "saved"),
    [
        ("png", lambda mask: mask.convert("RGB").quantize(2)),
        ("png", lambda mask: ImageOps.invert(mask.convert("L")).convert("RGB").quantize(2)),
        ("png", lambda mask: mask.convert("L").convert("P")),
        ("tif", lambda mask: mask.convert("RGB").convert("CMYK")),
    ],
    ids=["palette", "inverted palette", "grey palette", "CMYK"],
)
def test_masks_are_read_by_what_they_look_like(tmp_path, kind, saved):
    write_picture(tmp_path / "images" / "a.png")
    (tmp_path / "masks").mkdir()
    saved(Image.fromarray(DRAWN.astype(bool))).save(tmp_path / "masks" / f"a.{kind}")
    with Image.open(tmp_path / "masks" / f"a.{kind}") as mask:
        bright = np.asarray(mask.convert("L")) > 127
    assert torch.equal(only(tmp_path).mask, torch.from_numpy(bright))


def test_bright_padding_is_no_object(tmp_path):
    write_picture(tmp_path / "a.png", size=(40, 20))
    write_boxes(tmp_path / "a.xml", (11, 6, 20, 10), size=(40, 20))
    samples, kind, _ = find_samples(tmp_path)
    found = network_view(samples[0], kind, Network(torch.nn.Identity(), letterbox, (0,) * 3, (1,) * 3))
    assert found.mask.sum() == 10 * 5


def letterbox(picture):
    return transforms.ToTensor()(ImageOps.pad(picture, (40, 40), color=(255, 255, 255)))


@pytest.mark.parametrize("kind", ["jpg", "jp2", "webp"])
def test_a_blurred_masks_noise_is_no_object(tmp_path, kind):
    write_picture(tmp_path / "a.png", size=(40, 30))
    drawn = np.zeros((30, 40), np.uint8)
    # Not on the borders of JPEG's blocks of 8 x 8, where there would be no noise.
    drawn[11:19, 13:29] = 255
    lossy = {"irreversible": True, "quality_mode": "rates", "quality_layers": [5]} if kind == "jp2" else {"quality": 60}
    (tmp_path / "masks").mkdir()
    Image.fromarray(drawn).save(tmp_path / "masks" / f"a.{kind}", **lossy)
    assert abs(only(tmp_path).mask.sum() - 8 * 16) <= 4


def test_vocs_annotations_are_those_that_torchvision_reads(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    numbers = np.zeros((6, 8), np.uint8)
    numbers[3:5, 1:3] = 7
    for task in ("Main", "Segmentation"):
        write_picture(root / "JPEGImages" / f"{task}.jpg")
        write_boxes(root / "Annotations" / f"{task}.xml", (2, 2, 4, 5))
        (root / "ImageSets" / task).mkdir(parents=True)
        (root / "ImageSets" / task / "val.txt").write_text(f"{task}\n")
    for kind in ("SegmentationClass", "SegmentationObject"):
        write_mask(root / kind / "Segmentation.png", numbers, "P")
    found, masks = find_samples(tmp_path), VOCSegmentation(tmp_path, image_set="val")
    assert (found.annotations, found.remarks) == ("boxes", [])
    assert [view.mask.sum() for view in views(tmp_path).values()] == [3 * 4] * 2
    assert [str(sample.picture) for sample in find_samples(tmp_path, annotations="masks").samples] == masks.images
    (view,) = views(tmp_path, annotations="masks").values()
    assert torch.equal(view.mask, torch.from_numpy(np.asarray(masks[0][1]) > 0))


def test_annotations_of_pictures_of_one_name_in_two_folders_are_not_mixed_up(tmp_path):
    for kind, box in (("cat", (1, 1, 1, 1)), ("dog", (1, 1, 2, 2))):
        write_picture(tmp_path / kind / "1.png")
        write_boxes(tmp_path / "annotations" / kind / "1.xml", box)
    assert [view.mask.sum().item() for view in views(tmp_path).values()] == [1, 4]


def test_annotations_that_no_pictures_name_finds_are_counted_and_one_is_named(tmp_path):
    write_picture(tmp_path / "images" / "a.jpg")
    write_picture(tmp_path / "masks" / "a.png")
    assert not find_samples(tmp_path).remarks
    for name in ("annots/a.xml", "masks/a_mask.png", "annotations/trimaps/a.png"):
        write_picture(tmp_path / name, format="PNG")
    # A stray XML file does not hide the masks.
    _, kind, (remark,) = find_samples(tmp_path)
    assert kind == "masks"
    assert f"belong to no picture: 3, {tmp_path / 'annots' / 'a.xml'} among them" in remark
    with pytest.raises(ValueError, match="found none among 1; XML files or masks that belong to no picture: 3"):
        find_samples(tmp_path, annotations="boxes")


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_masks_that_would_be_scored_as_pictures_are_named(tmp_path, mode):
    for name in ("1", "2", "3"):
        write_picture(tmp_path / "images" / f"{name}.jpg")
        write_picture(tmp_path / "faces" / f"{name}.jpg")
        write_picture(tmp_path / "grey" / f"of-{name}.jpg", mode="L")
    assert not find_samples(tmp_path).remarks
    for name in ("1", "2"):
        write_picture(tmp_path / "labels" / f"{name}.png", mode=mode)
    (tmp_path / "broken.png").write_bytes(b"")
    (remark,) = find_samples(tmp_path).remarks
    assert remark.startswith(f"{tmp_path / 'labels'}: ")


def test_why_a_picture_is_not_scored_on_localisation_is_said(tmp_path):
    for name in "abcd":
        write_picture(tmp_path / f"{name}.png")
    write_boxes(tmp_path / "b.xml")
    write_boxes(tmp_path / "c.xml", (1, 1, 1, 1))
    write_boxes(tmp_path / "d.xml", (4, 3, 5, 4))
    found = views(tmp_path, transforms.CenterCrop(2))
    said = ["a.png: without boxes", "b.xml: without an object", "c.xml: its object is cropped away"]
    for view, words in zip(found.values(), said, strict=False):
        assert not view.mask.any()
        assert words in view.remarks[0]
    assert found["d.png"].mask.all()
    boxed = find_samples(tmp_path, annotations="boxes").samples
    assert [sample.name for sample in boxed] == ["b.png", "c.png", "d.png"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.xml", VOC.format(size=(8, 6), objects=BOX.format(20, 1, 30, 4)), "8 x 6, found 20, 1 to 30, 4"),
        ("a.xml", VOC.format(size=(8, 6), objects=BOX.format(5, 1, 3, 4)), "inside the picture"),
        ("a.xml", VOC.format(size=(8, 6), objects=BOX.format("x", 1, 3, 4)), "something else (could not convert"),
        # Refused before there is an array of the size.
        ("a.xml", VOC.format(size=(10**6, 10**6), objects=BOX.format(5, 1, 7, 4)), "a picture of 8 x 6, found one of"),
        ("a.xml", "{}", "Pascal VOC XML, found something else"),
        ("a.xml", '<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "Pascal VOC XML, found something else"),
        ("masks/a.png", encoded(size=(3, 3)), "a picture of 8 x 6, found one of 3 x 3"),
        ("masks/a.png", b"no picture", "expected a mask as a picture"),
        ("masks/a.png", huge_png(), "expected a mask as a picture, found none or a broken one (Image size"),
    ],
)
def test_annotations_that_do_not_fit_are_one_clear_error(tmp_path, name, content, words):
    write_picture(tmp_path / "a.png")
    (tmp_path / "masks").mkdir()
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TuckerCamError) as caught:
        only(tmp_path)
    assert words in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
