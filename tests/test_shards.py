"""Tars and Parquet files as lists of photos: ids, order, and what is wrong with them."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from shard_files import MTIME, write_parquet, write_tar

from batchcap import inputs, shards
from batchcap.contracts import ErrorType, ImageRef, Rejection, UsageError
from batchcap.shards import Columns, shards_of


def listed(
    source: object, pattern: str | None = None, columns: Columns = shards.USUAL_COLUMNS
) -> tuple[list[ImageRef], list[tuple[str, str]]]:
    """The photos, and what was told of shards that can't be read."""
    told: list[tuple[str, str]] = []
    refs = inputs.list_images(str(source), pattern, lambda *one: told.append(one), columns)
    return list(refs), told


def names(refs: list[ImageRef]) -> list[str]:
    return [ref.image_id for ref in refs]


def reasons(refs: list[ImageRef]) -> list[ErrorType]:
    return [ref.data.error_type for ref in refs if isinstance(ref.data, Rejection)]


# names of shards


def test_numbers_in_braces_stand_for_so_many_shards():
    assert shards_of("a-{008..011}.tar") == [f"a-{n:03}.tar" for n in range(8, 12)]
    assert shards_of("{0..1}/{1..2}.tar") == ["0/1.tar", "0/2.tar", "1/1.tar", "1/2.tar"]
    assert shards_of("s3://b/a-{9..10}.tar") == ["s3://b/a-10.tar", "s3://b/a-9.tar"]


def test_globs_come_sorted_and_those_without_shards_are_wrong_usage(tmp_path):
    for name in "cab":
        (tmp_path / f"{name}.tar").touch()
    assert [Path(shard).name for shard in shards_of(f"{tmp_path}/*.tar")] == [
        "a.tar",
        "b.tar",
        "c.tar",
    ]
    with pytest.raises(UsageError, match="check the path"):
        shards_of(f"{tmp_path}/*.parquet")


def test_a_shard_that_has_braces_in_its_name_is_one(tmp_path):
    (tmp_path / "a{0..9}.tar").touch()
    assert shards_of(f"{tmp_path}/a{{0..9}}.tar") == [f"{tmp_path}/a{{0..9}}.tar"]


# tars


def test_members_are_photos_whose_ids_are_their_paths(tmp_path):
    tar = write_tar(tmp_path / "x.tar", [("./b/2.jpg", b"two"), ("a//1.PNG", b"one")])
    refs, told = listed(tar)
    assert refs == [
        ImageRef("b/2.jpg", f"{tar}: b/2.jpg", 3, MTIME * 10**9, b"two"),
        ImageRef("a/1.PNG", f"{tar}: a/1.PNG", 3, MTIME * 10**9, b"one"),
    ]
    assert told == []
    assert listed(f"file://{tar}")[0] == refs


def test_captions_labels_and_hidden_files_beside_photos_are_left_out(tmp_path):
    members = [(name, b"x") for name in ("1.txt", "1.json", "1.jpg", "._1.jpg", ".x/2.jpg", "1")]
    assert names(listed(write_tar(tmp_path / "x.tar", members))[0]) == ["1.jpg"]
    assert names(listed(tmp_path / "x.tar", "*.json")[0]) == ["1.json"]


@pytest.mark.parametrize(("name", "mode"), [("x.tar.gz", "w:gz"), ("x.tgz", "w:gz")])
def test_compressed_tars_are_read_too(tmp_path, name, mode):
    tar = write_tar(tmp_path / name, [("1.jpg", b"one"), ("2.jpg", b"two")], mode)
    refs, told = listed(tar)
    assert [ref.data for ref in refs] == [b"one", b"two"]
    assert told == []


def test_names_that_are_not_utf8_or_very_long_are_ids_all_the_same(tmp_path):
    raw, long = b"\xff.jpg".decode("utf-8", "surrogateescape"), f"{'照' * 100}/{'片' * 100}.jpg"
    tar = write_tar(tmp_path / "x.tar", [(raw, b"x"), (long, b"x")])
    assert names(listed(tar)[0]) == [r"\xff.jpg", long]


def test_shards_follow_each_other(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", [(f"{shard}.jpg", b"x")])
    assert names(listed(f"{tmp_path}/{{0..2}}.tar")[0]) == ["0.jpg", "1.jpg", "2.jpg"]


def test_links_devices_and_sparse_members_are_no_photos_and_open_nothing(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE)):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        tar.addfile(tarfile.TarInfo("../up.jpg"))
        tar.addfile(tarfile.TarInfo("/etc/absolute.jpg"))
    refs, told = listed(tmp_path / "x.tar")
    assert reasons(refs) == [ErrorType.NOT_A_FILE] * 3
    assert names(refs)[3:] == ["../up.jpg", "etc/absolute.jpg"]
    assert [ref.data for ref in refs[3:]] == [b"", b""]
    assert told == []


def test_a_member_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_PHOTO_BYTES", 5)
    tar = write_tar(tmp_path / "x.tar", [("1.jpg", b"small"), ("2.jpg", b"larger")])
    refs, _ = listed(tar)
    assert refs[0].data == b"small"
    assert reasons(refs) == [ErrorType.TOO_LARGE]
    assert refs[1].size == 6


