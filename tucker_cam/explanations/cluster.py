"""Explains pictures on a Ray cluster, with a pool of actors, and writes the maps as Parquet tables.

Ray Data runs the work and writes the tables, locally or to any file system that fsspec knows. A later run reads from
the tables what is done. No run changes what another has written, so two at once cannot destroy each other's results.
"""

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet as pq
import ray
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from pytorch_grad_cam.base_cam import BaseCAM
from ray.data.datasource import FilenameProvider

from tucker_cam.errors import BadFileError, BadValueError, Failure
from tucker_cam.explanations.explainer import CPU_BATCH, Explainer, read_batch
from tucker_cam.explanations.manifest import identity, not_of_a_run, place_of_run, versions
from tucker_cam.models import LoadedModel
from tucker_cam.pictures.ahead import in_batches
from tucker_cam.pictures.sources import MANIFEST, TABLES, Source
from tucker_cam.text import counted, one_line
from tucker_cam.writing import only_run

_MOST_BLOCKS = 1000
_SCHEMA = pyarrow.schema(
    [
        ("picture", pyarrow.string()),
        ("name", pyarrow.string()),
        ("method", pyarrow.string()),
        ("shape", pyarrow.list_(pyarrow.int32())),
        ("saliency", pyarrow.list_(pyarrow.float32())),
        ("error", pyarrow.string()),
    ]
)
logger = logging.getLogger("tucker_cam")


@dataclass(frozen=True)
class Work:
    """What every actor does; see `Explainer`."""

    load: Callable[[], LoadedModel]
    methods: Mapping[str, Callable[..., BaseCAM]]
    aug_smooth: bool


def explain_on_ray(
    pictures: Sequence[Source], work: Work, out: str, *, batch_size: int | None, workers: int | None
) -> tuple[LoadedModel, list[Failure]]:
    """Explain the pictures that the tables in `out` do not hold yet; return the model and the failures.

    A table has a row for each picture and method: ``saliency``, the map row by row, float32 in [0, 1], and its
    ``shape``. The batches, and therefore the maps, are the same as on a single machine with the same `batch_size`.
    Every node reads pictures and writes to `out`.

    Raises:
        ValueError: another run is writing to `out`; or `out` holds files that are not of a run.
        OSError: `out` could not be written.
    """
    filesystem, root = url_to_fs(out)
    filesystem.makedirs(root, exist_ok=True)
    # There is no lock that works on every other file system.
    with only_run(Path(root, MANIFEST)) if isinstance(filesystem, LocalFileSystem) else nullcontext():
        loaded = work.load()
        logger.info(loaded.description)
        folder = _claim_folder(filesystem, root, identity(loaded, "ray", aug_smooth=work.aug_smooth))
        earlier = _read_tables(filesystem, folder)
        items = [_item(batch, work.methods, earlier.done) for batch in in_batches(pictures, batch_size or CPU_BATCH)]
        if items := [item for item in items if any(item["missing"])]:
            _run(items, work, folder, filesystem, workers, on_gpu=loaded.device.type == "cuda")
        new = _read_tables(filesystem, folder, known=earlier.paths)
    for path in earlier.broken + new.broken:
        logger.info(
            f"note: {path}: expected a whole table, found a damaged one, or one that a run is still writing: left out, "
            "and its maps made again; delete it when no run is writing"
        )
    after = earlier.done | new.done
    already = sum(all((picture.key, name) in earlier.done for name in work.methods) for picture in pictures)
    failures = [each for picture in pictures for each in _failures(picture, work.methods, after, new.errors)]
    failed = sum(not failure.method for failure in failures)
    logger.info(
        f"{counted(len(pictures))}: {len(pictures) - already - failed} explained, {already} there already, "
        f"{failed} failed; in {out}{folder.removeprefix(root)}"
    )
    return loaded, failures


def _failures(
    picture: Source,
    methods: Collection[str],
    done: Collection[tuple[str, str]],
    errors: Mapping[tuple[str, str], str],
) -> list[Failure]:
    """Return one failure for a picture without any map, or one for each method that failed on it."""
    missing = [name for name in methods if (picture.key, name) not in done]
    reasons = {name: errors[picture.key, name] for name in missing if (picture.key, name) in errors}
    if missing and not reasons:
        error = errors.get((picture.key, ""), "it is in no table; the same command tries again")
        return [Failure(str(picture), BadValueError(error))]
    return [Failure(str(picture), BadValueError(reason), name) for name, reason in reasons.items()]


