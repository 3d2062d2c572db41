import pytest
import torch
from torch.testing import assert_close

from tucker_cam import channel_modes
from tucker_cam.decomposition import gram
from tucker_cam.decomposition.gram import float32_products_do, gram_matrix, rescale_extremes, unfold


@pytest.mark.parametrize(("rows", "columns"), [(700, 20), (20, 700), (49, 49), (250, 220)])
def test_the_gram_matrix_is_the_smaller_one_in_float64(rows, columns):
    unfolding = torch.randn(2, rows, columns)
    precise = unfolding.double()
    expected = precise.mT @ precise if rows >= columns else precise @ precise.mT
    assert_close(gram_matrix(unfolding), expected, rtol=1e-13, atol=1e-11)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_ordinary_features_are_not_copied(layout):
    features = torch.randn(2, 20, 5, 4).contiguous(memory_format=layout)
    moderated, divisors = rescale_extremes(features)
    assert unfold(moderated).data_ptr() == features.data_ptr()
    assert divisors.tolist() == [1, 1]


def test_only_the_images_with_extreme_features_are_scaled():
    features = torch.randn(6, 2, 3, 4, dtype=torch.float64)
    peaks = torch.tensor([1.0, 1e300, 1e-300, 0.0, 1e13, 1e-13], dtype=torch.float64)
    features *= (peaks / features.abs().amax((1, 2, 3)))[:, None, None, None]
    moderated, divisors = rescale_extremes(features)
    assert divisors[[0, 3]].tolist() == [1, 1]
    # Powers of two, so that no number is rounded.
    assert torch.equal(moderated * divisors[:, None, None, None], features)
    largest = moderated.abs().amax((1, 2, 3))
    assert ((largest >= 1) & (largest < 2) | (peaks == 0)).all()


@pytest.mark.parametrize("before_torch_2_9", [False, True])
def test_float32_products_are_not_relied_on_where_they_may_be_rounded_or_are_long_sums(before_torch_2_9, monkeypatch):
    for backend in (torch.backends.cuda, torch.backends.mkldnn) if before_torch_2_9 else ():
        monkeypatch.setattr(backend, "matmul", object(), raising=False)
    assert float32_products_do(torch.rand(1, 20, 30))
    assert not float32_products_do(torch.rand(1, 2, 1000))
    assert not float32_products_do(torch.rand(1, 20, 30).double())
    torch.set_float32_matmul_precision("high")
    try:
        assert not float32_products_do(torch.rand(1, 20, 30))
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_device_that_cannot_decompose_hands_its_features_to_the_cpu(monkeypatch):
    moved = []
    monkeypatch.setattr(gram, "_DEVICES_THAT_DECOMPOSE", ())
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (moved.append(self.shape), self)[1])
    modes = channel_modes(torch.randn(2, 6, 3, 4))
    assert moved == [(2, 6, 3, 4)]
    assert modes.values.shape == (2, 6)
