"""Damaged parts are set aside and redone; a lack of memory is not damage."""

import errno
import json
import logging
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.outputs import (
    OVERWRITE,
    RESUME,
    ids_of,
    names_in,
    opened,
    rows_of,
    run,
    stop_before_the_end,
)
from helpers.rows import METADATA, captioned_row, failed_row

from batchcap.captioning.summary import RunSummary, read_rate, write_summary
from batchcap.errors import OutputError
from batchcap.rows.layout import Layout
from batchcap.rows.parquet import table_of, write_rows
from batchcap.rows.writer import RowFile, is_whole

DAMAGES = 200


SHORT_OF = [
    pa.lib.ArrowMemoryError("malloc of size 4096 failed"),
    pa.lib.ArrowException("Failed to launch worker thread: Resource temporarily unavailable"),
    OSError("ZSTD decompression failed: Allocation error : not enough memory"),
    OSError("ZSTD_DCtx create failed"),
    OSError(errno.EMFILE, "Too many open files"),
    MemoryError(),
]


@pytest.mark.parametrize("shortage", SHORT_OF, ids=lambda error: type(error).__name__)
def test_lack_of_memory_or_threads_is_not_damage(layout, monkeypatch, tmp_path, shortage):
    """A good output was set aside, and all its photos were captioned again."""
    run(layout, [captioned_row(1)])
    before = names_in(tmp_path)

    def fail(*_arguments: object, **_options: object) -> None:
        raise shortage

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fail)
    with pytest.raises(OutputError, match=r"cannot read .*part|cannot read .*out"), opened(layout):
        pass
    monkeypatch.undo()
    assert names_in(tmp_path) == before
    assert ids_of(layout) == ["1"]


LIMITED = """
import json, resource, sys
from pathlib import Path
from batchcap.errors import OutputError
from batchcap.rows.layout import Layout
from batchcap.rows.writer import open_captions
from batchcap.settings import OnExisting

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]) * 2**20,) * 2)
try:
    with open_captions(Layout(Path(sys.argv[1])), json.loads(sys.argv[3]), OnExisting.RESUME):
        pass
except OutputError as error:
    print(error)
"""


@pytest.mark.parametrize("free_mib", [4, 32, 120])
def test_lack_of_memory_leaves_the_output_untouched(file, free_mib, tmp_path):
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    tables = [
        table_of([captioned_row(f"{group}/{n}", n) for n in range(1024)]) for group in range(8)
    ]
    write_rows(file.output, tables, METADATA)
    before = file.output.read_bytes()
    command = [sys.executable, "-c", LIMITED, file.output, str(free_mib), json.dumps(METADATA)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.stdout or "lacks memory or threads" in done.stdout
    assert file.output.read_bytes() == before
    assert not [*tmp_path.glob(".*damaged")]


def test_impossible_size_is_damage(folder, monkeypatch):
    run(folder, [captioned_row(1)])

    def fail(*_arguments: object, **_options: object) -> None:
        raise pa.lib.ArrowMemoryError(f"malloc of size {2**60} failed")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fail)
    with opened(folder) as captions:
        assert len(captions.index) == 0


@pytest.mark.parametrize("name", ["caf\udce9.parquet", "caf\udce9"])
def test_paths_need_not_be_utf_8(tmp_path, name):
    """All photos were captioned, but none was committed."""
    layout = Layout(tmp_path / "fol\udce9der" / name)
    layout.output.parent.mkdir()
    run(layout, [captioned_row(1)])
    run(layout, [captioned_row(1, "new"), captioned_row(2)])
    assert sorted(ids_of(layout)) == ["1", "2"]
    write_summary(layout.summary, RunSummary(str(layout), "r", ""))
    assert read_rate(layout.summary) is None


def test_prune_drops_rows_of_vanished_images(layout):
    run(layout, [captioned_row(1), captioned_row(2)], [captioned_row(3)])
    with opened(layout) as captions:
        captions.append([captioned_row(4)])
        for image_id in ("1", "3"):
            captions.index.mark_seen(captions.index.find(image_id))
        assert captions.prune() == 1
        captions.finish()
    assert sorted(ids_of(layout)) == ["1", "3", "4"]
    with opened(layout) as captions:
        assert captions.index.vanished == 3
        assert captions.prune({"1", "3"}.__contains__) == 1  # rows of excluded images are kept
        captions.finish()
    assert sorted(ids_of(layout)) == ["1", "3"]


