"""Do label-free maps show what a network learnt without labels? Trained here in minutes, with an untrained control.

A small CNN learns to tell by how much a scene was rotated (RotNet, Gidaris et al. 2018, arXiv 1803.07728). A scene is a
coloured digit, upright before the rotation, on a texture without a direction, so only the digit shows the rotation. Its
mask is known. On scenes with unseen digits every label-free method is scored: where it points, and how much of the
embedding it keeps. The same network before training is the control (Adebayo et al. 2018, arXiv 1810.03292): maps that
are as good on it show the picture, not what was learnt.

    python -m benchmarks.selfsupervised --save rotnet
    tucker-cam explain rotnet/scene-*.png --model benchmarks.selfsupervised:rotation_network --weights rotnet/network.pt
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import skimage.data
import torch
import typer
from matplotlib.figure import Figure
from pytorch_grad_cam.utils.image import show_cam_on_image
from skimage.feature import peak_local_max
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, interpolate
from torchvision import transforms

from benchmarks.reporting import environment, interval, table, write_samples
from tucker_cam import TSM, Evaluation, evaluate
from tucker_cam.evaluation.metrics import MEASURES, Judged, Measure
from tucker_cam.evaluation.summary import Interval, mean_interval
from tucker_cam.methods import METHODS
from tucker_cam.models import Network

SIDE = 64
MEAN, STD = 0.5, 0.25
BATCH = 96
UNSEEN = 1200  # digits from this one on are held out
CHANCE = {"rotation": 0.25, "digit": 0.1}


@dataclass
class Scenes:
    """Scenes with one digit or several.

    Attributes:
        images: in [0, 1], batch x 3 x 64 x 64.
        masks: bool, batch x objects x 64 x 64: each digit's own pixels.
        squares: bool, the same shape: the square in which each digit stands.
        digits: of the first object, batch.
    """

    images: Tensor
    masks: Tensor
    squares: Tensor
    digits: Tensor

    def normalised(self) -> Tensor:
        return (self.images - MEAN) / STD


class SceneMaker:
    """Makes scenes on the fly, from scikit-learn's digits and two textures of scikit-image's."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        digits = load_digits()
        self.strokes = torch.from_numpy(digits.images).float()[:, None] / 16
        self.labels = torch.from_numpy(digits.target)
        textures = [skimage.data.grass(), skimage.data.gravel()]
        self.textures = torch.stack([torch.from_numpy(np.asarray(each)).float()[None] / 255 for each in textures])

    def make(self, count: int, *, unseen: bool, objects: int = 1) -> Scenes:
        """Make upright scenes; with two objects, one stands in the left half and one in the right."""
        images = self._backgrounds(count)
        masks, squares, chosen = [], [], []
        for index in range(objects):
            low, high = (UNSEEN, len(self.labels)) if unseen else (0, UNSEEN)
            which = torch.randint(low, high, (count,), generator=self.generator)
            stroke, square = self._placed(self.strokes[which], index, objects)
            colour = 0.5 + 0.5 * self._uniform(count, 3, 1, 1)
            images = torch.lerp(images, colour.expand_as(images), stroke)
            masks.append(stroke[:, 0] > 0.4)
            squares.append(square[:, 0] > 0.5)
            chosen.append(self.labels[which])
        return Scenes(images.clamp(0, 1), torch.stack(masks, 1), torch.stack(squares, 1), chosen[0])

    def turned(self, count: int, *, unseen: bool = False) -> tuple[Tensor, Tensor]:
        """Return network inputs turned by quarter turns, and by how many."""
        scenes = self.make(count, unseen=unseen).normalised()
        quarters = torch.randint(0, 4, (count,), generator=self.generator)
        return torch.stack([torch.rot90(s, int(q), (1, 2)) for s, q in zip(scenes, quarters, strict=True)]), quarters

    def _backgrounds(self, count: int) -> Tensor:
        which = torch.randint(0, len(self.textures), (count,), generator=self.generator)
        angle = 2 * math.pi * self._uniform(count)
        # A window of an eighth to a quarter of the texture's side, turned, and so placed that it stays inside.
        size = 0.125 + 0.125 * self._uniform(count)
        shift = (2 * self._uniform(count, 2) - 1) * (1 - size[:, None] * math.sqrt(2))
        cosine, sine = size * angle.cos(), size * angle.sin()
        rows = [torch.stack([cosine, -sine, shift[:, 0]], 1), torch.stack([sine, cosine, shift[:, 1]], 1)]
        grid = affine_grid(torch.stack(rows, 1), [count, 1, SIDE, SIDE], align_corners=False)
        grey = grid_sample(self.textures[which], grid, align_corners=False)
        tint = 0.3 + 0.5 * self._uniform(count, 3, 1, 1)
        return grey * tint

    def _placed(self, strokes: Tensor, index: int, objects: int) -> tuple[Tensor, Tensor]:
        count = len(strokes)
        size = 0.3 + 0.2 * self._uniform(count)  # of the scene's side
        room = 1 - size
        horizontal = (2 * self._uniform(count) - 1) * room
        if objects > 1:
            centre = (2 * index + 1) / objects - 1
            horizontal = centre + (2 * self._uniform(count) - 1) * (1 / objects - size).clamp_min(0)
        vertical = (2 * self._uniform(count) - 1) * room
        zero = torch.zeros(count)
        rows = [
            torch.stack([1 / size, zero, -horizontal / size], 1),
            torch.stack([zero, 1 / size, -vertical / size], 1),
        ]
        grid = affine_grid(torch.stack(rows, 1), [count, 1, SIDE, SIDE], align_corners=False)
        sampled = grid_sample(torch.cat([strokes, torch.ones_like(strokes)], 1), grid, align_corners=False)
        return sampled[:, :1], sampled[:, 1:]

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)


