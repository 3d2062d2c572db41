"""Pictures in, Parquet tables of maps out: the same work on a Ray cluster, by a pool of actors.

Ray Data runs it and writes the tables, here or on any file system fsspec knows; the tables themselves tell a later run
what is done. What one run has written, another never changes: of two at once, neither can destroy the other's.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet as pq
import ray
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from ray.data.datasource import FilenameProvider

from tucker_cam.errors import BadFileError, BadValueError
from tucker_cam.explanations.explainer import Explainer
from tucker_cam.explanations.folder import CPU_BATCH, in_batches, problem_with, read_input
from tucker_cam.explanations.outputs import identity, is_of_run, not_of_a_run, read_manifest, versions
from tucker_cam.methods import method_named
from tucker_cam.models import LoadedModel
from tucker_cam.pictures.files import is_url
from tucker_cam.pictures.sources import MANIFEST, Source, find_sources, random_sample
from tucker_cam.text import counted
from tucker_cam.writing import only_run

_PREFIX = "maps-"
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


def explain_on_ray(
    images: Sequence[str],
    *,
    load: Callable[[], LoadedModel],
    methods: Sequence[str],
    out: str,
    aug_smooth: bool,
    limit: int | None,
    batch_size: int | None,
    workers: int | None,
    say: Callable[[str], None],
) -> list[str]:
    """Explain the pictures that the tables in `out` have not yet.

    A table has a row for each picture and method: ``saliency``, the map row by row, float32 in [0, 1], and its
    ``shape``. The batches are those of a single machine with the same `batch_size`, and so are the maps.

    Args:
        images: as for `explain_pictures`; every node must be able to read them.
        load: loads the model; it is called in every actor.
        methods: their names.
        out: a folder, local to all nodes or a URL.
        aug_smooth: average over flips and brightness.
        limit: take a random sample of so many pictures, see `random_sample`.
        batch_size: None for 8.
        workers: actors; None for one fewer than the cluster has CPUs.
        say: told what was loaded, and what came out.

    Returns:
        One line for each argument that names no picture, and each picture that could not be read or explained; all
        others are done.

    Raises:
        ValueError: as for `explain_pictures`; or no actor is to do the work.
        ModuleNotFoundError: the model's package is missing.
        OSError: weights could not be had, or `out` could not be written.
    """
    classes = list(dict.fromkeys(methods))
    for name in classes:
        method_named(name)
    if workers == 0:
        raise BadValueError("expected at least one actor to explain the pictures, got --workers 0")
    sources, unusable = find_sources(images, out=None if is_url(out) else Path(out))
    sources = random_sample(sources, limit)
    filesystem, folder = url_to_fs(out)
    filesystem.makedirs(folder, exist_ok=True)
    # Elsewhere there is no lock that all file systems keep.
    local = isinstance(filesystem, LocalFileSystem)
    with only_run(Path(folder, MANIFEST)) if local else nullcontext():
        loaded = load()
        say(loaded.description)
        earlier = _read_tables(filesystem, folder)
        _claim_folder(filesystem, folder, out, identity(loaded, "ray", aug_smooth=aug_smooth), earlier)
        before = earlier.done
        size = batch_size or CPU_BATCH
        items = [_item(batch, classes, before) for batch in in_batches(sources, size)]
        items = [item for item in items if any(item["missing"])]
        if items:
            if not ray.is_initialized():
                ray.init(log_to_driver=False, logging_level=logging.WARNING)
            logging.getLogger("ray.data").setLevel(logging.WARNING)
            actors = workers or max(int(ray.cluster_resources().get("CPU", 1)) - 1, 1)
            explained = ray.data.from_items(items, override_num_blocks=min(len(items), _MOST_BLOCKS)).map_batches(
                _Actor,
                fn_constructor_args=(load, classes, aug_smooth),
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=min(actors, len(items))),
                num_gpus=int(loaded.device.type == "cuda"),
            )
            explained.write_parquet(
                folder,
                filesystem=filesystem,
                filename_provider=_Names(file_format="parquet"),
                # Writing must not wait for a core while the actors hold them all.
                ray_remote_args={"num_cpus": 0},
            )
        new = _read_tables(filesystem, folder, known=earlier.paths)
    after = before | new.done
    for path in earlier.broken + new.broken:
        say(
            f"note: {path}: expected a whole table, found a damaged one, or one that a run is still writing: left out, "
            "and its maps made again; delete it when no run is writing"
        )
    already = sum(all((source.key, name) in before for name in classes) for source in sources)
    failed = [source for source in sources if not all((source.key, name) in after for name in classes)]
    say(
        f"{counted(len(sources))}: {len(sources) - already - len(failed)} explained, {already} there already, "
        f"{len(failed)} failed; in {out}"
    )
    return [f"{failure.error}" for failure in unusable] + [
        new.errors.get(source.key, f"{source}: it is in no table; the same command tries again") for source in failed
    ]


class _Actor:
    """Explains the pictures of one batch after the other; Ray keeps it, and so its model, for many."""

    def __init__(self, load: Callable[[], LoadedModel], methods: Sequence[str], aug_smooth: bool) -> None:
        self.explainer = Explainer(load(), {name: method_named(name) for name in methods}, aug_smooth=aug_smooth)

    def __call__(self, items: pyarrow.Table) -> pyarrow.Table:
        rows = [row for item in items.to_pylist() for row in self._rows(item)]
        return pyarrow.Table.from_pylist(rows, schema=_SCHEMA)

    def _rows(self, item: Mapping[str, list[Any]]) -> Iterator[dict[str, object]]:
        sources = [
            Source(name, path, None if row is None else (row[0], row[1]))
            for name, path, row in zip(item["names"], item["paths"], item["rows"], strict=True)
        ]
        loaded = self.explainer.loaded
        inputs = [read_input(source, loaded.preprocess, loaded.frames) for source in sources]
        for source, found, missing in zip(sources, self.explainer.explain(inputs), item["missing"], strict=True):
            if isinstance(found, Exception):
                if missing:
                    yield {"picture": source.key, "name": source.name, "error": problem_with(source, found)}
            else:
                for method in missing:
                    saliency = found.maps[method]
                    yield {
                        "picture": source.key,
                        "name": source.name,
                        "method": method,
                        "shape": saliency.shape,
                        "saliency": saliency.ravel(),
                    }


class _Names(FilenameProvider):
    def get_filename_for_task(self, write_uuid: str, task_index: int) -> str:
        return f"{_PREFIX}{super().get_filename_for_task(write_uuid, task_index)}"


def _item(batch: Sequence[Source], methods: Sequence[str], done: set[tuple[str, str]]) -> dict[str, list[Any]]:
    return {
        "names": [source.name for source in batch],
        "paths": [source.location for source in batch],
        "rows": [source.row if source.row is None else list(source.row) for source in batch],
        "missing": [[name for name in methods if (source.key, name) not in done] for source in batch],
    }


class _Tables(NamedTuple):
    """What the tables of a folder hold.

    Attributes:
        paths: of all of them.
        done: pictures and methods.
        errors: by picture, why there is no map.
        broken: the tables that cannot be read. They stay where they are: a run may still be writing them.
    """

    paths: list[str]
    done: set[tuple[str, str]]
    errors: dict[str, str]
    broken: list[str]


def _claim_folder(filesystem: Any, folder: str, out: str, run: Mapping[str, Any], tables: _Tables) -> None:
    """Write the manifest of a new folder; in one of this run there is nothing to do."""
    path = f"{folder}/{MANIFEST}"
    if filesystem.exists(path):
        content = read_manifest(filesystem.cat_file(path).decode(errors="surrogateescape"), run, out)
        if is_of_run(content, run, out, lambda: bool(tables.done or tables.broken)):
            return
    # Tables are read: they must be a run's.
    elif tables.paths:
        raise not_of_a_run(tables.paths[0])
    unfinished = f"{folder}/.{MANIFEST}.unfinished"
    try:
        filesystem.pipe_file(unfinished, json.dumps({**run, "versions": versions()}, indent=1).encode())
        filesystem.mv(unfinished, path)
    except OSError as error:
        raise BadFileError(f"{path}: could not be written ({error})") from error


def _read_tables(filesystem: Any, folder: str, *, known: Collection[str] = ()) -> _Tables:
    """Read all tables but those that are known."""
    # Ray writes them behind its back.
    filesystem.invalidate_cache()
    tables = _Tables(sorted({*filesystem.glob(f"{folder}/{_PREFIX}*.parquet")}.difference(known)), set(), {}, [])
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
                tables.errors[row["picture"]] = row["error"]
    return tables
