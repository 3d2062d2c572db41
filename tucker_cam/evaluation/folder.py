"""A folder of pictures through a comparison, batch by batch; each row is on the disk as soon as it is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from pytorch_grad_cam.base_cam import BaseCAM
from torch import Tensor

from tucker_cam.evaluation.comparison import Measure, Subject, compare
from tucker_cam.evaluation.controls import CONTROLS
from tucker_cam.evaluation.results import ResultsFile
from tucker_cam.models import Network
from tucker_cam.pictures.annotations import Annotations, NetworkView, Sample, network_view
from tucker_cam.text import one_line

_BATCH = 8

Builder = Callable[..., BaseCAM]


def compare_on_folder(
    samples: Sequence[Sample],
    annotations: Annotations,
    network: Network,
    subject: Subject,
    methods: Mapping[str, Builder],
    columns: Sequence[Measure],
    results: ResultsFile,
    *,
    advance: Callable[[int], None],
) -> tuple[list[str], list[str]]:
    """Add the rows that `results` lacks.

    Args:
        samples: as of `find_samples`.
        annotations: see `samples`.
        network: brings the preprocessing.
        subject: what is explained.
        methods: classes of the host's kind, by name; the controls come by themselves.
        columns: as of `measures`.
        results: where the rows are, and go.
        advance: called with a number of samples whenever these are done.

    Returns:
        One line for each sample that could not be used and was skipped, and one for each remark on the others.

    Raises:
        OSError: the results cannot be written.
    """
    skipped: list[str] = []
    remarks: list[str] = []
    names = [*methods, *CONTROLS]
    # Batches are cut the same way in every run, so that a number does not depend on where a run was interrupted.
    for start in range(0, len(samples), _BATCH):
        batch = samples[start : start + _BATCH]
        seen: dict[Sample, NetworkView] = {}
        for sample in batch:
            try:
                seen[sample] = network_view(sample, annotations, network)
            except (OSError, ValueError) as error:
                skipped.append(str(error))
            else:
                remarks += seen[sample].remarks
        for these in _of_one_size(seen):
            missing = {name for sample in these for name in names if (sample.name, name) not in results.rows}
            if missing:
                wanted = {name: build for name, build in methods.items() if name in missing}
                failed, notes = _compare(these, network, subject, wanted, columns, results)
                skipped, remarks = skipped + failed, remarks + notes
        advance(len(batch))
    return skipped, remarks


def _compare(
    seen: Mapping[Sample, NetworkView],
    network: Network,
    subject: Subject,
    methods: Mapping[str, Builder],
    columns: Sequence[Measure],
    results: ResultsFile,
) -> tuple[list[str], list[str]]:
    """Add rows of samples of one size, and return what `compare_on_folder` does."""
    pictures, remarks = [sample.name for sample in seen], []
    try:
        images, masks = on_device(list(seen.values()), network)
        for name, maps, values in compare(images, masks, pictures, subject, methods, columns):
            results.append(name, pictures, values)
            finite = maps.flatten(1).isfinite().all(1).tolist()
            broken = [picture for picture, is_finite in zip(pictures, finite, strict=True) if not is_finite]
            remarks += [f"{picture}: {name} gave a map with NaN or Inf, or none, so not scored" for picture in broken]
    except OSError:
        raise
    except Exception as error:
        # One picture on which a network fails in its own way costs no other picture its rows.
        if len(seen) == 1:
            return [f"{sample.picture}: {one_line(error)}" for sample in seen], []
        alone = [_compare({sample: each}, network, subject, methods, columns, results) for sample, each in seen.items()]
        return [line for skipped, _ in alone for line in skipped], [line for _, notes in alone for line in notes]
    return [], remarks


def on_device(seen: Sequence[NetworkView], network: Network) -> tuple[Tensor, Tensor]:
    """Return the images and the masks as batches where the model is."""
    return (
        torch.stack([each.network_input for each in seen]).to(network.device),
        torch.stack([each.mask for each in seen]).to(network.device),
    )


def _of_one_size(seen: Mapping[Sample, NetworkView]) -> Iterator[dict[Sample, NetworkView]]:
    """Part the batch by the size of the network's input: not every preprocessing crops."""
    by_size: dict[torch.Size, dict[Sample, NetworkView]] = {}
    for sample, each in seen.items():
        by_size.setdefault(each.network_input.shape, {})[sample] = each
    yield from by_size.values()
