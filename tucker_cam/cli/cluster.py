"""Pictures in, Parquet tables of maps out: the same work on a Ray cluster, by a pool of actors.

Ray Data runs it and writes the tables, here or on any file system fsspec knows; the tables themselves tell a later run
what is done.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet as pq
import ray
import typer
from fsspec.core import url_to_fs
from ray.data.datasource import FilenameProvider

from tucker_cam.cli.explain import CPU_BATCH, counted, in_batches, read_input
from tucker_cam.cli.explainer import Explainer
from tucker_cam.cli.methods import method_named
from tucker_cam.cli.outputs import check_run, identity, not_of_a_run, versions
from tucker_cam.cli.sources import MANIFEST, Source, find_sources
from tucker_cam.files import printable
from tucker_cam.models import LoadedModel

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
    batch_size: int | None,
    workers: int | None,
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
        batch_size: None for 8.
        workers: actors; None for one fewer than the cluster has CPUs.

    Returns:
        One line for each picture that could not be read or explained; all others are done.

    Raises:
        ValueError: as for `explain_pictures`; or no actor is to do the work.
        ModuleNotFoundError: the model's package is missing.
        OSError: weights could not be had, or `out` could not be written.
    """
    classes = list(dict.fromkeys(methods))
    for name in classes:
        method_named(name)
    if workers == 0:
        raise ValueError("expected at least one actor to explain the pictures, got --workers 0")
    sources = find_sources(images)
    loaded = load()
    typer.echo(printable(loaded.description))
    filesystem, folder = url_to_fs(out)
    filesystem.makedirs(folder, exist_ok=True)
    _claim_folder(filesystem, folder, out, identity(loaded, aug_smooth=aug_smooth))
    before, _ = _read_tables(filesystem, folder)
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
            concurrency=min(actors, len(items)),
            num_gpus=int(loaded.device.type == "cuda"),
        )
        explained.write_parquet(
            folder,
            filesystem=filesystem,
            filename_provider=_Names(file_format="parquet"),
            # Writing must not wait for a core while the actors hold them all.
            ray_remote_args={"num_cpus": 0},
        )
    after, errors = _read_tables(filesystem, folder)
    already = sum(all((source.key, name) in before for name in classes) for source in sources)
    failed = [source for source in sources if not all((source.key, name) in after for name in classes)]
    typer.echo(
        f"{counted(len(sources))}: {len(sources) - already - len(failed)} explained, {already} there already, "
        f"{len(failed)} failed; in {out}"
    )
    return [errors.get(source.key, f"{source}: it is in no table; the same command tries again") for source in failed]


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
            if missing and isinstance(found, str):
                yield {"picture": source.key, "name": source.name, "error": f"{source}: {found}"}
            elif not isinstance(found, str):
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


def _claim_folder(filesystem: Any, folder: str, out: str, run: Mapping[str, Any]) -> None:
    path = f"{folder}/{MANIFEST}"
    if filesystem.exists(path):
        check_run(filesystem.cat_file(path).decode(errors="surrogateescape"), run, out)
    # Tables are read, and what a killed run left half of one is removed: they must be a run's.
    elif taken := filesystem.glob(f"{folder}/{_PREFIX}*.parquet"):
        raise not_of_a_run(taken[0])
    filesystem.pipe_file(path, json.dumps({**run, "versions": versions()}, indent=1).encode())


def _read_tables(filesystem: Any, folder: str) -> tuple[set[tuple[str, str]], dict[str, str]]:
    """Return the pictures and methods that are done, and why others failed; what a killed run left half is removed."""
    done, errors = set(), {}
    for path in sorted(filesystem.glob(f"{folder}/{_PREFIX}*.parquet")):
        try:
            with filesystem.open(path, "rb") as file:
                table = pq.read_table(file, columns=["picture", "method", "error"])
        except pyarrow.ArrowInvalid:
            filesystem.rm_file(path)
            continue
        for row in table.to_pylist():
            if row["error"] is None:
                done.add((row["picture"], row["method"]))
            else:
                errors[row["picture"]] = row["error"]
    return done, errors