def cut(tar: Path, size: int) -> Path:
    tar.write_bytes(tar.read_bytes()[:size])
    return tar


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Members of 1,000 bytes: each takes 512 for its header and two blocks of as many."""
    return write_tar(tmp_path / "x.tar", [(f"{n}.jpg", bytes([n]) * 1000) for n in range(3)])


@pytest.mark.parametrize(
    ("size", "left"),
    [
        (3 * 1536 + 100, 3),  # in the end mark
        (3 * 1536, 3),
        (2 * 1536 + 600, 2),  # in the data
        (2 * 1536 + 100, 2),  # in a header
        (2 * 1536, 2),  # between members
        (100, 0),
        (0, 0),
    ],
)
def test_what_is_whole_of_a_tar_that_was_cut_is_listed_and_the_rest_told(three, size, left):
    refs, told = listed(cut(three, size))
    assert [ref.data for ref in refs] == [bytes([n]) * 1000 for n in range(left)]
    assert [shard for shard, _ in told] == [str(three)]


def test_a_damaged_header_is_no_end(three):
    data = bytearray(three.read_bytes())
    data[1536 + 10] ^= 1
    three.write_bytes(data)
    refs, told = listed(three)
    assert (names(refs), len(told)) == (["0.jpg"], 1)


def test_a_shard_that_is_missing_or_no_tar_is_told_and_the_others_are_read(tmp_path):
    write_tar(tmp_path / "0.tar", [("0.jpg", b"x")])
    (tmp_path / "1.tar").write_bytes(b"no tar" * 1000)
    write_tar(tmp_path / "3.tar", [("3.jpg", b"x")])
    refs, told = listed(f"{tmp_path}/{{0..3}}.tar")
    assert names(refs) == ["0.jpg", "3.jpg"]
    assert [Path(shard).name for shard, _ in told] == ["1.tar", "2.tar"]
    assert "No such file" in told[1][1]


def test_one_member_is_read_at_a_time(three, monkeypatch):
    read = shards._member_bytes
    seen: list[str] = []
    monkeypatch.setattr(
        shards, "_member_bytes", lambda tar, one: seen.append(one.name) or read(tar, one)
    )
    refs = inputs.list_images(str(three))
    assert seen == []
    assert [next(refs).image_id, *seen] == ["0.jpg", "0.jpg"]


# Parquet


def test_bytes_with_a_column_of_ids(tmp_path):
    file = write_parquet(tmp_path / "x.parquet", image=[b"one", b"two"], key=[7, 8])
    refs, told = listed(file, columns=Columns(image_id="key"))
    assert refs == [
        ImageRef("7", f"{file}: 7", 3, None, b"one"),
        ImageRef("8", f"{file}: 8", 3, None, b"two"),
    ]
    assert told == []


def test_paths_are_those_of_a_list_in_the_file_s_folder(tmp_path):
    write_parquet(tmp_path / "x.parquet", photo=["b/1.jpg", "/x/2.jpg", "s3://b/3.jpg"])
    refs, _ = listed(tmp_path / "x.parquet", columns=Columns("photo"))
    assert refs == [
        ImageRef("b/1.jpg", f"{tmp_path}/b/1.jpg"),
        ImageRef("/x/2.jpg", "/x/2.jpg"),
        ImageRef("s3://b/3.jpg", "s3://b/3.jpg"),
    ]


def test_hugging_face_s_columns_have_bytes_or_a_path(tmp_path):
    photos = [{"bytes": b"one", "path": "1.jpg"}, {"bytes": None, "path": "2.jpg"}]
    write_parquet(tmp_path / "x.parquet", image=photos, label=[0, 1])
    refs, _ = listed(tmp_path / "x.parquet")
    assert [(ref.image_id, ref.data) for ref in refs] == [("1.jpg", b"one"), ("2.jpg", None)]
    assert refs[1].path == f"{tmp_path}/2.jpg"


def test_a_row_without_a_photo_has_its_row_and_one_without_an_id_is_told(tmp_path):
    file = write_parquet(tmp_path / "x.parquet", image=[None, b"two"], key=["a", None])
    refs, told = listed(file, columns=Columns(image_id="key"))
    assert (names(refs), reasons(refs)) == (["a"], [ErrorType.MISSING])
    assert told == [(str(file), "a photo has no id")]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (Columns("photo"), "no column 'photo': name one of image, size with --image-column"),
        (Columns("image", "key"), "no column 'key': name one of image, size with --id-column"),
        (Columns("size"), "neither bytes nor paths"),
        (Columns(), "name the column of their ids, --id-column"),
    ],
)
def test_columns_that_are_not_there_are_wrong_usage(tmp_path, columns, said):
    write_parquet(tmp_path / "x.parquet", image=[b"x"], size=[1])
    with pytest.raises(UsageError, match=said):
        listed(tmp_path / "x.parquet", columns=columns)


def test_what_is_no_parquet_is_told(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"no Parquet")
    refs, told = listed(tmp_path / "x.parquet")
    assert (refs, len(told)) == ([], 1)


def test_large_files_are_read_a_few_rows_at_a_time(tmp_path):
    photos = [bytes(1 << 20)] * 64
    write_parquet(tmp_path / "x.parquet", image=photos, key=[str(n) for n in range(64)])
    before = pa.total_allocated_bytes()
    refs = inputs.list_images(f"{tmp_path}/x.parquet", columns=Columns(image_id="key"))
    next(refs)
    assert pa.total_allocated_bytes() - before < 48 << 20


def test_a_listing_that_ends_early_closes_its_shard(three, monkeypatch):
    opened = io.BytesIO(three.read_bytes())
    monkeypatch.setattr(shards, "open_file", lambda _: opened)
    refs = inputs.list_images(str(three))
    next(refs)
    refs.close()
    assert opened.closed
