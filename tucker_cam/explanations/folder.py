"""Pictures in, overlays, maps and a gallery on the disk out: on one machine, read ahead by workers."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tucker_cam.errors import BadFileError, BadValueError
from tucker_cam.explanations.explainer import Explainer, Found
from tucker_cam.explanations.outputs import FORMATS, NOT_OURS, GalleryParts, Manifest, Output, Picture
from tucker_cam.methods import method_named
from tucker_cam.models import LoadedModel
from tucker_cam.models.families import preprocessed
from tucker_cam.pictures.sources import MANIFEST, Source, find_sources, random_sample
from tucker_cam.progress import progress
from tucker_cam.text import counted, one_line
from tucker_cam.writing import only_run

CPU_BATCH = 8
_LARGEST_BATCH = 256
_MOST_WORKERS = 8
_WRITERS = 4


def explain_pictures(
    images: Sequence[str],
    *,
    load: Callable[[], LoadedModel],
    methods: Sequence[str],
    formats: Sequence[str],
    gallery: bool,
    out: Path,
    aug_smooth: bool,
    limit: int | None,
    batch_size: int | None,
    workers: int | None,
    say: Callable[[str], None],
) -> list[str]:
    """Explain the pictures that `out` has not yet, and write what was asked for.

    A map does not depend on where an earlier run was interrupted: batches are cut alike in every run. What no manifest
    lists is neither taken for a map nor overwritten.

    Args:
        images: files, folders, globs and Parquet files.
        load: loads the model.
        methods: their names.
        formats: of overlay, npy, zarr.
        gallery: write a page with all pictures too.
        out: a folder; made if it is missing.
        aug_smooth: average over flips and brightness.
        limit: take a random sample of so many pictures, see `random_sample`.
        batch_size: None for what the device takes.
        workers: processes that read pictures ahead; None for one less than there are cores, and none for few pictures.
        say: told what was loaded, and what came out.

    Returns:
        One line for each argument that names no picture, and each picture, and the gallery, that could not be read,
        explained or written; all others are done.

    Raises:
        ValueError: an unknown method, model, layer or device; no pictures; another run in `out`, or its maps.
        ModuleNotFoundError: a package is missing.
        OSError: weights could not be had, `out` could not be written, or a reading process was killed.
    """
    classes = {name: method_named(name) for name in dict.fromkeys(methods)}
    if out.exists() and not out.is_dir():
        raise BadValueError(f"{out}: expected a folder for what is written, found a file")
    sources, unusable = find_sources(images, out=out)
    sources = random_sample(sources, limit)
    # What takes long comes last: the pictures are there, and the folder can be written to.
    out.mkdir(parents=True, exist_ok=True)
    with only_run(out / MANIFEST):
        loaded = load()
        say(loaded.description)
        manifest = Manifest(out, loaded, aug_smooth=aug_smooth)
        manifest.claim_folder()
        names, earlier = manifest.add(sources), dict(manifest.stamps)
        manifest.stamps |= {source.key: source.stamp for source in sources}
        page = GalleryParts(out, list(classes)) if gallery else None
        outputs = [kind.begin(out, list(classes), manifest) for name, kind in FORMATS.items() if name in formats]
        outputs += [] if page is None else [page]
        missing, problems = {}, []
        for source in sources:
            before = earlier.get(source.key, NOT_OURS)
            paths = [path for output in outputs for path in output.paths(names[source])] if before == NOT_OURS else []
            if taken := [path for path in paths if path.exists()]:
                manifest.stamps[source.key] = NOT_OURS
                problems.append(f"{source}: {taken[0]} is there already, and not of a run in this folder")
                continue
            if before != NOT_OURS and before.differs(manifest.stamps[source.key]):
                try:
                    manifest.remove_files(source)
                except OSError as error:
                    manifest.stamps[source.key] = before
                    problems.append(f"{source}: what an earlier run wrote could not be removed ({error})")
                    continue
            missing[source] = [output for output in outputs if not output.has(names[source])]
        manifest.write()
        explainer = Explainer(loaded, classes, aug_smooth=aug_smooth, components=gallery)
        size = batch_size or batch_size_for(explainer)
        batches = [batch for batch in in_batches(sources, size) if any(missing.get(source) for source in batch)]
        if batches:
            problems += _run(explainer, batches, names, missing, workers)
        unfinished = [] if page is None else _finish(page, manifest.names.values(), loaded)
    there = sum(not outputs for outputs in missing.values())
    say(
        f"{counted(len(sources))}: {len(sources) - there - len(problems)} explained, {there} there already, "
        f"{len(problems)} failed; in {out}" + (f"; gallery: {page.page}" if page is not None and not unfinished else "")
    )
    return [f"{failure.error}" for failure in unusable] + problems + unfinished


def _finish(page: GalleryParts, names: Iterable[str], loaded: LoadedModel) -> list[str]:
    try:
        page.finish(names, f"{loaded.name}, {', '.join(loaded.layer_names)}")
    except (OSError, ValueError) as error:
        return [f"the gallery could not be written ({error})"]
    return []


def in_batches(sources: Sequence[Source], size: int) -> list[Sequence[Source]]:
    """Cut the pictures into batches: alike in every run, so that a map does not depend on where one was stopped."""
    return [sources[start : start + size] for start in range(0, len(sources), size)]


def batch_size_for(explainer: Explainer) -> int:
    """Return how many pictures the device takes at once: on a GPU, what fills half of its free memory."""
    example = explainer.loaded.example()
    if example.device.type != "cuda":
        return CPU_BATCH
    explainer.explain([example[0]])
    torch.cuda.reset_peak_memory_stats(example.device)
    before = torch.cuda.memory_allocated(example.device)
    explainer.explain([example[0]])
    each = max(torch.cuda.max_memory_allocated(example.device) - before, 1)
    free, _ = torch.cuda.mem_get_info(example.device)
    return min(max(free // 2 // each, 1), _LARGEST_BATCH)


class _Pictures(Dataset[Tensor | Exception]):
    """Preprocessed pictures; for one that cannot be read, the error."""

    def __init__(self, sources: Sequence[Source], loaded: LoadedModel) -> None:
        self.sources, self.preprocess, self.frames = sources, loaded.preprocess, loaded.frames

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Tensor | Exception:
        return read_input(self.sources[index], self.preprocess, self.frames)


def read_input(source: Source, preprocess: Callable[[object], Tensor], frames: int | None) -> Tensor | Exception:
    """Return the network's input for a picture, or the error for which there is none."""
    try:
        return preprocessed(preprocess, source.read(frames), str(source))
    except (OSError, ValueError) as error:
        return error