def test_manifest_lists_parts_and_rows(folder):
    stop_before_the_end(folder, [captioned_row(1), failed_row(2)], [captioned_row(3)])
    manifest = folder.manifest
    assert json.loads(manifest.read_text()) == {
        "complete": False,
        "metadata": METADATA,
        "rows": 3,
        "parts": [
            {"name": "part-000001.parquet", "rows": 2},
            {"name": "part-000002.parquet", "rows": 1},
        ],
    }
    run(folder, [captioned_row(1, "new")])
    assert json.loads(manifest.read_text()) == {
        "complete": True,
        "metadata": METADATA,
        "rows": 3,
        "parts": [
            {"name": "part-000001.parquet", "rows": 1},
            {"name": "part-000002.parquet", "rows": 1},
            {"name": "part-000003.parquet", "rows": 1},
        ],
    }


@pytest.mark.parametrize("on_existing", [RESUME, OVERWRITE])
def test_manifest_is_incomplete_during_a_run(folder, monkeypatch, on_existing):
    """A run killed before its first commit left a `complete` manifest of removed rows and parts."""
    run(folder, [captioned_row(1, "old")])
    fail_at(monkeypatch, lambda path: path.name == "part-000002.parquet" or path.stem[-1] == "1")
    with suppress(OutputError):
        run(folder, [captioned_row(1, "new")], on_existing=on_existing)
    assert json.loads(folder.manifest.read_text())["complete"] is False


def fail_at(monkeypatch: pytest.MonkeyPatch, is_refused: Callable[[Path], bool]) -> None:
    """Make the disk refuse these renames."""
    replace = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if is_refused(Path(target)):
            raise OSError(5, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)


def test_damaged_parts_are_set_aside_and_redone(folder, caplog):
    run(folder, [captioned_row(1)], [captioned_row(2)])
    part = folder.output / "part-000001.parquet"
    damaged = part.read_bytes()[:-20]
    part.write_bytes(damaged)
    with caplog.at_level(logging.WARNING), opened(folder) as captions:
        assert captions.index.find("1") is None
        assert captions.index.find("2") is not None
        captions.append([captioned_row(1)])
        captions.finish()
    assert sorted(ids_of(folder)) == ["1", "2"]
    (aside,) = folder.output.parent.glob(".out.part-000001.parquet.*.damaged")
    assert aside.read_bytes() == damaged
    (message,) = caplog.messages
    assert str(part) in message
    assert message.endswith(f"kept as {aside}; captioning its photos again")


def test_damaged_file_is_set_aside_and_redone(file, tmp_path):
    run(file, [captioned_row(1)])
    file.output.write_bytes(file.output.read_bytes()[:-20])
    run(file, [captioned_row(1)])
    assert ids_of(file) == ["1"]
    assert len(names_in(tmp_path)) == 2


def test_damaged_manifest_or_mark_misleads_no_run(folder, tmp_path):
    """They are derived from the parts, and never read instead of them."""
    run(folder, [captioned_row(1)], [captioned_row(2)])
    rng = random.Random(1)
    rows, manifest = rows_of(folder), folder.manifest.read_bytes()
    for number in range(DAMAGES):
        damaged = bytearray(manifest)
        if number % 2:
            damaged[rng.randrange(len(manifest))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(manifest)) :]
        folder.manifest.write_bytes(damaged)
        if number % 3 == 0:
            for mark in folder.marks():
                mark.rename(mark.with_name(f"{mark.name[:-1]}x"))
        with opened(folder) as captions:
            assert len(captions.index) == 2
            captions.finish()
        assert rows_of(folder) == rows
        assert is_whole(folder, [RowFile(path, 1) for path in folder.row_files()])
        assert number % 3 or folder.manifest.read_bytes() == manifest


def test_damage_during_a_run_ends_it_with_advice(folder):
    run(folder, [captioned_row(1)])
    with opened(folder) as captions:
        (folder.output / "part-000001.parquet").write_bytes(b"PAR1")
        captions.append([captioned_row(1, "new")])
        captions.commit()
        with pytest.raises(OutputError, match="run again to redo the rows"):
            captions.drop_superseded()
    run(folder, [captioned_row(1, "new")])
    assert rows_of(folder) == [captioned_row(1, "new")]
