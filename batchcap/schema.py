"""The row, its Parquet schema, and the types that photos and rows share."""

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

SCHEMA_VERSION = 2
READABLE_SCHEMAS = {"1", str(SCHEMA_VERSION)}  # read as the newest

ATTENTION_TYPE = pa.struct(
    [
        ("row", pa.float32()),
        ("col", pa.float32()),
        ("peak_row", pa.int8()),
        ("peak_col", pa.int8()),
        ("peak", pa.float32()),
        ("entropy", pa.float32()),
    ]
)

SINCE_SCHEMA_2 = (
    pa.field("caption_source", pa.string()),
    pa.field("edited_at", pa.timestamp("us", tz="UTC")),
    pa.field("familiarity", pa.float32()),
)

ARROW_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        ("caption", pa.string()),
        ("tokens", pa.list_(pa.string())),
        ("token_ids", pa.list_(pa.int32())),
        ("token_logprobs", pa.list_(pa.float32())),
        ("logprob", pa.float32()),
        ("mean_logprob", pa.float32()),
        ("finished", pa.bool_()),
        ("attention", pa.list_(ATTENTION_TYPE)),
        ("attention_map", pa.list_(pa.list_(pa.float32()))),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("file_size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("sha256", pa.string()),
        ("error_type", pa.string()),
        ("error_message", pa.string()),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("created_at", pa.timestamp("us", tz="UTC"), nullable=False),
        *SINCE_SCHEMA_2,
    ]
)


class CaptionSource(StrEnum):
    """Who wrote a caption: the values of the column `caption_source`."""

    MODEL = "model"
    HUMAN = "human"


class ErrorType(StrEnum):
    """Why a photo has no caption, or only part was captioned: values of the column `error_type`."""

    MISSING = "missing"
    NOT_A_FILE = "not_a_file"
    UNREADABLE = "unreadable"
    EMPTY = "empty"
    UNSUPPORTED_FORMAT = "unsupported_format"
    TOO_LARGE = "too_large"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    CHANGED = "changed"
    QUARANTINED = "quarantined"


@dataclass(frozen=True)
class Rejection:
    """The failure of one photo: a value that becomes a row, never an exception."""

    error_type: ErrorType
    message: str


def int64_or_none(value: float | None) -> int | None:
    """Return the value as an int64; None if it does not fit or is not finite."""
    return int(value) if value is not None and -(2**63) <= value < 2**63 else None


def sha256_of(data: bytes) -> str:
    """Return the SHA-256 in hex, as in the column `sha256`."""
    return hashlib.sha256(data).hexdigest()


class ImageRef(NamedTuple):
    """One photo, from the listing to its row: its id, and where its bytes are.

    image_id: empty for a photo that gets no row.
    path: where the photo is, a path (surrogateescape str) or a URL; for a photo of an archive, the
        archive and the name in it.
    size, mtime_ns: from a store's listing or an archive; None if unknown.
    data: the bytes of a photo of an archive, or why there are none.
    """

    image_id: str
    path: str
    size: int | None = None
    mtime_ns: int | None = None
    data: bytes | Rejection | None = None

    @property
    def sha256(self) -> str | None:
        """The SHA-256 of `data`; None without bytes."""
        return sha256_of(self.data) if isinstance(self.data, bytes) else None


@dataclass(frozen=True)
class LoadedImage:
    """One file, read once: its properties, and its pixels or why it has none.

    `pixels` is `uint8[S, S, 3]`, RGB. The other fields are None if the file could not be read that
    far; `width` and `height` are in pixels, after EXIF rotation. `note` says what is wrong with an
    accepted file.
    """

    pixels: npt.NDArray[np.uint8] | Rejection
    file_size: int | None = None
    mtime_ns: int | None = None
    sha256: str | None = None
    width: int | None = None
    height: int | None = None
    note: Rejection | None = None
