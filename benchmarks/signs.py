"""How often EigenCAM's maps are upright with several sign rules for its vector: the tables of docs/upstream.md.

    python -m benchmarks.signs FOLDER_WITH_MASKS --augnet imgsim/model.pth

AugNet, a ResNet-50 trained without labels, comes with `pip download --no-deps imgsim`, unzipped. Writes
benchmarks/results/signs.md. Needs the `test` extra.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import skimage.data
import torch
import typer
from numpy.typing import NDArray
from PIL import Image
from pytorch_grad_cam import ActivationsAndGradients

from benchmarks.polarity import features_of
from benchmarks.reporting import table
from tucker_cam.models import load_model

# The photographs that scikit-image itself contains.
PHOTOGRAPHS = ("astronaut", "brick", "camera", "chelsea", "clock", "coffee", "coins", "grass", "gravel")
PHOTOGRAPHS += ("hubble_deep_field", "immunohistochemistry", "moon", "retina", "rocket")


def signs(centred: NDArray[np.float64], features: NDArray[np.float64]) -> dict[str, float]:
    """Return the sign by which each rule multiplies NumPy's projection. The arguments are positions x channels."""
    vector = np.linalg.svd(centred, full_matrices=False)[2][0]
    projection = centred @ vector
    energy = (features**2).sum(1)
    return {
        "as NumPy's LAPACK left it": 1,
        "largest entry of the vector positive (svd_flip)": np.sign(vector[np.abs(vector).argmax()]),
        "largest value of the map positive (the host's SegEigenCAM)": np.sign(projection[np.abs(projection).argmax()]),
        "correlates with the channels' mean": np.sign(vector.sum()),
        "correlates with the features' energy": np.sign(projection @ (energy - energy.mean())),
    }


def upright(features: torch.Tensor, masks: torch.Tensor) -> dict[str, list[bool]]:
    """Return for each rule and picture whether the map is higher on the object than beside it."""
    found: dict[str, list[bool]] = {}
    for image, mask in zip(features.double().flatten(2).mT.numpy(), masks.flatten(1).numpy(), strict=True):
        if mask.all() or not mask.any():
            continue
        centred = image - image.mean(0)
        projection = centred @ np.linalg.svd(centred, full_matrices=False)[2][0]
        contrast = projection[mask].mean() - projection[~mask].mean()
        for rule, sign in signs(centred, image).items():
            found.setdefault(rule, []).append(sign * contrast > 0)
        leading = np.abs(image @ np.linalg.svd(image, full_matrices=False)[2][0])
        found.setdefault("TSM, which has no sign", []).append(leading[mask].mean() > leading[~mask].mean())
    return found


def follows_the_sum(layer: str) -> dict[str, list[bool]]:
    """Return for each rule whether the projection of weighted activations correlates with their sum over the channels.

    That sum is the map that `eigen_smooth` smooths: evidence for the predicted class, negative where it is against it.
    """
    loaded = load_model("demo", layers=[layer])
    recorder = ActivationsAndGradients(loaded.model, loaded.target_layers, None)
    found: dict[str, list[bool]] = {}
    for name in PHOTOGRAPHS:
        picture = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        output = recorder(loaded.preprocess(picture)[None])
        output.max().backward()
        features, gradients = recorder.activations[0][0].double(), recorder.gradients[0][0].double()
        weights = {"GradCAM, eigen_smooth": gradients.mean((1, 2), keepdim=True), "EigenGradCAM": gradients}
        for method, weight in weights.items():
            weighted = (weight * features).flatten(1).T.numpy()
            centred = weighted - weighted.mean(0)
            projection = centred @ np.linalg.svd(centred, full_matrices=False)[2][0]
            agreement = projection @ (weighted.sum(1) - weighted.sum(1).mean())
            for rule, sign in signs(centred, weighted).items():
                found.setdefault(f"{method}: {rule}", []).append(sign * agreement > 0)
    recorder.release()
    return found


def main(
    folder: Annotated[Path, typer.Argument(help="Pictures with boxes or masks.")],
    augnet: Annotated[Path | None, typer.Option(help="AugNet's checkpoint.")] = None,
    limit: Annotated[int, typer.Option(help="So many pictures, drawn at random.")] = 200,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("benchmarks/results"),
) -> None:
    """Try each rule on pictures with an object, and on weighted activations, and write signs.md."""
    torch.set_num_threads(1)
    models = {f"EfficientNet-Lite0, {layer}": load_model("demo", layers=[layer]) for layer in ("blocks.6", "bn2")}
    for layer in ("layer3", "layer4") if augnet is not None else ():
        models[f"AugNet, {layer}"] = load_model("torchvision:resnet50", weights=augnet, layers=[layer])
    shares: dict[str, list[str]] = {}
    for loaded in models.values():
        for rule, pictures in upright(*features_of(folder, limit, loaded)).items():
            shares.setdefault(rule, []).append(f"{np.mean(pictures):.1%}")
    parts = [table(f"upright, of {limit} pictures", list(models), shares)]
    layers = ("blocks.6", "bn2")
    agreeing = [{rule: np.mean(each) for rule, each in follows_the_sum(layer).items()} for layer in layers]
    rows = {rule: [f"{shares[rule]:.1%}" for shares in agreeing] for rule in agreeing[0]}
    parts.append(table(f"correlates with the sum, of {len(PHOTOGRAPHS)} photographs", list(layers), rows))
    out.mkdir(parents=True, exist_ok=True)
    (out / "signs.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    typer.run(main)
