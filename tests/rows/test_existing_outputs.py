"""Outputs of other runs, versions, links and users: resumed, replaced or refused."""

import os
import stat
import subprocess
from contextlib import suppress

import pyarrow.parquet as pq
import pytest
from helpers.outputs import (
    ERROR,
    OVERWRITE,
    Disk,
    Killed,
    ids_of,
    names_in,
    opened,
    rows_of,
    run,
    stop_before_the_end,
)
from helpers.rows import METADATA, captioned_row, failed_row, sum_of

from batchcap.captioning.summary import read_rate
from batchcap.errors import LockedError, OtherOutputError, OutputError, UsageError
from batchcap.rows.layout import Layout, layout_of
from batchcap.rows.parquet import table_of, write_rows
from batchcap.rows.writer import RowFile, is_whole
from batchcap.settings import OnExisting


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batchcap.model", "def", "another model (abc) than this run's (def)"),
        ("batchcap.precision", "float16", "another precision (float32)"),
        ("batchcap.attention", "full", "another attention (summary)"),
        ("batchcap.schema", "3", "another schema (2) than this run's (3)"),
        (
            "batchcap.decode",
            '{"max_length": 9, "beam_size": 1}',
            "another decoding (max_length 20) than this run's (max_length 9)",
        ),
        (
            "batchcap.decode",
            '{"max_length": 20}',
            "another decoding (beam_size 1) than this run's (beam_size None)",
        ),
    ],
)
def test_rows_of_other_settings_are_refused_and_kept(layout, key, value, message):
    run(layout, [captioned_row(1)])
    with pytest.raises(OtherOutputError) as refusal, opened(layout, **{key: value}):
        pass
    assert refusal.value.exit_code == 4
    assert str(layout.output) in str(refusal.value)
    assert message in str(refusal.value)
    assert ids_of(layout) == ["1"]
    run(layout, [captioned_row(2)])  # the lock was released


def test_another_version_may_resume(layout):
    run(layout, [captioned_row(1)])
    with opened(layout, **{"batchcap.version": "9"}) as captions:
        assert len(captions.index) == 1


def test_existing_output_can_be_refused(layout):
    run(layout, [captioned_row(1)], on_existing=ERROR)
    with pytest.raises(OutputError, match="exists"), opened(layout, ERROR):
        pass
    assert ids_of(layout) == ["1"]


def test_overwrite_replaces_rows_even_of_another_model(layout):
    stop_before_the_end(layout, [captioned_row(1)], [captioned_row(2)])
    with opened(layout, OVERWRITE, **{"batchcap.model": "def"}) as captions:
        assert len(captions.index) == 0
        assert ids_of(layout) == ["1", "2"]  # until new rows are committed
        captions.append([captioned_row(3)])
        captions.finish()
    assert ids_of(layout) == ["3"]
    assert pq.read_schema(layout.row_files()[0]).metadata[b"batchcap.model"] == b"def"


def test_overwrite_with_no_rows_removes_old_rows(layout):
    """With nothing to caption, a file kept its old rows, but a folder did not."""
    run(layout, [captioned_row(1)])
    run(layout, on_existing=OVERWRITE)
    assert rows_of(layout) == []


def test_other_peoples_folders_are_left_alone(folder):
    folder.output.mkdir()
    (folder.output / "holiday.jpg").touch()
    with pytest.raises(OutputError, match=r"has other files, such as holiday.jpg"):
        run(folder, [captioned_row(1)])
    assert names_in(folder.output) == {"holiday.jpg"}


@pytest.mark.parametrize("on_existing", list(OnExisting))
def test_directory_named_like_a_file_is_refused(file, on_existing):
    file.output.mkdir()
    with pytest.raises(OutputError, match="is a directory"):
        run(file, [captioned_row(1)], on_existing=on_existing)


def test_files_named_almost_like_parts_are_not_parts(folder):
    """A copy of a part, as named by file managers, ended runs with a ValueError."""
    run(folder, [captioned_row(1)])
    copy = folder.output / "part-000001 (copy).parquet"
    copy.write_bytes((folder.output / "part-000001.parquet").read_bytes())
    run(folder, [captioned_row(2)])
    run(folder, [captioned_row(3)], on_existing=OVERWRITE)
    assert ids_of(folder) == ["3"]
    assert copy.exists()


