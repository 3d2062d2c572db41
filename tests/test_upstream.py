"""The patch for pytorch-grad-cam: it applies to the installed one, and then the host's TSM is ours."""

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import pytorch_grad_cam
import torch
from numpy.testing import assert_allclose

from tucker_cam import TSM

PATCH = Path(__file__).parents[1] / "docs" / "upstream.patch"
PROGRAM = """
import sys
import numpy as np, torch, pytorch_grad_cam
from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection, get_leading_projection
assert pytorch_grad_cam.__file__.startswith(sys.argv[1]), pytorch_grad_cam.__file__
torch.manual_seed(0)
nn = torch.nn
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
images = torch.rand(2, 3, 32, 40)
maps = pytorch_grad_cam.TSM(model, [model[1]])(images, None)
features = model[:2](images).detach().numpy()
torch.save({"model": model, "images": images, "maps": maps, "projections": get_2d_projection(features)}, sys.argv[2])
"""


@pytest.mark.skipif(version("grad-cam") != "1.5.7", reason="the patch is for grad-cam 1.5.7")
@pytest.mark.skipif(shutil.which("git") is None, reason="git applies the patch")
def test_the_patched_hosts_tsm_is_ours(tmp_path):
    shutil.copytree(Path(pytorch_grad_cam.__file__).parent, tmp_path / "pytorch_grad_cam")
    command = ["git", "apply", "--include=pytorch_grad_cam/*"]
    subprocess.run([*command, "--check", PATCH], cwd=tmp_path, check=True)
    subprocess.run([*command, PATCH], cwd=tmp_path, check=True)
    found = tmp_path / "found.pt"
    subprocess.run([sys.executable, "-c", PROGRAM, tmp_path, found], cwd=tmp_path, check=True)
    found = torch.load(found, weights_only=False)
    model, images = found["model"], found["images"]
    assert_allclose(found["maps"], TSM(model, [model[1]])(images), atol=1e-5)
    features = model[:2](images).detach()
    for projection, image in zip(found["projections"], features.flatten(2).double().numpy(), strict=True):
        centred = image - image.mean(1, keepdims=True)
        assert_allclose(np.abs(projection).flatten(), np.abs(np.linalg.svd(centred)[0][:, 0] @ centred), atol=1e-5)
        energy = (image**2).sum(0)
        assert projection.flatten() @ (energy - energy.mean()) > 0
