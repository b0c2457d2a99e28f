"""Writes captions in other programs' formats, each file whole or not at all."""

import csv
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from batchcap.caption_files.annotations import read_annotations
from batchcap.caption_files.matching import (
    LEAST_HASH,
    ImageId,
    coco_number,
    hashed_number,
    match,
    stem,
)
from batchcap.caption_files.predictions import (
    GeneratedCaption,
    check_out,
    holds_rows,
    read_captions,
    read_rows,
)
from batchcap.errors import InputError, UsageError
from batchcap.process.wording import counted, printable
from batchcap.rows.parquet import saying_where
from batchcap.settings import CAPTIONS_THEMSELVES, ExportFormat, ExportSettings
from batchcap.storage.files import replacing

CSV_COLUMNS = [
    *("image_id", "status", "caption", "tokens", "logprob", "mean_logprob", "finished"),
    *("width", "height", "file_size", "sha256", "error_type", "error_message"),
]
FOLDER_COLUMNS = ["image_id", "caption", "mean_logprob"]
FOLDER_METADATA = "metadata.jsonl"
# Texts that spreadsheets take for formulas (OWASP, "CSV Injection"), also after blanks; and texts
# that begin with a quote, so that dropping one quote restores every text.
RISKY = re.compile(r"\s*[=+\-@＝＋－＠]|[\t\r\n']")

NO_CAPTION = "without a caption"
ELSEWHERE = "not in the folder of OUT"
UNNAMEABLE = "whose name is not UTF-8 or has a backslash"


def export_captions(settings: ExportSettings) -> str:
    """Write captions in a format; return a message for the user.

    Raises:
        UsageError: there is no file of captions, the format needs rows, or OUT would overwrite the
            captions.
        InputError: the captions are damaged, or the format can't tell their photos apart.
        OutputError: the folder is missing, read-only or full; an existing OUT is unchanged.
    """
    for out in (settings.out, _mapping_beside(settings.out)):
        check_out(out, settings.captions, settings.references)
    if settings.references == CAPTIONS_THEMSELVES:
        return _write_references(settings)
    return EXPORTERS[settings.format](settings)


def _check_captions(settings: ExportSettings) -> None:
    if not holds_rows(settings.captions):
        raise UsageError(
            f"--format {settings.format} needs the rows of a run, which {settings.captions} "
            "does not have: give an output of batchcap run, or use --format coco or "
            "ai-challenger"
        )


def _write_coco(settings: ExportSettings) -> str:
    """Write COCO results with each photo's `file_name`, which readers of COCO results ignore.

    The ids are those of `settings.references`, or the photos' own, or derived from their names. If
    some are hashes, a mapping file lists them.
    """
    captions = read_captions(settings.captions)
    known = [(caption.image_id, caption.number) for caption in captions]
    left_out: Counter[str] = Counter()
    if settings.references is None:
        numbers: Sequence[int | None]
        numbers, clashing = _coco_numbers(settings.captions, known)
        notes = _clash_note(clashing, "; --references FILE gives the ids of references")
    else:
        numbers, notes = _numbers_of_references(known, settings, settings.references)
        left_out[f"not in {settings.references.name}"] = numbers.count(None)
    numbered = [
        (number, caption)
        for number, caption in zip(numbers, captions, strict=True)
        if number is not None
    ]
    notes += _write_mapping(
        settings.out, [(number, caption.image_id) for number, caption in numbered]
    )
    results = [
        _coco_result(number, caption) for number, caption in numbered if caption.caption is not None
    ]
    left_out[NO_CAPTION] = len(numbered) - len(results)
    with _writing(settings.out) as file:
        _write_array(file, results)
        file.write("\n")
    return _message(settings.out, counted(len(results), "caption"), left_out) + notes


def _coco_result(number: int, caption: GeneratedCaption) -> dict[str, Any]:
    result = {"image_id": number, "caption": caption.caption}
    return result if caption.image_id == str(number) else result | {"file_name": caption.image_id}


def _numbers_of_references(
    known: list[ImageId], settings: ExportSettings, path: Path
) -> tuple[list[int | None], str]:
    """Return the COCO id of each photo in the references, or None, and remarks for the user."""
    images = [(image.image_id, image.number) for image in read_annotations(path)]
    theirs, clashing = _coco_numbers(path, images)
    names = (settings.captions.name, path.name)
    partners = dict(match(known, images, settings.match_by, names).pairs) if known else {}
    numbers = [theirs[partners[i]] if i in partners else None for i in range(len(known))]
    return numbers, _clash_note(clashing)


def _write_mapping(out: Path, images: list[tuple[int, str]]) -> str:
    """Write ids and names beside `out` if an id is a hash; else remove an earlier mapping."""
    mapping = _mapping_beside(out)
    hashed = sum(number >= LEAST_HASH for number, _ in images)
    if not hashed:
        if _is_mapping(mapping):
            mapping.unlink()
        return ""
    with _writing(mapping) as file:
        _write_array(file, (_coco_image(name, number) for number, name in images))
        file.write("\n")
    return f"\n{counted(hashed, 'id')} hashed from names: {mapping} lists all photos' ids"


