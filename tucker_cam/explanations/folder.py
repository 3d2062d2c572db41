"""Explanations in, files in a folder out: what is there is gone on with, and what others wrote is left alone."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path

from tucker_cam.errors import BadFileError, BadValueError, Failure, TuckerCamError
from tucker_cam.explanations.explainer import Explainer
from tucker_cam.explanations.explanation import Explanation, Look, picture_and_view
from tucker_cam.explanations.gallery import write_gallery
from tucker_cam.explanations.manifest import NOT_OURS, Manifest, folder_of_run, identity, manifests_in, not_of_a_run
from tucker_cam.explanations.outputs import (
    FORMATS,
    KINDS,
    PAGE,
    STORE,
    SUFFIXES,
    GalleryParts,
    Output,
    gallery_entries,
)
from tucker_cam.methods import check_name
from tucker_cam.pictures.ahead import in_batches
from tucker_cam.pictures.held import Collection, Picture
from tucker_cam.pictures.sources import MANIFEST, safe_name
from tucker_cam.progress import progress
from tucker_cam.text import counted
from tucker_cam.writing import only_run

_WRITERS = 4
# Of a stream, whose names are not known before, so many pictures are listed in the manifest at a time.
_PART = 256
logger = logging.getLogger("tucker_cam")


def check_writing(out: Path | None, formats: Sequence[str], look: Look, methods: Iterable[str]) -> None:
    """Raise ValueError for a format, a look or a method's name that cannot be, or an `out` that is a file."""
    for name in formats:
        check_name("format", name, FORMATS)
    look.check()
    for name in methods:
        if safe_name(name) != name or "/" in name:
            raise BadValueError(f"expected a method's name that a file's can hold, got {name!r}")
    if out is not None:
        if out.exists() and not out.is_dir():
            raise BadValueError(f"{out}: expected a folder for what is written, found a file")
        # What takes long comes later.
        out.mkdir(parents=True, exist_ok=True)


