"""A call leaves behind its map and nothing else, however it ends and wherever it runs."""

import gc
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from threading import Barrier

import networks
import numpy as np
import pytest
import tensorly as tl
import torch
from networks import hook_count, images
from registry import every_method
from torch import nn
from torch.utils.data import DataLoader

from tucker_cam import MTSM, TSM, channel_modes
from tucker_cam.decomposition import modes
from tucker_cam.decomposition.projection import combined_map, leading_map
from tucker_cam.models import find_target_layer


class Interrupted(nn.Module):
    """Passes on what it gets, or fails halfway through the network."""

    error: BaseException | None = None

    def forward(self, x):
        if self.error is not None:
            raise self.error
        return x


def network():
    model = networks.small_cnn()
    model.insert(4, Interrupted())
    model.insert(1, nn.BatchNorm2d(8))
    model.insert(2, nn.Dropout())
    for parameter in model[4].parameters():
        parameter.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    return model


def state(model):
    """Return everything that a call could leave changed, in a form that can be compared.

    Python's own generator is not among it: the suite's checks of shapes draw from it.
    """
    return {
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "numbers": {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        "hooks": [
            [list(hooks) for name, hooks in sorted(vars(module).items()) if name.endswith("_hooks")]
            for module in model.modules()
        ],
        "torch's generator": torch.get_rng_state().tolist(),
        "NumPy's generator": [str(part) for part in np.random.get_state()],
        "TensorLy's backend": tl.get_backend(),
        "gradients are recorded": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "filters of warnings": list(warnings.filters),
        "NumPy's errors": np.geterr(),
    }


@every_method
def test_after_a_call_and_one_that_fails_in_the_forward_pass_all_is_as_before_and_the_next_call_works(method):
    model, batch = network(), images()
    cam = method(model, [model[4]])
    model[2].p, model[3].training = 0.0, True  # a flag that the user set after the object was built stays too
    before = state(model)
    expected = cam(batch)
    for call in (cam, partial(cam, aug_smooth=True), cam.modes):
        for error in (None, RuntimeError("broken"), KeyboardInterrupt()):
            model[6].error = error
            with nullcontext() if error is None else pytest.raises(type(error)):
                call(batch)
            assert state(model) == before
            assert not cam.outputs.requires_grad
            model[6].error = None
        assert (cam(batch) == expected).all()


@every_method
def test_a_model_that_is_in_training_mode_again_is_told_of(method):
    model, batch = network(), images()
    cam = method(model, [model[4]])
    for call in (cam, cam.modes):
        model.train()
        with pytest.warns(UserWarning, match="training mode after the CAM object was made.*call model.eval"):
            call(batch)
        assert all(module.training for module in model.modules())
        model.eval()
        call(batch)


@every_method
def test_after_a_call_that_fails_in_the_mathematics_all_is_as_before(method, monkeypatch):
    model, batch = network(), images()
    cam = method(model, [model[4]])
    before = state(model)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(cam), "saliency", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cam(batch)
    assert state(model) == before


@every_method
def test_images_and_recorded_features_are_never_written_to(method):
    model, batch = networks.small_cnn(), images()
    before = batch.clone()
    cam = method(model, [model[0], model[2]])
    cam(batch)
    recorded = cam.activations_and_grads.activations
    kept = [features.clone() for features in recorded]
    cam.get_cam_image(batch, None, None, recorded[1], None)
    cam.modes(batch)
    assert torch.equal(batch, before)
    for features, clone in zip(recorded, kept, strict=True):
        assert torch.equal(features, clone)


@pytest.mark.parametrize("scale", [0, 1, 1e20])
@pytest.mark.parametrize("shape", [(20, 3, 4), (5, 4, 6)])
def test_the_mathematics_never_writes_to_its_features(shape, scale):
    whole = scale * torch.randn(2, *shape, 2)
    features, before = whole[..., 0], whole.clone()
    for rank, center in product((None, 2), (False, True)):
        channel_modes(features, rank=rank, center=center)
        leading_map(features, rank=rank)
        for combine in ("signed", "energy"):
            combined_map(features, rank=rank, combine=combine, center=center)
    assert torch.equal(whole, before)


@pytest.mark.parametrize(
    "context",
    [partial(torch.device, "meta"), torch.inference_mode, torch.no_grad],
    ids=["meta", "inference", "no_grad"],
)
@every_method
def test_the_callers_defaults_reach_neither_the_map_nor_are_they_changed(method, context):
    model, batch = networks.small_cnn(200), images(1, 48)  # large enough for a Krylov subspace
    expected = method(model, [model[2]])(batch)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        with context():
            cam = method(model, [model[2]])
            before = torch.get_default_device()
            assert np.array_equal(cam(batch), expected)
            cam.modes(batch)
            assert torch.get_default_device() == before
            target = find_target_layer(model, batch)
        assert target.name == "3"
        assert torch.get_default_dtype() == torch.float64
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)