def _is_mapping(path: Path) -> bool:
    """Whether a file was written by `_write_mapping`."""
    try:
        images = json.loads(path.read_bytes())
        return bool(images) and all(image.keys() == {"id", "file_name"} for image in images)
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _write_references(settings: ExportSettings) -> str:
    """Write references as COCO captions."""
    path = settings.captions
    if holds_rows(path):
        raise UsageError(
            f"--references without a file means that CAPTIONS has references, but {path} is an "
            "output of batchcap run: give a file of references, or omit --references"
        )
    images = read_annotations(path)
    numbers, clashing = _coco_numbers(path, [(image.image_id, image.number) for image in images])
    captions = [
        (number, caption)
        for number, image in zip(numbers, images, strict=True)
        for caption in image.captions
    ]
    info = json.dumps({"description": f"Captions of {path.name}"}, ensure_ascii=False)
    with _writing(settings.out) as file:
        file.write(f'{{"info": {info}, "licenses": [], "type": "captions",\n"images": ')
        _write_array(
            file,
            (
                _coco_image(image.image_id, number, image.split)
                for number, image in zip(numbers, images, strict=True)
            ),
        )
        file.write(',\n"annotations": ')
        _write_array(
            file,
            (
                {"id": i, "image_id": number, "caption": caption}
                for i, (number, caption) in enumerate(captions, start=1)
            ),
        )
        file.write("}\n")
    written = f"{counted(len(captions), 'caption')} of {counted(len(images), 'photo')}"
    notes = _clash_note(clashing)
    if own := sum(image.number not in (None, coco_number(image.image_id)) for image in images):
        notes += f"\n{counted(own, 'photo')} with an id other than the number in the name"
    if notes:
        notes += f"; export captions with --references {path}, so that they get the same ids"
    return _message(settings.out, written) + notes


def _coco_numbers(path: Path, images: Sequence[ImageId]) -> tuple[list[int], int]:
    """Return an id per (image_id, COCO number), and how many photos shared a number."""
    wanted = [coco_number(name) if number is None else number for name, number in images]
    counts = Counter(wanted)
    numbers: dict[int, str] = {}
    for (name, _), number in zip(images, wanted, strict=True):
        unique = number if counts[number] == 1 else hashed_number(name)
        if unique in numbers:
            raise InputError(
                f"{path}: {printable(numbers[unique])} and {printable(name)} get the same COCO id; "
                "rename one of them, or remove one if they are the same"
            )
        numbers[unique] = name
    return list(numbers), sum(count for count in counts.values() if count > 1)


def _clash_note(clashing: int, advice: str = "") -> str:
    if not clashing:
        return ""
    return (
        f"\n{counted(clashing, 'photo')} shared their numbers with others: their ids are hashes of "
        f"their whole names{advice}"
    )


def _coco_image(name: str, number: int, split: str | None = None) -> dict[str, Any]:
    return {"id": number, "file_name": name} | ({} if split is None else {"split": split})


def _mapping_beside(out: Path) -> Path:
    return out.with_name(f"{out.stem}.images.json")


def _write_ai_challenger(settings: ExportSettings) -> str:
    """Write a submission to AI Challenger 2017, whose scorer refuses empty captions."""
    captions = read_captions(settings.captions)
    names: dict[str, str] = {}
    results = []
    for caption in captions:
        if not caption.caption or caption.caption.isspace():
            continue
        name = stem(caption.image_id)
        if name in names:
            raise InputError(
                f"{settings.captions}: {printable(names[name])} and {printable(caption.image_id)} "
                "have the same id in AI Challenger's format, the file name without extension; "
                "rename one of them"
            )
        names[name] = caption.image_id
        results.append({"image_id": name, "caption": caption.caption})
    with _writing(settings.out) as file:
        _write_array(file, results)
        file.write("\n")
    left_out = Counter({NO_CAPTION: len(captions) - len(results)})
    return _message(settings.out, counted(len(results), "caption"), left_out)


def _write_jsonl(settings: ExportSettings) -> str:
    """Write every row and column, one object per line."""
    _check_captions(settings)
    rows, captions = 0, 0
    with _writing(settings.out) as file:
        for table in read_rows(settings.captions):
            file.writelines(_json(_json_value(row)) + "\n" for row in _with_times_as_text(table))
            rows, captions = rows + len(table), captions + table["caption"].drop_null().length()
    return _rows_message(settings.out, rows, captions)


def _with_times_as_text(table: Any) -> Iterator[dict[str, Any]]:
    """Yield rows with ISO 8601 times; for time objects, pyarrow would import pandas."""
    place = table.schema.get_field_index("created_at")
    texts = table["created_at"].cast("string")
    for row in table.set_column(place, "created_at", texts).to_pylist():
        yield row | {"created_at": row["created_at"].replace(" ", "T")}


