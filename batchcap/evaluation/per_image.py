"""Scores per image on disk: written by `evaluate --per-image`, shown by `report`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchcap.errors import InputError
from batchcap.process.wording import saying_which
from batchcap.rows.parquet import saying_where
from batchcap.storage.files import replacing

SIGNATURE, SCORES = "batchcap.signature", "batchcap.scores"
METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d", "meteor")

# Scores are times 100; METEOR is null if it was not requested.
SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        ("caption", pa.string()),
        ("words", pa.list_(pa.string())),
        ("references", pa.list_(pa.string())),
        ("mean_logprob", pa.float32()),
        *((metric, pa.float64()) for metric in METRICS),
    ]
)


def write_evaluation(
    path: Path, columns: Mapping[str, Any], signature: str, scores: Mapping[str, float]
) -> None:
    """Write the columns of `SCHEMA`, with the signature and the overall scores.

    A missing column is null.

    Raises:
        OutputError: the folder is missing, read-only or full; an older file is unchanged.
    """
    metadata = {SIGNATURE: signature, SCORES: json.dumps(dict(scores))}
    rows = len(columns["image_id"])
    arrays = [columns.get(field.name, [None] * rows) for field in SCHEMA]
    table = pa.table(
        [pa.array(array, field.type) for array, field in zip(arrays, SCHEMA, strict=True)],
        SCHEMA.with_metadata(metadata),
    )
    with saying_where(path), replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def read_evaluation(path: Path) -> tuple[list[dict[str, Any]], str, dict[str, float]]:
    """Return rows of `SCHEMA`, the signature, and the overall scores.

    Raises:
        UsageError: there is no such file.
        InputError: it is damaged, or not a file of `evaluate --per-image`.
    """
    try:
        with saying_which(path), path.open("rb") as file:
            table = pq.read_table(file, page_checksum_verification=True)
        if not table.schema.equals(SCHEMA):
            raise ValueError("its columns differ")
        metadata = table.schema.metadata
        return (
            table.to_pylist(),
            metadata[SIGNATURE.encode()].decode(),
            json.loads(metadata[SCORES.encode()]),
        )
    except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a file of `batchcap evaluate --per-image` ({error}): create it again"
        ) from error
