"""Folders as users have them: boxes, masks, torchvision's layouts, and pictures of every kind."""

import numpy as np
import pytest
import torch
from annotated import BOX, VOC, write_boxes, write_mask, write_picture
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder, VOCDetection, VOCSegmentation

from tucker_cam.models import Network
from tucker_cam.pictures.annotations import find_samples, network_view


def model(*geometry):
    return Network(
        torch.nn.Identity(),
        transforms.Compose([*geometry, transforms.ToTensor(), transforms.Normalize([0.4] * 3, [0.2] * 3)]),
        (0.4,) * 3,
        (0.2,) * 3,
    )


def only(folder, *geometry, **options):
    """Return what is seen of a folder's only sample."""
    (sample,), kind, _ = find_samples(folder, **options)
    return network_view(sample, kind, model(*geometry))


def test_a_box_is_counted_from_1_with_both_ends_inside(tmp_path):
    write_picture(tmp_path / "images" / "a.png")
    write_boxes(tmp_path / "annotations" / "a.xml", (3, 2, 5, 4))
    seen = only(tmp_path)
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[1:4, 2:5] = True
    assert torch.equal(seen.mask, expected)
    assert not seen.remarks


def test_several_boxes_are_one_mask(tmp_path):
    write_picture(tmp_path / "a.png")
    write_boxes(tmp_path / "a.xml", (1, 1, 2, 2), (2, 2, 3, 3))
    assert only(tmp_path).mask.sum() == 7


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
        seen = only(tmp_path, *geometry)
        assert torch.equal(seen.mask, seen.network_input[0] * 0.2 + 0.4 > 0.5)
        assert 0 < seen.mask.float().mean() < 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_of_a_turned_photograph_turn_with_it(tmp_path, orientation):
    # As cameras store it: the pixels lie, and the EXIF data says how to turn them. The boxes are of the stored pixels.
    pixels = np.zeros((40, 64, 3), np.uint8)
    pixels[8:16, 32:56] = 255
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.png", exif=exif)
    write_boxes(tmp_path / "a.xml", (33, 9, 56, 16), size=(64, 40))
    seen = only(tmp_path)
    if orientation in (5, 6, 7, 8):
        assert seen.mask.shape == (64, 40)
        assert torch.equal(seen.mask, seen.network_input[0] > 0)
    else:
        # The sizes do not tell: boxes are taken to be drawn on the upright picture.
        assert seen.mask.nonzero().amin(0).tolist() == [8, 32]
        assert ["as its EXIF data turns it" in remark for remark in seen.remarks] == [True] * (orientation > 1)


def test_boxes_of_the_upright_photograph_stay_where_they_are(tmp_path):
    picture = Image.new("RGB", (8, 6))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    write_boxes(tmp_path / "a.xml", (1, 1, 2, 8), size=(6, 8))
    mask = only(tmp_path).mask
    assert mask.shape == (8, 6)
    assert mask[:, :2].all()
    assert not mask[:, 2:].any()


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "1", "I;16"])
def test_masks_of_every_kind_are_read(tmp_path, mode):
    write_picture(tmp_path / "images" / "a.jpg")
    drawn = np.zeros((6, 8), np.uint8)
    drawn[1:4, 2:5] = 1
    arrays = {
        "L": drawn * 255,
        "P": drawn * 15,
        "RGB": np.stack([0 * drawn, drawn * 200, 0 * drawn], -1),
        "RGBA": np.stack([drawn * 200, drawn * 0, drawn * 0, 0 * drawn + 255], -1),
        "1": drawn.astype(bool),
        "I;16": drawn.astype(np.uint16) * 300,
    }
    write_mask(tmp_path / "masks" / "a.png", arrays[mode], mode)
    with Image.open(tmp_path / "masks" / "a.png") as stored:
        assert stored.mode == mode
    assert torch.equal(only(tmp_path).mask, torch.from_numpy(drawn).bool())