def problem_with(source: Source, error: Exception) -> str:
    """Return one line on a picture that could not be read or explained."""
    return f"{source}: {one_line(error).removeprefix(f'{source}: ')}"


def _run(
    explainer: Explainer,
    batches: Sequence[Sequence[Source]],
    names: dict[Source, str],
    missing: dict[Source, list[Output]],
    workers: int | None,
) -> list[str]:
    total = sum(map(len, batches))
    sources = [source for batch in batches for source in batch]
    ends = accumulate(map(len, batches))
    indices = [list(range(end - len(batch), end)) for end, batch in zip(ends, batches, strict=True)]
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = 0 if len(batches) < 2 else min(max(cores - 1, 1), _MOST_WORKERS)
    loader = DataLoader(
        _Pictures(sources, explainer.loaded), batch_sampler=indices, collate_fn=_collate, num_workers=workers
    )
    problems: list[str] = []
    writing: deque[tuple[Source, Future[None]]] = deque()
    with ThreadPoolExecutor(_WRITERS) as writers, progress("explaining", total) as advance:
        for batch, inputs in zip(batches, _batches(loader), strict=True):
            for source, each, found in zip(batch, inputs, explainer.explain(inputs), strict=True):
                if not missing.get(source):
                    continue
                if isinstance(found, Exception):
                    problems.append(problem_with(source, found))
                elif isinstance(each, Tensor):
                    view = partial(explainer.loaded.picture, each)
                    writing.append((source, writers.submit(_write, missing[source], names[source], view, found)))
            # So many wait at most, and what they hold is not let grow.
            while len(writing) > 2 * len(batch):
                problems += _settle(*writing.popleft())
            advance(len(batch))
        while writing:
            problems += _settle(*writing.popleft())
    return problems


def _collate(inputs: list[Tensor | Exception]) -> list[Tensor | Exception] | Tensor:
    """Put inputs of one size into one tensor, which a worker hands over at once and not picture by picture."""
    try:
        return torch.stack(inputs)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):
        # An error of a picture that cannot be read; another size.
        return inputs


def _batches(loader: DataLoader[Tensor | Exception]) -> Iterator[list[Tensor | Exception] | Tensor]:
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise BadFileError(
            "a process that read pictures was killed, for want of memory perhaps: --workers 0"
        ) from error


def _write(outputs: Sequence[Output], name: str, picture: Picture, explanation: Found) -> None:
    for output in outputs:
        output.write(name, picture, explanation)


def _settle(source: Source, written: Future[None]) -> list[str]:
    try:
        written.result()
    except (OSError, ValueError) as error:
        return [f"{source}: could not be written ({error})"]
    return []