def rotation_network() -> Network:
    """Return the untrained network with its preprocessing, as ``tucker-cam --model`` takes it."""

    def block(before: int, after: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
        )

    model = nn.Sequential()
    for name, (before, after, stride) in {
        "block1": (3, 32, 2),
        "block2": (32, 64, 2),
        "block3": (64, 128, 1),
        "block4": (128, 128, 2),
        "block5": (128, 128, 1),
    }.items():
        model.add_module(name, block(before, after, stride))
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("quarters", nn.Linear(128, 4))
    preprocess = transforms.Compose(
        [
            transforms.Resize(SIDE),
            transforms.CenterCrop(SIDE),
            transforms.ToTensor(),
            transforms.Normalize([MEAN] * 3, [STD] * 3),
        ]
    )
    return Network(model, preprocess, (MEAN,) * 3, (STD,) * 3)


def train(model: nn.Module, maker: SceneMaker, steps: int) -> list[float]:
    """Train on rotation prediction, Adam with one cycle of the learning rate, and return the loss of each step."""
    optimiser = torch.optim.Adam(model.parameters(), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=5e-3, total_steps=steps)
    losses = []
    model.train()
    for _ in range(steps):
        images, quarters = maker.turned(BATCH)
        loss = cross_entropy(model(images), quarters)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return losses


def calibrate(model: nn.Module, maker: SceneMaker) -> None:
    """Let an untrained network's normalisation layers see scenes, so that it differs in its weights alone."""
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(maker.turned(BATCH)[0])
    model.eval()


def embeddings(model: nn.Sequential, images: Tensor) -> np.ndarray:
    """Return what the last layer before the answer holds, batch x 128."""
    with torch.no_grad():
        return torch.cat([model[:-1](each) for each in images.split(BATCH)]).numpy()


def probe(model: nn.Sequential, seen: Scenes, unseen: Scenes) -> np.ndarray:
    """Return on which unseen scenes a linear classifier of the embedding names the digit."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    classifier.fit(embeddings(model, seen.normalised()), seen.digits)
    return np.asarray(classifier.predict(embeddings(model, unseen.normalised())) == unseen.digits.numpy())


def score_methods(model: nn.Sequential, scenes: Scenes, *metrics: str | Measure) -> Evaluation:
    """Score the label-free methods on scenes, whose masks are all digits' own pixels."""
    batches = zip(scenes.normalised().split(BATCH), scenes.masks.any(1).split(BATCH), strict=True)
    return evaluate(batches, Network(model), metrics=metrics, layers=["block5"], batch_size=BATCH)