@dataclass
class FolderWriter:
    """Writes explanations into a folder.

    A map does not depend on where an earlier run was interrupted: batches are cut alike in every run. What no manifest
    lists is neither taken for a map nor overwritten.

    Attributes:
        explainer: makes them.
        out: the folder; made if it is missing. What holds another run's results gets a folder below it for this one.
        formats: see `explain`.
        gallery: write a page with all pictures too.
        look: of overlays.
        batch_size: how many pictures go through the network together.
        workers: see `read_ahead`.
        failures: what could not be read, explained or written.
    """

    explainer: Explainer
    out: Path
    formats: Sequence[str]
    gallery: bool
    look: Look
    batch_size: int
    workers: int | None
    failures: list[Failure] = field(default_factory=list)

    def write(self, pictures: Collection, *, shown: bool) -> None:
        """Write what is missing, and say at the end what came out.

        Args:
            pictures: to explain.
            shown: whether a bar is.

        Raises:
            ValueError: another run is writing to the folder, or its manifest or store is none.
            OSError: the folder cannot be written to, or a reading process was killed.
        """
        with only_run(self.out / MANIFEST):
            run = identity(self.explainer.loaded, "torch", aug_smooth=self.explainer.aug_smooth)
            manifest = Manifest(folder_of_run(self.out, run), run)
            if manifest.is_new and manifest.folder != self.out:
                logger.info(f"note: {self.out} holds the results of another run: these go beside them")
            self._claim(manifest)
            count = there = 0
            with progress("explaining", pictures.number, shown=shown) as advance:
                for part in _parts(pictures):
                    there += self._write_part(part, manifest, advance)
                    count += len(part)
            unfinished = self._write_gallery() if self.gallery else []
        page = f"; gallery: {self.out / PAGE}" if self.gallery and not unfinished else ""
        failed = len(self.failures)
        logger.info(
            f"{counted(count)}: {count - there - failed} explained, {there} there already, {failed} failed; in "
            f"{manifest.folder}{page}"
        )
        self.failures += unfinished

    def _claim(self, manifest: Manifest) -> None:
        """Write the manifest of a new folder, so that whatever a killed run leaves is known to be of a run."""
        if manifest.is_new:
            manifest.folder.mkdir(exist_ok=True)
            for name in (STORE, PAGE):
                if (manifest.folder / name).exists():
                    raise not_of_a_run(manifest.folder / name)
        manifest.methods = [*dict.fromkeys([*manifest.methods, *self.explainer.methods])]
        manifest.write()

    def _write_part(self, pictures: Sequence[Picture], manifest: Manifest, advance: Callable[[int], None]) -> int:
        """Write what is missing of some pictures, and return of how many nothing was."""
        earlier = dict(manifest.stamps)
        manifest.add(pictures, SUFFIXES)
        kinds = [FORMATS[name] for name in self.formats] + ([GalleryParts] if self.gallery else [])
        outputs = [kind(manifest, list(self.explainer.methods), self.look) for kind in kinds]
        missing: dict[str, list[Output]] = {}
        for picture in pictures:
            before, name = earlier.get(picture.key, NOT_OURS), manifest.names[picture.key]
            paths = [path for output in outputs for path in output.paths(name)] if before == NOT_OURS else []
            if taken := [path for path in paths if path.exists()]:
                manifest.stamps[picture.key] = NOT_OURS
                self._fail(picture, BadValueError(f"{taken[0]} is there already, and not of a run in this folder"))
                continue
            if before != NOT_OURS and before.differs(manifest.stamps[picture.key]):
                try:
                    remove_files(manifest, picture.key)
                except OSError as error:
                    manifest.stamps[picture.key] = before
                    self._fail(picture, BadFileError(f"what an earlier run wrote could not be removed ({error})"))
                    continue
            missing[picture.key] = [output for output in outputs if not output.has(name)]
        manifest.write()
        batches = [each for each in in_batches(pictures, self.batch_size) if any(missing.get(p.key) for p in each)]
        if batches:
            self._explain(batches, missing, manifest, advance)
        there = [picture for picture in pictures if missing.get(picture.key) == []]
        for picture in there:
            # A run that was killed has written a picture's files, and not where in it the network looked.
            if picture.key not in manifest.views:
                with suppress(OSError):
                    manifest.see(picture.key, picture_and_view(picture, self.explainer.loaded)[1])
        manifest.write()
        return len(there)

    def _explain(
        self,
        batches: Sequence[Sequence[Picture]],
        missing: Mapping[str, list[Output]],
        manifest: Manifest,
        advance: Callable[[int], None],
    ) -> None:
        writing: deque[tuple[Picture, Future[None]]] = deque()

        def write(explanation: Explanation) -> None:
            key = explanation.source.key
            for output in missing[key]:
                output.write(manifest.names[key], explanation)
            manifest.see(key, explanation.view)

        def settle(picture: Picture, written: Future[None]) -> None:
            try:
                written.result()
            except (OSError, TuckerCamError) as error:
                self._fail(picture, BadFileError(f"could not be written ({error})"))

        with ThreadPoolExecutor(_WRITERS) as writers:
            for batch in self.explainer.explain_all(batches, self.workers):
                for picture, found in batch:
                    if isinstance(found, Exception):
                        if missing.get(picture.key):
                            self._fail(picture, found)
                    elif missing.get(picture.key):
                        writing.append((picture, writers.submit(write, found)))
                # So many wait at most, and what they hold is not let grow.
                while len(writing) > 2 * len(batch):
                    settle(*writing.popleft())
                advance(len(batch))
            while writing:
                settle(*writing.popleft())

    def _write_gallery(self) -> list[Failure]:
        """Write the page of all runs in the folder."""
        try:
            folders = [path.parent for path in manifests_in(self.out)]
            runs = [Manifest(folder, None) for folder in folders if (folder / ".gallery").is_dir()]
            titles = [f"{run.run['model']}, {', '.join(run.run['layers'])}" for run in runs]
            endings = [f" ({title})" for title in titles] if len(runs) > 1 else [""]
            entries = chain.from_iterable(map(gallery_entries, runs, endings, repeat(self.out)))
            write_gallery(self.out / PAGE, "; ".join(titles), entries)
        except (OSError, TuckerCamError) as error:
            return [Failure("gallery", BadFileError(f"it could not be written ({error})"))]
        return []

    def _fail(self, picture: Picture, error: Exception) -> None:
        self.failures.append(Failure(str(picture), error))


def remove_files(manifest: Manifest, key: str) -> None:
    """Remove what earlier runs wrote of a picture, which has changed since."""
    for kind in KINDS:
        for path in filter(Path.is_file, kind.left(manifest, key)):
            path.unlink()
    manifest.views.pop(key, None)


def _parts(pictures: Collection) -> Iterator[list[Picture]]:
    waiting: list[Picture] = []
    for part in pictures.parts():
        waiting += part
        if pictures.number is None and len(waiting) < _PART:
            continue
        yield waiting
        waiting = []
    if waiting:
        yield waiting
