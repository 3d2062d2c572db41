"""Explains pictures with a model and methods; yields the explanations one by one, or writes them to a folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from html import escape
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from pytorch_grad_cam.base_cam import BaseCAM
from torch import nn

from tucker_cam.arguments import check_choice
from tucker_cam.errors import BadTypeError, BadValueError, Failure
from tucker_cam.explanations.explainer import CPU_BATCH, Explainer
from tucker_cam.explanations.explanation import DEFAULT_LOOK, Explanation, Look
from tucker_cam.explanations.folder import FolderWriter, check_writing
from tucker_cam.methods import methods_named
from tucker_cam.models import Network, load_model
from tucker_cam.models.loading import Loading, that_takes
from tucker_cam.pictures.ahead import check_reading, in_batches
from tucker_cam.pictures.files import is_url
from tucker_cam.pictures.held import Collection, Pictures, collect
from tucker_cam.pictures.sources import Source
from tucker_cam.text import counted, printable

# How many explanations of a long run a notebook shows.
_MOST_SHOWN = 24
logger = logging.getLogger("tucker_cam")


def explain(
    pictures: Pictures,
    model: str | nn.Module | Network = "demo",
    methods: str | Sequence[str] | Mapping[str, Callable[..., BaseCAM]] = "tsm",
    *,
    out: str | Path | None = None,
    formats: str | Sequence[str] = "overlay",
    gallery: bool = False,
    view: Literal["picture", "network"] = "picture",
    colormap: str = "jet",
    alpha: float = 0.5,
    weights: str | Path | None = None,
    pretrained: bool = True,
    layers: Sequence[str | int | nn.Module] = (),
    size: int | None = None,
    crop: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: str | torch.device | None = None,
    aug_smooth: bool = False,
    components: bool = False,
    limit: int | None = None,
    batch_size: int | None = None,
    workers: int | None = 0,
    engine: Literal["torch", "ray"] = "torch",
    progress: bool = True,
) -> Explanations:
    """Explain pictures with label-free methods, which share one forward pass for each batch.

    Args:
        pictures: a file, a folder, a glob, a URL or a Parquet file; a PIL image; an array, height x width x 3, or
            height x width if it is grey (uint8, or floating point in [0, 1]); a list of these; a batch of network
            inputs, batch x channels x height x width; or an iterable of such batches, for example a DataLoader. If a
            batch is a tuple, its first item is taken.
        model: a name or a module, as for `load_model`, or the object that `load_model` returns. If a module takes no
            picture of 224 x 224, its layers are found with the first of the network inputs.
        methods: names as on the command line; or a dict from names of your choice to classes based on `BaseCAM`.
        out: a folder to write to during this call. What an earlier call wrote there stays; results of another model or
            layer go into a subfolder, so that they are not mixed. Pictures in memory are named by their position,
            ``picture-0``, and network inputs ``000000``: results of another picture at that position are overwritten.
            With ``ray``, `out` may be a URL.
        formats: any of ``overlay`` (PNG), ``npy`` and ``zarr`` (maps, float32).
        gallery: also write ``gallery.html``, one page with all pictures.
        view: what overlays are drawn on: see `Look`. This and the next two are the defaults of `Explanation.overlay`.
        colormap: see `Look`.
        alpha: see `Look`.
        weights: see `load_model`, as for the other arguments down to `device`.
        pretrained: see `load_model`.
        layers: see `load_model`.
        size: see `load_model`.
        crop: see `load_model`.
        mean: see `load_model`.
        std: see `load_model`.
        device: see `load_model`.
        aug_smooth: average over flips and brightness.
        components: also find the single components of MTSM.
        limit: how many pictures to take: a random sample, the same every time; of batches, the first ones.
        batch_size: how many pictures go through the network together; None for 8, or on a GPU for what it holds.
        workers: processes that read pictures ahead, as in a DataLoader; None for all cores but one, at most 8. With
            ``ray``, the number of actors; 0 or None for all cores but one.
        engine: what does the work that is written to `out`: this process, or a Ray cluster, which writes Parquet.
        progress: show a bar while files are written.

    Returns:
        An iterable that explains the pictures while you iterate over it, and does so again on every further iteration,
        if the pictures can be iterated over again. A picture that fails is logged by the logger ``tucker_cam`` and
        added to `failures`. With `out`, `failures` first holds what failed while the files were written.

    Raises:
        TypeError, ValueError: there are no pictures; a method, format or look is unknown; the batch size is invalid; or
            another run is writing to `out`. See also `load_model`.
        ModuleNotFoundError: see `load_model`.
        OSError: `out` cannot be written; see also `load_model`.

    Example:
        >>> from numpy import uint8, zeros
        >>> picture = zeros((40, 60, 3), uint8)
        >>> (explanation,) = explain(picture, nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), layers=["0"])
        >>> explanation.maps["tsm"].shape, explanation.overlay().size
        ((224, 224), (60, 40))
    """
    chosen = methods_named(methods)
    if gallery and out is None:
        raise BadValueError("expected out with gallery, which is a page in that folder")
    if not chosen:
        raise BadValueError("expected at least one method, got none")
    check_choice("engine", engine, Literal["torch", "ray"])
    check_reading(CPU_BATCH if batch_size is None else batch_size, workers)
    look, local = Look(view, colormap, alpha), None if out is None or (engine == "ray" and is_url(str(out))) else out
    formats = check_writing(local, formats, look, chosen)
    collection = collect(pictures, out=None if local is None else Path(local), limit=limit)
    loading: Loading = {
        "weights": weights,
        "pretrained": pretrained,
        "layers": layers,
        "device": device,
        "size": size,
        "crop": crop,
        "mean": mean,
        "std": std,
    }
    load = partial(load_model, that_takes(model, collection.example), **loading)
    if engine == "ray":
        if out is None or formats != ["overlay"] or gallery or look != DEFAULT_LOOK:
            raise BadValueError("expected out, no formats, no gallery and no look with Ray, which writes Parquet")
        given = [each for part in collection.parts() for each in part]
        sources = [each for each in given if isinstance(each, Source)]
        if len(sources) < len(given):
            raise BadValueError("expected paths or URLs with Ray, whose nodes read them, got pictures in memory")
        from tucker_cam.explanations.cluster import Work, explain_on_ray

        work = Work(load, chosen, aug_smooth)
        loaded, failures = explain_on_ray(sources, work, str(out), batch_size=batch_size, workers=workers)
    else:
        loaded, failures = load(), []
    explainer = Explainer(loaded, chosen, aug_smooth, components or gallery, look)
    explanations = Explanations(explainer, collection, batch_size or explainer.batch_size, workers)
    explanations.failures += failures
    if out is not None and engine == "torch":
        logger.info(loaded.description)
        explanations.save(out, formats, gallery=gallery, progress=progress)
    return explanations


class Explanations:
    """The explanations of pictures, as an iterable; the work is done while you iterate over it.

    Attributes:
        loaded: the model, with its layers.
        failures: the pictures that could not be read or explained, or on which one of the methods failed, as far as the
            last iteration got.
    """

    def __init__(self, explainer: Explainer, pictures: Collection, batch_size: int, workers: int | None) -> None:
        self.loaded = explainer.loaded
        self.failures = list(pictures.failures)
        self._explainer, self._pictures, self._batch_size, self._workers = explainer, pictures, batch_size, workers

    def __len__(self) -> int:
        """Return the number of pictures, including those that fail; TypeError if it is not known."""
        if self._pictures.number is None:
            raise BadTypeError("the number of pictures in batches is not known: count them while you iterate")
        return self._pictures.number + len(self._pictures.failures)

    def __iter__(self) -> Iterator[Explanation]:
        self.failures = []
        for failure in self._pictures.failures:
            self._fail(failure)
        for part in self._pictures.parts():
            for batch in self._explainer.explain_all(in_batches(part, self._batch_size), self._workers):
                for picture, found in batch:
                    if isinstance(found, Exception):
                        self._fail(Failure(str(picture), found))
                    else:
                        for failure in found.failures:
                            self._fail(failure)
                        yield found

    def _fail(self, failure: Failure) -> None:
        self.failures.append(failure)
        logger.warning(str(failure))

    def save(
        self,
        folder: str | Path,
        formats: str | Sequence[str] = "overlay",
        *,
        gallery: bool = False,
        progress: bool = True,
    ) -> None:
        """Write the explanations, resuming where an earlier run was stopped; what fails is in `failures`.

        Args:
            folder: see `out` of `explain`.
            formats: see `explain`.
            gallery: see `explain`.
            progress: show a bar.

        Raises:
            ValueError, OSError: see `explain`.
        """
        explainer = self._explainer
        if gallery and self.loaded.example().dim() != 4:
            raise BadValueError("expected a network for pictures with gallery, which shows no clips or volumes")
        if gallery and not explainer.components:
            explainer = replace(explainer, components=True)
        formats = check_writing(folder, formats, explainer.look, explainer.methods)
        writer = FolderWriter(explainer, Path(folder), formats, gallery, self._batch_size, self._workers)
        writer.write(self._pictures, shown=progress)
        self.failures = writer.failures

    def __repr__(self) -> str:
        count = "pictures" if self._pictures.number is None else counted(len(self))
        failed = f", {len(self.failures)} failed" if self.failures else ""
        return f"<Explanations of {count} by {', '.join(self._explainer.methods)}{failed}; {self.loaded.description}>"

    def _repr_html_(self) -> str:
        # A copy, so that showing the explanations does not change the failures.
        shown = copy(self)
        pictures = "".join(explanation._repr_html_() for explanation in islice(shown, _MOST_SHOWN))
        failed = "".join(f"<p>{escape(printable(str(failure)))}</p>" for failure in shown.failures)
        count = self._pictures.number
        more = f"<p>the first {_MOST_SHOWN} of {count}</p>" if count is not None and count > _MOST_SHOWN else ""
        return pictures + failed + more