def both_found(maps: Tensor, squares: Tensor) -> np.ndarray:
    """Return in which scenes the map's two highest peaks, a cell of the features or more apart, lie one in each square.

    Args:
        maps: batch x 64 x 64.
        squares: bool, batch x 2 x 64 x 64.
    """
    found = []
    for saliency, (first, second) in zip(maps.numpy(), squares.numpy(), strict=True):
        peaks = peak_local_max(saliency, min_distance=SIDE // 8, exclude_border=False, num_peaks=2)
        hits = [(first[row, column], second[row, column]) for row, column in peaks]
        found.append(all(any(of_object) for of_object in zip(*hits, strict=True)) if hits else False)
    return np.array(found)


def components_find_both(model: nn.Sequential, images: Tensor, squares: Tensor) -> np.ndarray:
    """Return in which scenes the first two components of `cam.modes` have their peaks in one object's square each."""
    with TSM(model, [model.block5]) as cam:
        (modes,) = cam.modes(images)
    components = interpolate(modes.maps[:, :2].abs().float(), (SIDE, SIDE), mode="bilinear", align_corners=False)
    peaks = components.flatten(2).argmax(2)
    hits = [squares.flatten(2)[torch.arange(len(images)), :, peaks[:, index]] for index in (0, 1)]
    return np.asarray((hits[0] | hits[1]).all(1))


def find_two_objects(model: nn.Sequential, scenes: Scenes, seed: int) -> dict[str, Interval]:
    """Return by method the share of scenes in which both digits are found."""

    def found(judged: Judged) -> Tensor:
        return torch.from_numpy(both_found(judged.maps, scenes.squares[[int(name) for name in judged.names]])).float()

    summaries = score_methods(model, scenes, Measure("both_found", found)).summary(seed=seed)
    by_method = {method: of_method["both_found"].value for method, of_method in summaries.items()}
    components = components_find_both(model, scenes.normalised(), scenes.squares)
    return by_method | {"two components of cam.modes": mean_interval(components.astype(float), seed)}


def compare_networks(evaluations: dict[str, Evaluation], seed: int) -> dict[str, dict[str, Interval]]:
    """Return by method and measure how much higher the trained network's value is, scene by scene."""
    differences: dict[str, dict[str, list[float]]] = {}
    for trained, untrained in zip(evaluations["trained"].rows, evaluations["untrained"].rows, strict=True):
        of_method = differences.setdefault(trained.method, {name: [] for name in SHOWN})
        for name, values in of_method.items():
            values.append(trained.values[name] - untrained.values[name])
    return {
        method: {name: mean_interval(np.array(values), seed) for name, values in of_method.items()}
        for method, of_method in differences.items()
    }


def draw(path: Path, models: dict[str, nn.Sequential], scenes: Scenes) -> None:
    """Draw the first scenes with each method's overlay, on each network."""
    shown = ("eigencam", "tsm", "mtsm", "mtsm-energy", "multivec-eigencam")
    count = len(scenes.images)
    figure = Figure(figsize=(1.5 * (1 + len(models) * len(shown)), 1.5 * count + 0.5), layout="constrained")
    grid = figure.subplots(count, 1 + len(models) * len(shown))
    pictures = scenes.images.permute(0, 2, 3, 1).numpy()
    columns = {"scene": pictures}
    for network, model in models.items():
        for method in shown:
            with METHODS[method](model, [model.block5]) as cam:
                maps = cam(scenes.normalised(), targets=None)
            overlays = [show_cam_on_image(p, m, use_rgb=True) for p, m in zip(pictures, maps, strict=True)]
            columns[f"{method}\n{network}"] = np.stack(overlays)
    for axes, (title, views) in zip(grid.T, columns.items(), strict=True):
        axes[0].set_title(title, fontsize=9)
        for each, view in zip(axes, views, strict=True):
            each.imshow(view)
            each.axis("off")
    figure.savefig(path, dpi=80)


def report(results: dict, summaries: dict[str, dict]) -> str:
    about = results["environment"]
    learnt = results["learnt"]
    parts = [
        f"{results['steps']} steps of {BATCH} scenes, {results['training_seconds']:.0f} s on one thread of "
        f"{about['machine']} ({about['instructions']}), torch {about['torch']}; {results['scenes']} unseen scenes, "
        f"seed {about['seed']}. 95 % bootstrap intervals over scenes.",
        table(
            "accuracy on unseen digits",
            ["trained", "untrained", "chance"],
            {
                "turn of the scene": [*(interval(learnt[n]["rotation"]) for n in NETWORKS), f"{CHANCE['rotation']}"],
                "digit, linear probe": [*(interval(learnt[n]["digit"]) for n in NETWORKS), f"{CHANCE['digit']}"],
            },
        ),
    ]
    shown = [measure for measure in MEASURES if measure.name in SHOWN]
    titles = [measure.title for measure in shown]
    for network in NETWORKS:
        of_network = summaries[network]
        rows = {m: [interval(of_network[m][c.name].value, percent="%" in c.title) for c in shown] for m in of_network}
        parts.append(table(f"{network} network", titles, rows))
    differences = results["trained_minus_untrained"]
    rows = {m: [interval(differences[m][c.name], "+", percent="%" in c.title) for c in shown] for m in differences}
    parts.append(table("trained minus untrained", titles, rows))
    two = results["both_objects_found"]
    rows = {m: [interval(two[network][m]) for network in NETWORKS] for m in two["trained"]}
    parts.append(table("two digits, both found", list(NETWORKS), rows))
    return "\n\n".join(parts) + "\n"


SHOWN = (
    "energy_in_mask",
    "pointing_game",
    "best_cut_iou",
    "similarity_drop",
    "similarity_drop_area_matched",
    "similarity_insertion",
    "similarity_deletion",
)
NETWORKS = ("trained", "untrained")


def main(
    quick: Annotated[bool, typer.Option("--quick", help="A few steps, to see that the script works.")] = False,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("benchmarks/results"),
    save: Annotated[Path | None, typer.Option(help="Folder for the network's weights and some scenes.")] = None,
) -> None:
    """Train without labels, score the label-free methods, and write selfsupervised.{json.gz,md,png}."""
    steps, count = (3, 12) if quick else (800, 480)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    maker = SceneMaker(seed)
    with threadpool_limits(1):
        models = {network: rotation_network().model for network in NETWORKS}
        start = time.perf_counter()
        losses = train(models["trained"], maker, steps)
        seconds = time.perf_counter() - start
        calibrate(models["untrained"], maker)
        seen, unseen = maker.make(60 if quick else 3000, unseen=False), maker.make(60 if quick else 1500, unseen=True)
        turned, quarters = maker.turned(60 if quick else 1500, unseen=True)
        learnt = {}
        for network, model in models.items():
            with torch.no_grad():
                right = torch.cat([model(each).argmax(1) for each in turned.split(BATCH)]) == quarters
            learnt[network] = {
                "rotation": mean_interval(right.numpy().astype(float), seed),
                "digit": mean_interval(probe(model, seen, unseen).astype(float), seed),
            }
        scenes, two = maker.make(count, unseen=True), maker.make(count, unseen=True, objects=2)
        groups = ("localisation", "drop", "curves")
        evaluations = {network: score_methods(model, scenes, *groups) for network, model in models.items()}
        summaries = {network: evaluation.summary(seed=seed) for network, evaluation in evaluations.items()}
        results = {
            "environment": environment(seed),
            "steps": steps,
            "training_seconds": seconds,
            "loss": {"first": losses[0], "last": float(np.mean(losses[-20:]))},
            "scenes": count,
            "learnt": learnt,
            "both_objects_found": {n: find_two_objects(model, two, seed) for n, model in models.items()},
            "trained_minus_untrained": compare_networks(evaluations, seed),
            "by_network": {
                network: {
                    method: {column: each.value for column, each in by_column.items()}
                    for method, by_column in of_network.items()
                }
                for network, of_network in summaries.items()
            },
        }
        out.mkdir(parents=True, exist_ok=True)
        write_samples(out / "selfsupervised.json.gz", results)
        (out / "selfsupervised.md").write_text(report(results, summaries))
        draw(out / "selfsupervised.png", models, maker.make(4, unseen=True, objects=1))
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
        torch.save(models["trained"].state_dict(), save / "network.pt")
        for index, image in enumerate(scenes.images[:4]):
            transforms.functional.to_pil_image(image).save(save / f"scene-{index}.png")


if __name__ == "__main__":
    typer.run(main)
