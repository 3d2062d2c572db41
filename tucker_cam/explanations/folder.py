"""Writes explanations to a folder: resumes an earlier run, and never touches files that others wrote."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path

from pytorch_grad_cam.base_cam import BaseCAM

from tucker_cam.errors import BadFileError, BadValueError, Failure, TuckerCamError
from tucker_cam.explanations.explainer import Explainer
from tucker_cam.explanations.explanation import Explanation, Look
from tucker_cam.explanations.gallery import write_gallery
from tucker_cam.explanations.manifest import Manifest, identity, manifests_in, not_of_a_run, place_of_run
from tucker_cam.explanations.outputs import FORMATS, PAGE, STORE, GalleryParts, MethodFiles, Output, gallery_entries
from tucker_cam.methods import check_name, check_own_names
from tucker_cam.pictures.ahead import cores, in_batches
from tucker_cam.pictures.files import is_url
from tucker_cam.pictures.held import Collection, Picture, size_of
from tucker_cam.pictures.sources import MANIFEST, NOT_OURS, safe_name
from tucker_cam.pictures.view import view_of
from tucker_cam.progress import progress
from tucker_cam.text import counted
from tucker_cam.writing import only_run

# The most threads, but never more than cores: else they wait for each other, and the network waits for them.
_MOST_WRITERS = 4
# The names in a stream are not known in advance: this many pictures are added to the manifest at a time.
_PART = 256
logger = logging.getLogger("tucker_cam")


def check_writing(
    out: str | Path | None, formats: str | Sequence[str], look: Look, methods: Mapping[str, Callable[..., BaseCAM]]
) -> list[str]:
    """Return the formats and make the folder; ValueError if a format, look, method's name or the folder is invalid."""
    formats = [formats] if isinstance(formats, str) else [*formats]
    for name in formats:
        check_name("format", name, FORMATS)
    look.check()
    for name in methods:
        if safe_name(name) != name or "/" in name:
            raise BadValueError(f"expected a method's name that can be part of a file name, got {name!r}")
    if out is not None:
        check_own_names(methods)
        if is_url(str(out)):
            raise BadValueError(f"{out}: expected a folder of this machine, a URL only with Ray, which writes Parquet")
        out = Path(out)
        if out.exists() and not out.is_dir():
            raise BadValueError(f"{out}: expected a folder for what is written, found a file")
        # Made before the work that takes long.
        out.mkdir(parents=True, exist_ok=True)
    return formats