def test_leftovers_of_killed_runs_are_removed_and_other_files_kept(file, tmp_path):
    ours = [".out.parquet.0123abcd.tmp", ".out.summary.json.0123abcd.tmp"]
    others = [
        ".out.parquet.old.parquet.0123abcd.tmp",
        ".out.parquet2.0123abcd.tmp",
        ".shout.parquet.0123abcd.tmp",
        ".out.parquet.0123abcd.tmp.jpg",
        "out.parquet.0123abcd.tmp",
    ]
    for name in ours + others:
        (tmp_path / name).touch()
    for leftover in ("new", "old"):
        (tmp_path / f".out.parquet.parts.{leftover}").mkdir()
        (tmp_path / f".out.parquet.parts.{leftover}" / "part-000001.parquet").touch()
    run(file, [captioned_row(1)])
    assert names_in(tmp_path) == {"out.parquet", *others}


def test_leftovers_of_a_folder_are_removed_even_with_old_names(folder, tmp_path):
    run(folder, [captioned_row(1)])
    before = names_in(folder.output), names_in(tmp_path)
    for name in ("part-000002.parquet", "_manifest.json", "_summary.json"):
        (folder.output / f".{name}.0123abcd.tmp").touch()
    for name in ("part-000002.parquet", "manifest.json", "summary.json"):
        (tmp_path / f"..out.{name}.0123abcd.tmp").touch()
    run(folder)
    assert (names_in(folder.output), names_in(tmp_path)) == before


def test_leftovers_of_an_output_with_glob_characters_in_its_name(tmp_path):
    (tmp_path / ".a[b]*.parquet.0123abcd.tmp").touch()
    (tmp_path / ".ab.parquet.0123abcd.tmp").touch()
    run(Layout(tmp_path / "a[b]*.parquet"))
    assert names_in(tmp_path) == {"a[b]*.parquet", ".ab.parquet.0123abcd.tmp"}


def as_earlier_versions_left_it(folder: Layout) -> dict[str, bytes]:
    """Make a data set with all files in its folder; return the files that are not parts."""
    folder.output.parent.mkdir(exist_ok=True)
    run(folder, [captioned_row(1)])
    for mark in folder.marks():
        mark.unlink()
    folder.manifest.rename(folder.output / "_manifest.json")
    (folder.output / "_summary.json").write_text('{"images_per_second": 5}')
    (folder.output / ".part-000002.parquet.17.damaged").write_text("damaged")
    return {
        f".out{new}": (folder.output / old).read_bytes()
        for old, new in (
            ("_manifest.json", ".manifest.json"),
            ("_summary.json", ".summary.json"),
            (".part-000002.parquet.17.damaged", ".part-000002.parquet.17.damaged"),
        )
    }


@pytest.mark.parametrize("killed", [False, True])
def test_old_files_move_out_of_a_folder_even_after_a_failure_at_any_step(killed, tmp_path):
    disk = Disk()
    try:
        for number in range(100):
            folder = Layout(tmp_path / str(number) / "out")
            before = as_earlier_versions_left_it(folder)
            files = [RowFile(path, 1) for path in folder.row_files()]
            assert is_whole(folder, files)
            assert read_rate(folder.summary) == 5
            disk.countdown, disk.killed = number, killed
            with suppress(OutputError, Killed):
                run(folder)
            undisturbed = disk.countdown is not None
            disk.countdown, disk.dead = None, False
            assert read_rate(folder.summary) == 5
            run(folder)
            assert is_whole(folder, files)
            assert names_in(folder.output) == {
                "part-000001.parquet",
                *(m.name for m in folder.marks()),
            }
            after = {path.name: path.read_bytes() for path in folder.output.parent.glob(".*")}
            assert after == before
            if undisturbed:
                assert number > 5
                return
    finally:
        disk.close()
    pytest.fail("the changes never end")


def test_all_files_stay_inside_a_mount_point(folder):
    """Renames cannot cross its border."""
    folder.output.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder.output)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("cannot mount a file system")
    try:
        run(folder, [captioned_row(1)])
        assert folder.summary == folder.output / "_summary.json"
        part = folder.output / "part-000002.parquet"
        assert folder.staged(part) == part
        names = {"part-000001.parquet", "_manifest.json", *(mark.name for mark in folder.marks())}
        assert names_in(folder.output) == names
        assert names_in(folder.output.parent) == {"out"}
        run(folder, [captioned_row(2)])
        assert ids_of(folder) == ["1", "2"]
    finally:
        subprocess.run(["umount", "--lazy", str(folder.output)], check=True)


