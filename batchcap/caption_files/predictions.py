"""Generated captions, of batchcap or another program. Knows no references, and no metrics."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from batchcap.caption_files.annotations import caption_problem, clean
from batchcap.caption_files.records import (
    Problems,
    first_of,
    holds_records,
    name_of,
    read_bytes,
    read_records,
)
from batchcap.errors import InputError, UsageError
from batchcap.process.wording import saying_which, shown
from batchcap.rows.index import newest_rows
from batchcap.rows.layout import Layout
from batchcap.rows.parquet import DamagedError, saying_where
from batchcap.storage.files import followed

KNOWN_FORMATS = (
    "Known formats: an output of batchcap run, COCO results and AI Challenger submissions (JSON), "
    "and JSON lines or CSV with `image_id` or `file_name`, and `caption` or `text`."
)
COLUMNS = ["image_id", "caption", "tokens", "mean_logprob", "finished"]


@dataclass(frozen=True, slots=True)
class GeneratedCaption:
    """One image's caption; None if the photo could not be read.

    `tokens` are the words as the model wrote them, `mean_logprob` is the natural log-probability
    per word, `finished` tells whether END was reached, `number` is the image's id in a COCO
    file; None if the file does not say.
    """

    image_id: str
    caption: str | None
    tokens: tuple[str, ...] | None = None
    mean_logprob: float | None = None
    finished: bool | None = None
    number: int | None = None


def read_captions(path: Path) -> list[GeneratedCaption]:
    """Read captions in any known format, recognised by content, in the file's order.

    Formats: `OUTPUT.parquet` and directories of parts of `batchcap run`; COCO results and AI
    Challenger submissions (an array of `{"image_id", "caption"}`, ids strings or numbers); JSON
    lines or CSV of the same. Captions of other programs are normalised to NFC with single spaces.

    Raises:
        UsageError: there is no such file.
        InputError: it is wrong, damaged, or has two captions of an image.
    """
    return _read_parquet(path) if holds_rows(path) else _read_records(path)


def holds_rows(path: Path) -> bool:
    """Whether a file or directory is an output of `batchcap run`."""
    return path.suffix == ".parquet" or path.is_dir()


def row_paths(path: Path) -> list[Path]:
    """Return the files with the rows of `OUTPUT.parquet` or `OUTPUT/`.

    Raises:
        UsageError: there is no such file or folder.
        InputError: a folder without rows.
    """
    with saying_which(path):
        path.stat()
    if not path.is_dir():
        return [path]
    paths = Layout(path).row_files()
    if not paths:
        raise InputError(f"{path} has no rows: give an output of batchcap run")
    return paths


def check_out(out: Path, captions: Path, *others: Path | None) -> None:
    """Check that `out` can be written, and overwrites none of the files that are read.

    Symbolic links are followed.

    Raises:
        UsageError: it is a folder, pipe or device, in the folder of a run, or one of these files.
    """
    with saying_where(out):
        out = followed(out)
    if out.is_dir():
        raise UsageError(f"{out} is a directory: give a file in it")
    if captions.is_dir() and os.path.realpath(out.parent) == os.path.realpath(captions):
        raise UsageError(
            f"{captions} is the directory of a run: give a file outside of it, not {out}"
        )
    if out.exists() and not out.is_file():  # a rename would replace /dev/null
        raise UsageError(f"{out} is not a regular file: choose another")
    for read in (captions, *others):
        if read is not None and out.exists() and read.exists() and out.samefile(read):
            raise UsageError(f"{out} would overwrite {read}: choose another file")


def read_rows(path: Path) -> Iterator[pa.Table]:
    """Yield the rows of an output of `batchcap run`, one row group at a time, checksums verified.

    If a run was killed before it dropped an image's old row, only the new one is read.

    Raises:
        UsageError: there is no such file or folder.
        InputError: it is damaged, or was not written by batchcap.
    """
    try:
        yield from newest_rows(row_paths(path))
    except DamagedError as error:
        raise InputError(
            f"{error}; give an output of batchcap run, or repeat the run, which redoes damaged rows"
        ) from error


def metadata_of(rows: pa.Table) -> dict[str, str]:
    """Return the metadata of a file with these rows."""
    found = rows.schema.metadata or {}
    return {key.decode(): value.decode() for key, value in found.items()}


def _read_parquet(path: Path) -> list[GeneratedCaption]:
    columns = (table.select(COLUMNS).to_pydict() for table in read_rows(path))
    return [
        GeneratedCaption(image_id, caption, tokens and tuple(tokens), mean_logprob, finished)
        for group in columns
        for image_id, caption, tokens, mean_logprob, finished in zip(*group.values(), strict=True)
    ]


def _read_records(path: Path) -> list[GeneratedCaption]:
    """Read `image_id`, `caption`; optional, as in rows: `tokens`, `mean_logprob`, `finished`."""
    problems = Problems(path)
    data = read_bytes(path)
    captions: dict[str, GeneratedCaption] = {}
    records = read_records(path, data, problems) if holds_records(data) else ()
    for place, record in records:
        try:
            read = _caption_of(record)
        except (ValueError, TypeError) as error:
            problems.report(place, str(error))
            continue
        if captions.setdefault(read.image_id, read) is not read:
            problems.report(place, f"duplicate caption of {read.image_id}")
    problems.raise_if_any("" if captions else KNOWN_FORMATS)
    if not captions:
        raise InputError(f"{path} has no captions. {KNOWN_FORMATS}")
    return list(captions.values())


def _caption_of(record: Any) -> GeneratedCaption:
    """Return a record's caption; ValueError or TypeError says what is wrong with it."""
    if not isinstance(record, dict):
        raise TypeError(f"{shown(record)} is not an object")
    image_id, caption = name_of(record), first_of(record, "caption", "text")
    if type(image_id) not in (str, int) or image_id == "":
        raise TypeError(f"image_id must be a string or an integer, not {shown(image_id)}")
    if record.get("status") == "failed":
        caption = None
    elif "caption" not in record and "text" not in record:
        raise ValueError("the caption is missing")
    if caption is not None and (reason := caption_problem(caption)):
        raise ValueError(reason)
    tokens, mean_logprob = record.get("tokens"), record.get("mean_logprob")
    return GeneratedCaption(
        str(image_id),
        None if caption is None else clean(caption),
        tuple(map(str, tokens)) if isinstance(tokens, list) else None,
        float(mean_logprob) if isinstance(mean_logprob, int | float) else None,
        record["finished"] if isinstance(record.get("finished"), bool) else None,
        number if type(number := record.get("image_id")) is int else None,
    )