@dataclass
class FolderWriter:
    """Writes explanations to a folder; the arguments are those of `explain`.

    Batches are cut in the same way in every run, so a map does not depend on where an earlier run was interrupted.
    Files that no manifest lists are neither taken for maps nor overwritten.

    Attributes:
        failures: what could not be read, explained or written.
    """

    explainer: Explainer
    out: Path
    formats: Sequence[str]
    gallery: bool
    batch_size: int
    workers: int | None
    failures: list[Failure] = field(default_factory=list)

    def write(self, pictures: Collection, *, shown: bool) -> None:
        """Write the missing files, with a progress bar if it is `shown`, and log a summary at the end.

        Raises:
            ValueError: another run is writing to the folder, or its manifest, store or page is broken or not of a run.
            OSError: the folder cannot be written to, or a reading process was killed.
        """
        with only_run(self.out / MANIFEST):
            run = identity(self.explainer.loaded, "torch", aug_smooth=self.explainer.aug_smooth)
            earlier = {str(path.parent): path.read_bytes() for path in manifests_in(self.out)}
            manifest = Manifest(Path(place_of_run(str(self.out), run, earlier)), run)
            if manifest.is_new and manifest.folder != self.out:
                logger.info(f"note: {self.out} holds the results of another run: these go beside them")
            self._claim(manifest)
            # Pictures that could not be found are counted too, as in the length of `Explanations`.
            self.failures += pictures.failures
            count, there = len(pictures.failures), 0
            with progress("explaining", pictures.number, shown=shown) as advance:
                for part in _parts(pictures):
                    there += self._write_part(part, manifest, advance)
                    count += len(part)
            failed = sum(not failure.method for failure in self.failures)
            page = self._write_gallery() if self.gallery else ""
        logger.info(
            f"{counted(count)}: {count - there - failed} explained, {there} there already, {failed} failed; in "
            f"{manifest.folder}{page}"
        )

    def _claim(self, manifest: Manifest) -> None:
        """Write the manifest before other files, so that what a killed run leaves is known to belong to a run."""
        if manifest.is_new:
            manifest.folder.mkdir(exist_ok=True)
            for name in (STORE, PAGE):
                if (manifest.folder / name).exists():
                    raise not_of_a_run(manifest.folder / name)
        manifest.methods = [*dict.fromkeys([*manifest.methods, *self.explainer.methods])]
        suffixes = [kind.suffix for name in self.formats if issubclass(kind := FORMATS[name], MethodFiles)]
        manifest.suffixes = [*dict.fromkeys([*manifest.suffixes, *suffixes])]
        manifest.write()

    def _write_part(self, pictures: Sequence[Picture], manifest: Manifest, advance: Callable[[int], None]) -> int:
        """Write the missing files of some pictures; return how many pictures had none missing."""
        earlier = dict(manifest.stamps)
        manifest.add(pictures)
        kinds = [FORMATS[name] for name in self.formats] + ([GalleryParts] if self.gallery else [])
        outputs = [kind(manifest, list(self.explainer.methods), self.explainer.look) for kind in kinds]
        missing: dict[str, list[Output]] = {}
        for picture in pictures:
            key = picture.key
            before = earlier.get(key, NOT_OURS)
            if before == NOT_OURS:
                if taken := [path for kind in kinds for path in kind.left(manifest, key) if path.exists()]:
                    manifest.stamps[key] = NOT_OURS
                    self._fail(picture, not_of_a_run(taken[0]))
                    continue
            elif before != manifest.stamps[key]:
                try:
                    removed = remove_files(manifest, key)
                    logger.info(f"note: {picture} has changed; files removed that earlier runs wrote of it: {removed}")
                except OSError as error:
                    manifest.stamps[key] = before
                    self._fail(picture, BadFileError(f"what an earlier run wrote could not be removed ({error})"))
                    continue
            missing[key] = [output for output in outputs if not output.has(key)]
        manifest.write()
        batches = [each for each in in_batches(pictures, self.batch_size) if any(missing.get(p.key) for p in each)]
        if batches:
            self._explain(batches, missing, manifest, advance)
        there = [picture for picture in pictures if missing.get(picture.key) == []]
        network = self.explainer.loaded
        for picture in there:
            # A killed run may have written a picture's files but not where in it the network looked.
            if picture.key not in manifest.views:
                with suppress(OSError):
                    size = size_of(picture.read(network.frames))
                    manifest.see(picture.key, view_of(network.preprocess, size, network.frames))
        manifest.write()
        return len(there)

    def _explain(
        self,
        batches: Sequence[Sequence[Picture]],
        missing: Mapping[str, list[Output]],
        manifest: Manifest,
        advance: Callable[[int], None],
    ) -> None:
        def write(picture: Picture, explanation: Explanation) -> None:
            errors = []
            for output in missing[picture.key]:
                try:
                    output.write(explanation)
                except (OSError, TuckerCamError) as error:
                    errors.append(str(error))
            manifest.see(picture.key, explanation.view)
            if errors:
                self._fail(picture, BadFileError(f"could not be written ({'; '.join(dict.fromkeys(errors))})"))

        writing: list[Future[None]] = []
        with ThreadPoolExecutor(min(cores(), _MOST_WRITERS)) as writers:
            for batch in self.explainer.explain_all(batches, self.workers):
                before, writing = writing, []
                for picture, found in batch:
                    if not missing.get(picture.key):
                        continue
                    if isinstance(found, Exception):
                        self._fail(picture, found)
                    else:
                        self.failures += found.failures
                        writing.append(writers.submit(write, picture, found))
                # At most two batches are held in memory.
                for written in before:
                    written.result()
                advance(len(batch))
            for written in writing:
                written.result()

    def _write_gallery(self) -> str:
        """Write the page of all runs in the folder, and return what the summary says about it."""
        try:
            folders = [path.parent for path in manifests_in(self.out)]
            runs = [Manifest(folder, None) for folder in folders if (folder / ".gallery").is_dir()]
            titles = [f"{run.run['model']}, {', '.join(run.run['layers'])}" for run in runs]
            endings = [f" ({title})" for title in titles] if len(runs) > 1 else [""]
            entries = chain.from_iterable(map(gallery_entries, runs, endings, repeat(self.out)))
            write_gallery(self.out / PAGE, "; ".join(titles), entries)
        except (OSError, TuckerCamError) as error:
            self.failures.append(Failure("gallery", BadFileError(f"it could not be written ({error})")))
            return ""
        return f"; gallery: {self.out / PAGE}"

    def _fail(self, picture: Picture, error: Exception) -> None:
        self.failures.append(Failure(str(picture), error))


def remove_files(manifest: Manifest, key: str) -> int:
    """Remove the files that earlier runs wrote for a picture that has changed since; return their number."""
    kinds: tuple[type[Output], ...] = (*FORMATS.values(), GalleryParts)
    left = [path for kind in kinds for path in filter(Path.is_file, kind.left(manifest, key))]
    for path in left:
        path.unlink()
    manifest.views.pop(key, None)
    return len(left)


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
