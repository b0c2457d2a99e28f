"""Rows for tests, as a run would make them."""

from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from batchcap.rows.parquet import Row
from batchcap.schema import ARROW_SCHEMA

METADATA = {
    "batchcap.schema": "2",
    "batchcap.version": "1.2",
    "batchcap.model": "abc",
    "batchcap.decode": '{"max_length": 20, "beam_size": 1}',
    "batchcap.precision": "float32",
    "batchcap.attention": "summary",
}
NOW = datetime(2024, 5, 17, 12, 30, tzinfo=UTC)
LOOK = {"row": 1.5, "col": 0.5, "peak_row": 2, "peak_col": 0, "peak": 0.25, "entropy": 3.5}


def sum_of(content: object) -> str:
    return sha256(str(content).encode()).hexdigest()


def failed_row(image_id: object = 0, **columns: Any) -> Row:
    """The row of a failed photo; columns that are not given are null."""
    filled = {"image_id": f"{image_id}", "status": "failed", "run_id": "r", "created_at": NOW}
    return dict.fromkeys(ARROW_SCHEMA.names) | filled | {"error_type": "corrupt"} | columns


def captioned_row(image_id: object = 0, content: object = "photo", **columns: Any) -> Row:
    """A row whose caption contains the content of its file."""
    return (
        failed_row(image_id)
        | {
            "status": "ok",
            "caption": f"一只{content}",
            "tokens": ["一只", str(content)],
            "token_ids": [7, 9],
            "token_logprobs": [-0.5, -0.25, -0.125],
            "logprob": -0.875,
            "mean_logprob": -0.25,
            "finished": True,
            "attention": [LOOK, LOOK],
            "attention_map": [[0.25, 0.75], [0.5, 0.5]],
            "width": 640,
            "height": 480,
            "file_size": 2**40,
            "mtime_ns": 2**60,
            "sha256": sum_of(content),
            "error_type": None,
            "caption_source": "model",
        }
        | columns
    )