def _write_csv(settings: ExportSettings) -> str:
    """Write all rows, in columns that fit into cells; spreadsheets need the byte order mark."""
    _check_captions(settings)
    rows, captions = 0, 0
    with _writing(settings.out, "utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for table in read_rows(settings.captions):
            columns = table.select(CSV_COLUMNS).to_pydict()
            writer.writerows(map(_cell, row) for row in zip(*columns.values(), strict=True))
            rows, captions = rows + len(table), captions + table["caption"].drop_null().length()
    return _rows_message(settings.out, rows, captions)


def _write_imagefolder(settings: ExportSettings) -> str:
    """Write the file that makes a directory of photos a data set of Hugging Face `datasets`."""
    out = settings.out
    if out.name != FOLDER_METADATA:
        raise UsageError(
            f"--format imagefolder writes {FOLDER_METADATA}, the only file name that works, "
            f"into INPUT of the run, beside the photos; OUT is {out.name}"
        )
    _check_captions(settings)
    left_out: Counter[str] = Counter()
    written = 0
    with _writing(out) as file:
        for table in read_rows(settings.captions):
            columns = table.select(FOLDER_COLUMNS).to_pydict()
            for image_id, caption, mean_logprob in zip(*columns.values(), strict=True):
                name = _name_below(out.parent, image_id)
                reason = NO_CAPTION if caption is None else _reason_against(out.parent, name)
                if reason is not None:
                    left_out[reason] += 1
                    continue
                row = {"file_name": name, "text": caption, "mean_logprob": mean_logprob}
                file.write(_json(_json_value(row)) + "\n")
                written += 1
        if left_out[ELSEWHERE] and not written:
            raise UsageError(
                f"no photo of {settings.captions} is in {out.parent}: put {FOLDER_METADATA} into "
                "INPUT of the run, beside the photos"
            )
    return _message(out, counted(written, "caption"), left_out)


def _name_below(folder: Path, image_id: str) -> str | None:
    r"""Return a photo's path relative to the directory that was listed; None if it is not UTF-8.

    A name with `\` is None as well: `datasets` takes it for a `/`.
    """
    if "\\" in image_id:  # in an id, a backslash or a byte that is not UTF-8
        return None
    if image_id.startswith("/") or ".." in image_id:  # the line of a list
        return os.path.relpath(folder.absolute() / image_id, folder.absolute())
    return image_id


def _reason_against(folder: Path, name: str | None) -> str | None:
    """Return why `datasets` would not load a photo, or None."""
    if name is None:
        return UNNAMEABLE
    is_there = not name.startswith("../") and os.path.exists(f"{folder}/{name}")  # noqa: PTH110
    return None if is_there else ELSEWHERE


@contextmanager
def _writing(path: Path, encoding: str = "utf-8") -> Iterator[TextIO]:
    # Lone surrogates of names are written as JSON's escapes, so that they are read back.
    with (
        saying_where(path),
        replacing(path) as temporary,
        temporary.open("w", encoding=encoding, errors="backslashreplace", newline="") as file,
    ):
        yield file


def _write_array(file: TextIO, records: Iterable[dict[str, Any]]) -> None:
    """Write a JSON array with one record per line."""
    file.write("[")
    for i, record in enumerate(records):
        file.write((",\n" if i else "\n") + _json(record))
    file.write("\n]")


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _json_value(value: Any) -> Any:
    """Return a row's value in JSON's types."""
    if isinstance(value, float):
        return _shortest(value)
    if isinstance(value, dict):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    return value


def _cell(value: Any) -> Any:
    """Return a value as a cell that no spreadsheet takes for a formula."""
    if isinstance(value, float):
        return _shortest(value)
    text = " ".join(value) if isinstance(value, list) else value
    return f"'{text}" if isinstance(text, str) and RISKY.match(text) else text


def _shortest(value: float) -> float | None:
    """Return a float32 with as few digits as distinguish it; JSON has no infinities and no NaN."""
    return float(str(np.float32(value))) if math.isfinite(value) else None


def _message(out: Path, written: str, left_out: Counter[str] | None = None) -> str:
    reasons = [f"{count} {reason}" for reason, count in (left_out or {}).items() if count]
    return f"wrote {out}: {written}" + (f"; left out {', '.join(reasons)}" if reasons else "")


def _rows_message(out: Path, rows: int, captions: int) -> str:
    return _message(out, f"{counted(rows, 'row')}, {counted(captions, 'caption')}")


EXPORTERS: dict[ExportFormat, Callable[[ExportSettings], str]] = {
    ExportFormat.COCO: _write_coco,
    ExportFormat.AI_CHALLENGER: _write_ai_challenger,
    ExportFormat.JSONL: _write_jsonl,
    ExportFormat.CSV: _write_csv,
    ExportFormat.IMAGEFOLDER: _write_imagefolder,
}