def test_follows_a_symlinked_output(layout, tmp_path):
    """All files are beside the link's target, even if the run was given the link."""
    (tmp_path / "far").mkdir()
    layout.output.symlink_to(f"far/{layout.output.name}")  # dangling
    target = Layout(tmp_path / "far" / layout.output.name)
    run(layout_of(layout.output), [captioned_row(1)])
    assert ids_of(target) == ["1"]
    stop_before_the_end(layout_of(layout.output), [captioned_row(2)])
    with opened(layout_of(layout.output)) as captions:
        assert len(captions.index) == 2
        with pytest.raises(LockedError), opened(target):
            pass
        captions.append([captioned_row(3)])
        captions.finish()
    assert ids_of(target) == ["1", "2", "3"]
    assert layout.output.is_symlink()
    assert names_in(tmp_path) == {"far", layout.output.name}
    assert layout_of(layout.output).summary.parent.samefile(tmp_path / "far")


def test_refuses_links_that_lead_nowhere(layout, tmp_path):
    layout.output.symlink_to(f"none/{layout.output.name}")
    with pytest.raises(OutputError, match=r"cannot write .*none/out.*: "):
        run(layout_of(layout.output))
    layout.output.unlink()
    layout.output.symlink_to(layout.output)
    with pytest.raises(OutputError, match="symbolic links"):
        layout_of(layout.output)
    layout.output.unlink()
    layout.output.symlink_to("out2" if layout.is_file else "out2.parquet")
    with pytest.raises(UsageError, match="both must end in"):
        layout_of(layout.output)
    assert names_in(tmp_path) == {layout.output.name}


@pytest.mark.parametrize("has_links", [True, False])
def test_rows_of_a_private_output_stay_private(layout, has_links, monkeypatch):
    def refuse(*_paths: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    run(layout, [captioned_row(1)])
    for path in layout.row_files():
        path.chmod(0o600)
    for number in (2, 3):
        with opened(layout) as captions:
            captions.append([captioned_row(number), captioned_row(1, number)])
            captions.commit()
            assert modes_of(layout) == {0o600}
            captions.finish()
        assert modes_of(layout) == {0o600}
    for path in layout.row_files():
        path.write_bytes(path.read_bytes()[:-20])
    run(layout, [captioned_row(1)])
    assert modes_of(layout) == {0o600}
    run(layout, [captioned_row(1)], on_existing=OVERWRITE)
    assert modes_of(layout) == {0o600}


def modes_of(layout: Layout) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in layout.row_files()}


def test_refuses_an_output_that_cannot_be_replaced_before_any_work(file):
    os.mkfifo(file.output)
    with pytest.raises(OutputError, match="not a regular file"), opened(file):
        pass
    assert file.output.is_fifo()


def test_second_writer_is_refused(layout):
    with opened(layout), pytest.raises(LockedError), opened(layout):
        pass


def test_captions_are_found_by_sha256(layout):
    cut = captioned_row("cut", "cut", error_type="truncated")
    run(layout, [captioned_row(1, "dog"), cut], [failed_row(2, sha256=sum_of("cat"))])
    with opened(layout) as captions:
        for rewritten in (False, True):
            found = captions.reusable(sum_of("dog"))
            assert found is not None
            assert found["caption"] == "一只dog"
            assert found["attention"] == captioned_row(1)["attention"]
            assert not found.keys() & {"image_id", "status", "sha256", "width", "run_id"}
            for content in ("cut", "cat", "bird"):
                assert captions.reusable(sum_of(content)) is None
            if not rewritten:
                captions.append([captioned_row("cut", "other")])
                captions.commit()
                captions.drop_superseded()
                captions._captions.cache_clear()
        captions.append([captioned_row(9, **captions.reusable(sum_of("dog")))])
        captions.finish()


def test_captions_are_found_in_each_row_group_of_a_rewritten_file(folder):
    tables = [table_of([captioned_row(n, n)]) for n in range(3)]
    folder.output.mkdir()
    write_rows(folder.output / "part-000001.parquet", tables, METADATA)
    with opened(folder) as captions:
        captions.append([captioned_row(0, "new"), captioned_row(1, "new")])
        captions.commit()
        captions.drop_superseded()
        assert captions.reusable(sum_of(2))["caption"] == "一只2"


def test_captions_of_a_file_that_was_damaged_meanwhile_are_not_reused(folder):
    """The damage ended the run, although the model could caption the photo."""
    run(folder, [captioned_row(1, "dog")])
    with opened(folder) as captions:
        part = folder.output / "part-000001.parquet"
        part.write_bytes(part.read_bytes()[:-20])
        assert captions.reusable(sum_of("dog")) is None
