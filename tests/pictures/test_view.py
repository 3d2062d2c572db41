"""What a network sees of a picture, read off its preprocessing: one call a size, whatever the preprocessing."""

from dataclasses import dataclass

import pytest
from torchvision import transforms

from tucker_cam.pictures.view import view_of


@dataclass
class Counted:
    """Counts how often it is called; as a dataclass that is not frozen it cannot be hashed."""

    steps: list
    calls: int = 0

    def __call__(self, picture):
        self.calls += 1
        return transforms.Compose([*self.steps, transforms.ToTensor(), transforms.Normalize([0.4] * 3, [0.2] * 3)])(
            picture
        )


BICUBIC = transforms.InterpolationMode.BICUBIC


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([transforms.CenterCrop((50, 100))], (30, 35, 100, 50)),
        ([transforms.Resize(32, BICUBIC), transforms.CenterCrop(28)], (26.7, 7.5, 106.7, 105)),
        ([transforms.Resize((64, 64))], (0, 0, 160, 120)),
        ([transforms.Pad(20), transforms.Resize((80, 80))], (-20, -20, 200, 160)),
        ([transforms.Pad(20, fill=127), transforms.Resize((80, 80), BICUBIC)], (-20, -20, 200, 160)),
        ([transforms.Pad(20, padding_mode="reflect"), transforms.CenterCrop((120, 160))], (0, 0, 160, 120)),
    ],
)
def test_the_view_takes_one_call_a_size_and_is_remembered(steps, expected):
    preprocess = Counted(steps)
    assert view_of(preprocess, (160, 120)) == pytest.approx(expected, abs=1)
    # What becomes of black and the three colours is found once.
    assert preprocess.calls == 5
    assert view_of(preprocess, (320, 240)) is not None
    assert view_of(preprocess, (160, 120)) is not None
    assert preprocess.calls == 6


@pytest.mark.parametrize(
    ("first", "last"),
    [
        ([transforms.Grayscale(3)], []),
        ([transforms.Grayscale()], []),
        ([], [transforms.Lambda(lambda x: x.flip(0))]),
        ([], [transforms.Lambda(lambda x: x.mean(0, keepdim=True))]),
    ],
)
def test_the_view_of_a_network_that_sees_grey_or_blue_green_red_is_found_too(first, last):
    steps = [transforms.Pad(20), *first, transforms.Resize(64, BICUBIC), transforms.CenterCrop(50)]
    preprocess = transforms.Compose([*steps, transforms.ToTensor(), *last])
    assert view_of(preprocess, (160, 120)) == pytest.approx((17.5, -2.5, 125, 125), abs=1)


@pytest.mark.parametrize("frames", [None, 4])
def test_what_is_no_box_or_fails_has_no_view(frames):
    def fails(picture):
        raise ZeroDivisionError

    turns = transforms.RandomRotation((30, 30)), transforms.RandomHorizontalFlip(1), transforms.CenterCrop(1)
    for preprocess in (fails, *(Counted([step]) for step in turns)):
        assert view_of(preprocess, (160, 120), frames) is None