def test_what_is_transparent_in_a_mask_is_no_object(tmp_path):
    write_picture(tmp_path / "a.png")
    colours = np.full((6, 8, 4), 255, np.uint8)
    colours[:, 4:, 3] = 0
    write_mask(tmp_path / "masks" / "a.png", colours)
    assert only(tmp_path).mask.sum() == 24


def test_vocs_void_is_no_object_in_a_mask_of_colour_numbers(tmp_path):
    write_picture(tmp_path / "a.jpg")
    numbers = np.zeros((6, 8), np.uint8)
    numbers[2, 2:5] = (255, 12, 255)
    write_mask(tmp_path / "masks" / "a.png", numbers, "P")
    assert only(tmp_path).mask.nonzero().tolist() == [[2, 3]]


@pytest.fixture
def voc(tmp_path):
    """VOC's layout as torchvision's own classes open it."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("2007_000001", "2007_000002"):
        write_picture(root / "JPEGImages" / f"{name}.jpg")
        write_boxes(root / "Annotations" / f"{name}.xml", (2, 2, 4, 5))
    numbers = np.zeros((6, 8), np.uint8)
    numbers[3:5, 1:3] = 7
    for kind in ("SegmentationClass", "SegmentationObject"):
        write_mask(root / kind / "2007_000001.png", numbers, "P")
    for task, names in (("Main", "2007_000001\n2007_000002\n"), ("Segmentation", "2007_000001\n")):
        (root / "ImageSets" / task).mkdir(parents=True)
        (root / "ImageSets" / task / "val.txt").write_text(names)
    return tmp_path


def test_vocs_boxes_are_those_that_torchvision_reads(voc):
    samples, kind, _ = find_samples(voc)
    assert not find_samples(voc).remarks
    theirs = VOCDetection(voc, image_set="val")
    assert kind == "boxes"
    assert [str(sample.picture) for sample in samples] == theirs.images
    for sample, (_, target) in zip(samples, theirs, strict=True):
        corners = {k: int(v) for k, v in target["annotation"]["object"][0]["bndbox"].items()}
        where = network_view(sample, kind, model()).mask.nonzero()
        assert where.amin(0).tolist() == [corners["ymin"] - 1, corners["xmin"] - 1]
        assert where.amax(0).tolist() == [corners["ymax"] - 1, corners["xmax"] - 1]


def test_vocs_masks_are_those_that_torchvision_reads(voc):
    samples, kind, _ = find_samples(voc, annotations="masks")
    theirs = VOCSegmentation(voc, image_set="val")
    assert [str(sample.picture) for sample in samples] == theirs.images
    ours = network_view(samples[0], kind, model()).mask
    assert torch.equal(ours, torch.from_numpy(np.asarray(theirs[0][1]) > 0))


def test_an_image_folder_is_what_torchvision_finds(tmp_path):
    for name in ("cat/1.jpg", "cat/deep/2.PNG", "dog/1.jpg"):
        write_picture(tmp_path / name)
    samples, kind, _ = find_samples(tmp_path)
    assert kind == "none"
    assert [sample.name for sample in samples] == ["cat/1.jpg", "cat/deep/2.PNG", "dog/1.jpg"]
    assert [str(s.picture) for s in samples] == sorted(path for path, _ in ImageFolder(tmp_path).samples)


def test_annotations_of_pictures_of_one_name_in_two_folders_are_not_mixed_up(tmp_path):
    for kind, box in (("cat", (1, 1, 1, 1)), ("dog", (1, 1, 2, 2))):
        write_picture(tmp_path / kind / "1.png")
        write_boxes(tmp_path / "annotations" / kind / "1.xml", box)
    samples, kind, _ = find_samples(tmp_path)
    assert [network_view(sample, kind, model()).mask.sum().item() for sample in samples] == [1, 4]


def test_a_stray_xml_does_not_hide_the_masks(tmp_path):
    write_picture(tmp_path / "images" / "a.jpg")
    write_mask(tmp_path / "masks" / "a.png", np.full((6, 8), 255, np.uint8))
    (tmp_path / "pom.xml").write_text("<project/>")
    assert find_samples(tmp_path).annotations == "masks"


def test_annotations_that_no_pictures_name_finds_are_counted_and_one_is_named(tmp_path):
    write_picture(tmp_path / "images" / "a.jpg")
    write_picture(tmp_path / "masks" / "a.png")
    assert not find_samples(tmp_path).remarks
    for name in ("annots/a.xml", "masks/a_mask.png", "annotations/trimaps/a.png"):
        write_picture(tmp_path / name, format="PNG")
    (remark,) = find_samples(tmp_path).remarks
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
    (remark,) = find_samples(tmp_path).remarks
    assert remark.startswith(f"{tmp_path / 'labels'}: ")


def test_suffixes_may_be_written_in_any_case(tmp_path):
    write_picture(tmp_path / "A.JPG")
    write_boxes(tmp_path / "A.Xml", (1, 1, 2, 2))
    write_picture(tmp_path / "B.Png")
    write_mask(tmp_path / "masks" / "B.PNG", np.full((6, 8), 255, np.uint8))
    assert find_samples(tmp_path, annotations="boxes").samples[0].annotation == tmp_path / "A.Xml"
    assert find_samples(tmp_path, annotations="masks").samples[0].annotation == tmp_path / "masks" / "B.PNG"


def test_a_jpeg_masks_noise_is_no_object(tmp_path):
    write_picture(tmp_path / "a.png", size=(40, 30))
    drawn = np.zeros((30, 40), np.uint8)
    # Not on the borders of JPEG's blocks of 8 x 8, where there would be no noise.
    drawn[11:19, 13:29] = 255
    write_mask(tmp_path / "masks" / "a.jpg", drawn)
    assert only(tmp_path).mask.sum() == 8 * 16


def test_a_size_that_would_not_fit_into_memory_is_refused(tmp_path):
    write_picture(tmp_path / "a.png")
    for size in ((10**6, 10**6), (-5, 6)):
        write_boxes(tmp_path / "a.xml", (1, 1, 2, 2), size=size)
        with pytest.raises(ValueError, match=r"8 x 6 as a\.png, found one of"):
            only(tmp_path)


def test_hidden_files_are_left_out(tmp_path):
    write_picture(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"a resource fork")
    assert len(find_samples(tmp_path).samples) == 1


def test_a_sample_is_the_same_again_and_part_of_a_larger_one(tmp_path):
    for index in range(20):
        write_picture(tmp_path / f"{index}.png", size=(2, 2))
    names = {limit: [s.name for s in find_samples(tmp_path, limit=limit).samples] for limit in (5, 12, 100)}
    assert names[5] == [s.name for s in find_samples(tmp_path, limit=5).samples]
    assert set(names[5]) < set(names[12])
    assert len(names[100]) == 20
    assert names[12] == sorted(names[12])


def test_a_picture_without_boxes_is_seen_and_said_to_be_without(tmp_path):
    write_picture(tmp_path / "a.png")
    write_picture(tmp_path / "b.png")
    write_boxes(tmp_path / "b.xml")
    write_picture(tmp_path / "c.png")
    write_boxes(tmp_path / "c.xml", (1, 1, 2, 2))
    samples, kind, _ = find_samples(tmp_path)
    seen = [network_view(sample, kind, model()) for sample in samples]
    assert [each.mask.any().item() for each in seen] == [False, False, True]
    assert "a.png: without boxes" in seen[0].remarks[0]
    assert "b.xml: without an object" in seen[1].remarks[0]
    assert [s.name for s in find_samples(tmp_path, annotations="boxes").samples] == ["b.png", "c.png"]


def test_an_object_that_is_cropped_away_is_said_to_be(tmp_path):
    write_picture(tmp_path / "a.png", size=(100, 10))
    write_boxes(tmp_path / "a.xml", (1, 1, 5, 5), size=(100, 10))
    seen = only(tmp_path, transforms.CenterCrop(10))
    assert not seen.mask.any()
    assert "cropped away" in seen.remarks[0]


def test_a_box_that_reaches_beyond_the_picture_is_cut_off_and_named(tmp_path):
    write_picture(tmp_path / "a.png")
    write_boxes(tmp_path / "a.xml", (7, 5, 20, 20))
    seen = only(tmp_path)
    assert seen.mask.sum() == 4
    assert "beyond a.png" in seen.remarks[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (VOC.format(size=(8, 6), objects=BOX.format(20, 1, 30, 4)), "inside the picture, 8 x 6, found 20, 1 to 30, 4"),
        (VOC.format(size=(8, 6), objects=BOX.format(5, 1, 3, 4)), "inside the picture"),
        (VOC.format(size=(8, 6), objects=BOX.format("x", 1, 3, 4)), "a number as <xmin>, found 'x'"),
        (VOC.format(size=(8, 6), objects=BOX.format("inf", 1, 3, 4)), "a number as <xmin>"),
        (VOC.format(size=(80, 60), objects=BOX.format(5, 1, 7, 4)), "8 x 6 as a.png, found one of 80 x 60"),
        ("{}", "Pascal VOC XML, found something else"),
        ("", "Pascal VOC XML, found something else"),
        ('<?xml version="1.0" encoding="bogus"?><annotation/>', "Pascal VOC XML, found something else"),
        ('<?xml version="1.0" encoding="gbk"?><annotation/>', "Pascal VOC XML, found something else"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "Pascal VOC XML, found something else"),
    ],
)
def test_boxes_that_do_not_fit_are_one_clear_error(tmp_path, text, words):
    write_picture(tmp_path / "a.png")
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(ValueError, match="expected") as caught:
        only(tmp_path)
    assert words in str(caught.value)
    assert str(tmp_path / "a.xml") in str(caught.value)


def test_a_size_that_was_not_filled_in_is_the_pictures(tmp_path):
    write_picture(tmp_path / "a.png")
    write_boxes(tmp_path / "a.xml", (7, 5, 8, 6), size=(0, 0))
    assert only(tmp_path).mask.sum() == 4


def test_a_mask_of_another_size_or_none_at_all_is_one_clear_error(tmp_path):
    write_picture(tmp_path / "a.png")
    write_mask(tmp_path / "masks" / "a.png", np.full((3, 3), 255, np.uint8))
    with pytest.raises(ValueError, match=r"8 x 6 as a\.png, found one of 3 x 3"):
        only(tmp_path)
    (tmp_path / "masks" / "a.png").write_text("no picture")
    with pytest.raises(OSError, match="expected a mask as a picture"):
        only(tmp_path)


def test_folders_without_pictures_are_one_clear_error(tmp_path):
    with pytest.raises(OSError, match="found nothing of that name"):
        find_samples(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(OSError, match="found a file"):
        find_samples(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="at any depth, found none"):
        find_samples(tmp_path)
    write_picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match="pictures with boxes, found none among 1"):
        find_samples(tmp_path, annotations="boxes")
    with pytest.raises(ValueError, match="at least 1 picture, got 0"):
        find_samples(tmp_path, limit=0)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_a_picture_of_32_bit_numbers_is_not_taken_for_black(tmp_path, dtype):
    Image.fromarray(np.ones((6, 8), dtype)).save(tmp_path / "a.tif")
    with pytest.raises(OSError, match=r"a.tif: expected a picture of 8 or 16 bits a channel, found one of 32"):
        only(tmp_path)


@pytest.mark.parametrize("mode", ["L", "CMYK", "I;16", "P", "RGBA", "1"])
def test_pictures_of_every_kind_become_network_inputs(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        Image.fromarray(np.full((6, 8), 32896, np.uint16)).save(path)
    else:
        write_picture(path, mode=mode)
    with Image.open(path) as stored:
        assert stored.mode == mode
    seen = only(tmp_path)
    assert seen.network_input.shape == (3, 6, 8)
    grey = seen.network_input.mean() * 0.2 + 0.4
    assert 0.4 < grey < 0.6
