"""Each way to the leading map beside a plain SVD in float64, and which way an image goes."""

import pytest
import torch
from torch.testing import assert_close

from tucker_cam.decomposition import leading
from tucker_cam.decomposition.leading import leading_maps

SMALL, LARGE = [(300, 40), (40, 300)], [(300, 140), (140, 300)]


def spectrum(values, rows, columns, batch=2):
    """Return matrices with these singular values and random singular vectors, in float64."""
    values = torch.as_tensor(values, dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(batch, n, len(values), dtype=torch.float64)).Q for n in (rows, columns))
    return left @ (values[:, None] * right.mT)


def assert_is_the_leading_map(actual, unfolding, tolerance=1e-5):
    _, values, right = torch.linalg.svd(unfolding.double(), full_matrices=False)
    expected = values[:, :1] * right[:, 0].abs()
    largest = expected.amax(1, keepdim=True)
    assert_close(actual / largest, expected / largest, rtol=0, atol=tolerance)


@pytest.fixture
def ways(monkeypatch):
    """Record which solvers, and makers of float64 Gram matrices, are called, and of how many images."""
    taken = []

    def watched(name, function):
        return lambda unfolding, *rest, **options: (
            taken.append((name, len(unfolding))),
            function(unfolding, *rest, **options),
        )[1]

    for name in ("_squared", "_corrected", "_lanczos", "_decomposed", "gram_matrix"):
        monkeypatch.setattr(leading, name, watched(name, getattr(leading, name)))
    return taken


def relative_gap(second):
    """Return features whose first two singular values lie so far apart, and whose others are small."""
    return torch.cat([torch.tensor([1.0, second]), torch.linspace(0.1, 0.01, 20)])


@pytest.mark.parametrize(
    ("second", "shapes", "dtype", "expected"),
    [
        (0.5, SMALL, torch.float32, ["_squared"]),
        (0.995, SMALL, torch.float32, ["_squared", "_corrected"]),
        (1 - 1e-6, SMALL, torch.float32, ["_squared", "_corrected", "_decomposed", "gram_matrix"]),
        (0.5, LARGE, torch.float32, ["_lanczos"]),
        (1 - 1e-4, LARGE, torch.float32, ["_lanczos", "_lanczos"]),
        (None, LARGE, torch.float32, ["_lanczos", "_lanczos", "_decomposed", "gram_matrix"]),
        # Of float64 features the matrix is formed once.
        (0.5, SMALL, torch.float64, ["gram_matrix", "_squared"]),
        (0.995, SMALL, torch.float64, ["gram_matrix", "_squared", "_corrected"]),
        (1 - 1e-6, SMALL, torch.float64, ["gram_matrix", "_squared", "_corrected", "_decomposed"]),
        (0.5, LARGE, torch.float64, ["_lanczos"]),
        (None, LARGE, torch.float64, ["_lanczos", "_decomposed", "gram_matrix"]),
    ],
)
@pytest.mark.parametrize("index", [0, 1], ids=["tall", "wide"])
def test_an_image_is_done_as_carefully_as_its_gap_asks_for(second, shapes, dtype, expected, index, ways):
    shape = shapes[index]
    unfolding = (torch.randn(8, *shape) if second is None else spectrum(relative_gap(second), *shape)).to(dtype)
    assert_is_the_leading_map(leading_maps(unfolding), unfolding)
    assert [name for name, _ in ways] == expected


@pytest.mark.parametrize("shape", [(1280, 49), (49, 1280), (300, 127)])
def test_noise_without_any_structure_is_corrected_to_much_better_than_single_precision(shape, ways):
    unfolding = torch.randn(6, *shape)
    assert_is_the_leading_map(leading_maps(unfolding), unfolding, tolerance=1e-8)
    assert [name for name, _ in ways] == ["_squared", "_corrected"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [0.1, 1, 3, 10])
@pytest.mark.parametrize("n", [2, 5, 49, 120])
def test_the_bound_of_the_gap_is_one_and_no_idle_one(n, exponent, dtype):
    basis = torch.linalg.qr(torch.randn(40, n, n, dtype=torch.float64)).Q
    values = torch.rand(40, n, dtype=torch.float64).pow(exponent).sort(descending=True).values
    matrix = basis @ (values[..., None] * basis.mT)
    power = (matrix / values.norm(dim=1)[:, None, None]).to(dtype)
    true = 1 - values[:, 1] / values[:, 0]
    for times, before, least, most in ((3, 0, 0.4, 0.8), (5, 3, 0.01, 0.04)):
        power, _, gaps = leading._found_in_power(matrix, power, times, before)
        assert (gaps <= true).all()
        resolved = (true > least) & (true < most)
        assert (gaps[resolved] > 0.5 * true[resolved]).all()


@pytest.mark.parametrize("n", [16, 49, 127])
def test_one_vector_at_right_angles_to_the_first_one_multiplied_is_found(n):
    start = leading._start(n, torch.float32, torch.device("cpu")).flatten()
    places = torch.arange(n - 1)
    rows = torch.zeros(n - 1, n)
    rows[places, places], rows[places, places + 1] = start[1:], -start[:-1]
    unfolding = torch.cat([rows[:, None].expand(-1, 4, -1), torch.zeros(n - 1, n, n)], dim=1)
    assert_close(leading_maps(unfolding), 2 * rows.abs().double(), rtol=1e-6, atol=1e-6)


def test_rectified_features_of_a_large_layer_take_few_products(monkeypatch):
    products = []
    product = leading._product
    monkeypatch.setattr(leading, "_product", lambda *a, **k: products.append(a) or product(*a, **k))
    leading_maps(torch.relu(torch.randn(1, 2048, 196) + 0.2))
    assert len(products) <= 8  # five, and three more in float64


def test_only_the_images_in_doubt_are_done_again(ways):
    easy, hard = spectrum(relative_gap(0.5), 300, 40, 3), spectrum(relative_gap(1 - 1e-6), 300, 40, 1)
    batch = torch.cat([easy[:2], hard, easy[2:]]).float()
    assert_is_the_leading_map(leading_maps(batch), batch)
    assert ways == [("_squared", 4), ("_corrected", 1), ("_decomposed", 1), ("gram_matrix", 1)]


def test_a_second_ritz_value_that_is_too_small_leaves_no_map_wrong():
    unfolding = torch.randn(200, 150, 144, generator=torch.Generator().manual_seed(1))[130:140]
    exact = torch.linalg.svd(unfolding.double(), full_matrices=False)
    expected = exact.S[:, :1] * exact.Vh[:, 0].abs()
    off = (leading_maps(unfolding) - expected).abs().amax(1)
    assert (off < 1e-5 * (expected.amax(1) - expected.amin(1))).all()
