"""Picture files in, an overlay for each picture and method on the disk out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image
from pytorch_grad_cam.utils.image import show_cam_on_image

from tucker_cam.cli.methods import method_named
from tucker_cam.files import complete_or_absent, open_picture, printable
from tucker_cam.models import find_target_layer, layer_named, load_model


def explain_pictures(
    paths: Sequence[Path],
    *,
    methods: Sequence[str],
    model_name: str,
    layer: str | None,
    out: Path,
    aug_smooth: bool,
    save_map: bool,
    pretrained: bool,
    weights: Path | None,
    device: str,
) -> list[str]:
    """Explain the pictures one by one and write ``NAME_METHOD.png`` for each.

    Returns:
        One line for each picture that could not be read, or map that could not be written; all others are done.

    Raises:
        ValueError: an unknown method, model, layer or device.
        ModuleNotFoundError: the model's package is missing.
        OSError: its weights could not be had, or `out` could not be written.
    """
    classes = {name: method_named(name) for name in methods}
    loaded = load_model(model_name, pretrained=pretrained, weights=weights, device=device_named(device))
    out.mkdir(parents=True, exist_ok=True)
    target = layer_named(loaded.model, layer) if layer is not None else None
    problems: list[str] = []
    for path, stem in zip(paths, _distinct_stems(paths), strict=True):
        try:
            network_input = loaded.preprocess(open_picture(path))
        except (OSError, ValueError) as error:
            problems.append(str(error))
            continue
        images = network_input[None].to(device)
        if target is None:
            name, target = find_target_layer(loaded.model, images)
            typer.echo(f"layer: {name}")
        for method, build in classes.items():
            with build(loaded.model, [target]) as cam:
                saliency = cam(images, aug_smooth=aug_smooth, targets=None)[0]
            try:
                _write(out / f"{stem}_{method}", loaded.picture(network_input), saliency, save_map=save_map)
            except OSError as error:
                problems.append(f"{path}: its {method} map could not be written ({error})")
    return problems


def _write(name: Path, picture: NDArray[np.float32], saliency: NDArray[np.float32], *, save_map: bool) -> None:
    overlay = Image.fromarray(show_cam_on_image(picture, saliency, use_rgb=True))
    target = name.with_name(f"{name.name}.png")
    with complete_or_absent(target) as unfinished:
        overlay.save(unfinished, format="PNG")
    if save_map:
        with complete_or_absent(name.with_name(f"{name.name}.npy")) as unfinished, unfinished.open("wb") as file:
            np.save(file, saliency)
    typer.echo(printable(str(target)))


def _distinct_stems(paths: Sequence[Path]) -> list[str]:
    """Return a name for each picture; the second ``cat`` from another folder becomes ``cat-2``."""
    stems: list[str] = []
    for path in paths:
        stem, number = path.stem, 1
        while stem in stems:
            number += 1
            stem = f"{path.stem}-{number}"
        stems.append(stem)
    return stems


def device_named(name: str) -> torch.device:
    """Return the device of this name.

    Raises:
        ValueError: there is none here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no device {name!r} here ({str(error).splitlines()[0]}): --device cpu") from error
    return device