def resident_mib():
    """Return the process's resident memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.parametrize("end", ["deleted", "block", "failed"])
def test_a_thousand_objects_leave_neither_hooks_nor_memory_behind(end):
    model, batch = networks.small_cnn(), images(1)

    def cycle():
        if end == "block":
            with TSM(model, [model[2]]) as cam:
                cam(batch)
        elif end == "failed":
            with pytest.raises(ValueError, match="spatial axes"):
                MTSM(model, [model[6]])(batch)
        else:
            MTSM(model, [model[2]])(batch)

    for _ in range(100):
        cycle()
    gc.collect()
    objects, memory = len(gc.get_objects()), resident_mib()
    for _ in range(1000):
        cycle()
    assert hook_count(model) == 0
    gc.collect()
    assert len(gc.get_objects()) - objects < 100
    assert resident_mib() - memory < 4


@pytest.mark.parametrize("shared", [False, True], ids=["four models", "one model"])
@every_method
def test_four_threads_get_the_maps_of_one(method, shared):
    models = [networks.small_cnn()] * 4 if shared else [networks.small_cnn() for _ in range(4)]
    batches = [images() for _ in range(4)]
    cams = [method(model, [model[2]]) for model in models]
    expected = [cam(batch) for cam, batch in zip(cams, batches, strict=True)]
    barrier = Barrier(4)

    def work(index):
        barrier.wait()
        return [cams[index](batches[index]) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for found, alone in zip(pool.map(work, range(4)), expected, strict=True):
            for saliency in found:
                assert np.array_equal(saliency, alone)
    assert tl.get_backend() == "numpy"


def explained(cam, pictures):
    """Explain pictures one by one where they are loaded."""
    return np.concatenate([cam(picture[None]) for picture in pictures])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_that_load_pictures_can_explain_them(start):
    model, batch = networks.small_cnn(), images(4)
    cam = TSM(model, [model[2]])
    explain = partial(explained, cam)
    loader = DataLoader(batch, batch_size=2, collate_fn=explain, num_workers=1, multiprocessing_context=start)
    assert np.array_equal(np.concatenate(list(loader)), explain(batch))


def test_the_tensorly_engine_changes_the_backend_of_its_own_thread_only(monkeypatch):
    seen, tucker = [], modes.tucker

    def spy(image, rank):
        with ThreadPoolExecutor(1) as pool:
            seen.append((tl.get_backend(), pool.submit(tl.get_backend).result()))
        if len(seen) > 2:
            raise KeyboardInterrupt
        return tucker(image, rank)

    monkeypatch.setattr(modes, "tucker", spy)
    tl.set_backend("pytorch")
    try:
        channel_modes(torch.randn(2, 6, 3, 4), rank=2, engine="tensorly")
        assert tl.get_backend() == "pytorch"
        with pytest.raises(KeyboardInterrupt):
            channel_modes(torch.randn(2, 6, 3, 4), rank=2, engine="tensorly")
        assert tl.get_backend() == "pytorch"
    finally:
        tl.set_backend("numpy")
    assert seen == [("numpy", "pytorch")] * 3