def _run(
    items: Sequence[Mapping[str, Any]], work: Work, folder: str, filesystem: Any, workers: int | None, *, on_gpu: bool
) -> None:
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    actors = workers or max(int(ray.cluster_resources().get("CPU", 1)) - 1, 1)
    explained = ray.data.from_items(list(items), override_num_blocks=min(len(items), _MOST_BLOCKS)).map_batches(
        _Actor,
        fn_constructor_args=(work,),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(items))),
        num_gpus=int(on_gpu),
    )
    explained.write_parquet(
        folder,
        filesystem=filesystem,
        filename_provider=_Names(file_format="parquet"),
        # Writing must not wait for a core while the actors hold them all.
        ray_remote_args={"num_cpus": 0},
    )


class _Actor:
    """Explains the pictures batch by batch; Ray keeps the actor, and therefore its model, for many batches."""

    def __init__(self, work: Work) -> None:
        self.explainer = Explainer(work.load(), work.methods, work.aug_smooth)

    def __call__(self, items: pyarrow.Table) -> pyarrow.Table:
        rows = [row for item in items.to_pylist() for row in self._rows(item)]
        return pyarrow.Table.from_pylist(rows, schema=_SCHEMA)

    def _rows(self, item: Mapping[str, list[Any]]) -> Iterator[dict[str, object]]:
        sources = [Source(each["name"], each["path"], each["row"] and tuple(each["row"])) for each in item["pictures"]]
        explained = self.explainer.explain(sources, read_batch(sources, self.explainer.loaded))
        for source, found, missing in zip(sources, explained, item["missing"], strict=True):
            about: dict[str, object] = {"picture": source.key, "name": source.name}
            if not isinstance(found, Exception):
                for method in missing:
                    if (saliency := found.maps.get(method)) is not None:
                        yield about | {"method": method, "shape": saliency.shape, "saliency": saliency.ravel()}
                for failure in found.failures:
                    yield about | {"method": failure.method, "error": one_line(failure.error)}
            elif missing:
                yield about | {"error": str(Failure(str(source), found)).removeprefix(f"{source}: ")}


class _Names(FilenameProvider):
    def get_filename_for_task(self, write_uuid: str, task_index: int) -> str:
        return f"{TABLES}{super().get_filename_for_task(write_uuid, task_index)}"


def _item(batch: Sequence[Source], methods: Collection[str], done: set[tuple[str, str]]) -> dict[str, list[Any]]:
    return {
        "pictures": [{"name": each.name, "path": each.location, "row": each.row} for each in batch],
        "missing": [[name for name in methods if (source.key, name) not in done] for source in batch],
    }


def _claim_folder(filesystem: Any, root: str, run: Mapping[str, Any]) -> str:
    """Return the folder of this run, with a manifest in it."""
    manifests = {
        path.rpartition("/")[0]: filesystem.cat_file(path)
        for path in [*filesystem.glob(f"{root}/{MANIFEST}"), *sorted(filesystem.glob(f"{root}/*/{MANIFEST}"))]
    }
    folder = place_of_run(root, run, manifests)
    if folder in manifests:
        return folder
    # Tables in the folder would be read, so they must belong to a run.
    if tables := filesystem.glob(f"{folder}/{TABLES}*.parquet"):
        raise not_of_a_run(tables[0])
    unfinished, path = f"{folder}/.{MANIFEST}.unfinished", f"{folder}/{MANIFEST}"
    try:
        filesystem.makedirs(folder, exist_ok=True)
        filesystem.pipe_file(unfinished, json.dumps({**run, "versions": versions()}, indent=1).encode())
        filesystem.mv(unfinished, path)
    except OSError as error:
        raise BadFileError(f"{path}: could not be written ({error})") from error
    return folder


class _Tables(NamedTuple):
    """The tables of a folder: the pictures and methods that they hold, the errors of others, and the broken tables.

    The error of a picture that has no map at all is under an empty method name. Broken tables stay where they are: a
    run may still be writing them.
    """

    paths: list[str]
    done: set[tuple[str, str]]
    errors: dict[tuple[str, str], str]
    broken: list[str]


def _read_tables(filesystem: Any, folder: str, *, known: Collection[str] = ()) -> _Tables:
    # Ray has written tables that the file system's cache does not know.
    filesystem.invalidate_cache()
    tables = _Tables(sorted({*filesystem.glob(f"{folder}/{TABLES}*.parquet")}.difference(known)), set(), {}, [])
    columns = ["picture", "method", "error"]
    for path in tables.paths:
        try:
            with filesystem.open(path, "rb") as file:
                rows = pq.read_table(file, columns=columns).select(columns).to_pylist()
        except (OSError, ValueError, KeyError, pyarrow.ArrowException):
            tables.broken.append(path)
            continue
        for row in rows:
            if row["error"] is None:
                tables.done.add((row["picture"], row["method"]))
            else:
                tables.errors[row["picture"], row["method"] or ""] = row["error"]
    return tables
