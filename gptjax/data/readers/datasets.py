"""Hugging Face datasets: by name from the hub, a folder of files laid out as there, or one that
save_to_disk wrote."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from gptjax.config.errors import UserError
from gptjax.config.schema import DataConfig
from gptjax.core import files
from gptjax.data.records import Record, SplitRecords, missing_columns
from gptjax.data.selection import Selection


def check(config: DataConfig) -> str:
    """What the config lacks, or ""."""
    if config.name or config.path:
        return ""
    return (
        "data.source = 'datasets' needs data.name (a name on the hub) or data.path "
        "(what save_to_disk wrote, or a folder of files laid out as on the hub)"
    )


def split_names(config: DataConfig, path: str) -> tuple[str, ...]:
    """The names of the splits; () for a folder with one data set that is not split."""
    splits = _open_dataset(config, path)
    return tuple(splits) if isinstance(splits, dict) else ()


def read_records(config: DataConfig, path: str, split: str) -> SplitRecords:
    """The rows of a split; of all where the data set is not split (see `split_names`)."""
    rows = _open_dataset(config, path)
    name = config.name or path
    if isinstance(rows, dict):
        rows = rows[split]

    selection = Selection(f"{name} {split}".rstrip(), documents=len(rows))

    def read(names: Collection[str] | None = None) -> Iterator[Record]:
        selected, problems = rows, {}
        if names is not None:  # others may hold pictures or sound, which are decoded when read
            columns = [c for c in rows.column_names if c in names]
            # without any column there would be no rows
            selected = rows.select_columns(columns or rows.column_names[:1])
            problems = missing_columns(names, rows.column_names)
        for i, fields in enumerate(selected):
            yield Record(f"{selection.path} row {i}", dict(fields), problems)

    folder = Path(path).expanduser()
    fingerprint = files.digest(rows._fingerprint)
    if path and _is_hub_folder(folder):  # theirs follows path and time of change
        fingerprint = files.digest(split, *(files.sha256(p) for p in _files_of(folder)))
    return SplitRecords(len(rows), fingerprint, read, selection, read)


def _is_hub_folder(folder: Path) -> bool:
    """Whether a folder holds files of data, such as train-00000-of-00001.parquet."""
    saved = any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))
    return folder.is_dir() and not saved


def _files_of(folder: Path) -> list[Path]:
    """The files below a folder, sorted, without hidden ones."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return [p for p in paths if not any(part[0] == "." for part in p.relative_to(folder).parts)]


def _open_dataset(config: DataConfig, path: str) -> Any:
    """A Dataset, or a dict of them by split."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            "data.source = 'datasets' needs Hugging Face's datasets: pip install 'gptjax[datasets]'"
        ) from None
    try:
        folder = Path(path).expanduser()
        if path and _is_hub_folder(folder):
            return datasets.load_dataset(str(folder))
        if path:
            return datasets.load_from_disk(str(folder))
        return datasets.load_dataset(*config.name.split(":"))
    except Exception as error:  # network, name, folder: whatever the package raises
        reason = (str(error) or repr(error)).splitlines()[0][:200]
        raise UserError(
            f"data.source = 'datasets', name {config.name!r}, path {path!r}: {reason}"
        ) from None
