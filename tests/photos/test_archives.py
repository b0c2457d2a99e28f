"""Archives by name, and Parquet files as lists of photos: ids, order, damage."""

from decimal import Decimal
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from helpers.shard_files import failures, ids, listed, write_parquet

from batchcap.errors import UsageError
from batchcap.photos.archives import Columns, archives_of
from batchcap.photos.listing import archives_in, list_images
from batchcap.schema import ErrorType, ImageRef


def paths_of(source: object) -> list[str]:
    return [archive.path for archive in archives_of(str(source))]


# names of archives


def test_braces_expand_to_numbered_archives():
    assert paths_of("a-{008..011}.tar") == [f"a-{n:03}.tar" for n in range(8, 12)]
    assert paths_of("{0..1}/{1..2}.tar") == ["0/1.tar", "0/2.tar", "1/1.tar", "1/2.tar"]
    assert paths_of("s3://b/a-{9..10}.tar") == ["s3://b/a-10.tar", "s3://b/a-9.tar"]


def test_globs_are_sorted_and_must_match(tmp_path):
    for name in "cab":
        (tmp_path / f"{name}.tar").touch()
    assert [Path(path).name for path in paths_of(f"{tmp_path}/*.tar")] == [
        "a.tar",
        "b.tar",
        "c.tar",
    ]
    with pytest.raises(UsageError, match="check the path"):
        paths_of(f"{tmp_path}/*.parquet")


def test_an_existing_name_with_braces_is_not_expanded(tmp_path):
    (tmp_path / "a{0..9}.tar").touch()
    assert paths_of(f"{tmp_path}/a{{0..9}}.tar") == [f"{tmp_path}/a{{0..9}}.tar"]


# Parquet


def test_bytes_with_an_id_column(tmp_path):
    file = write_parquet(tmp_path / "x.parquet", image=[b"one", b"two"], key=[7, 8])
    refs, reports = listed(file, columns=Columns(image_id="key"))
    assert refs == [
        ImageRef("7", f"{file}: 7", 3, None, b"one"),
        ImageRef("8", f"{file}: 8", 3, None, b"two"),
    ]
    assert reports == []


def test_paths_are_relative_to_the_folder_of_the_file(tmp_path):
    write_parquet(tmp_path / "x.parquet", photo=["b/1.jpg", "/x/2.jpg", "s3://b/3.jpg"])
    refs, _ = listed(tmp_path / "x.parquet", columns=Columns("photo"))
    assert refs == [
        ImageRef("b/1.jpg", f"{tmp_path}/b/1.jpg"),
        ImageRef("/x/2.jpg", "/x/2.jpg"),
        ImageRef("s3://b/3.jpg", "s3://b/3.jpg"),
    ]


def test_hugging_face_columns_have_bytes_or_a_path(tmp_path):
    photos = [{"bytes": b"one", "path": "1.jpg"}, {"bytes": None, "path": "2.jpg"}]
    write_parquet(tmp_path / "x.parquet", image=photos, label=[0, 1])
    refs, _ = listed(tmp_path / "x.parquet")
    assert [(ref.image_id, ref.data) for ref in refs] == [("1.jpg", b"one"), ("2.jpg", None)]
    assert refs[1].path == f"{tmp_path}/2.jpg"


ROWS = 20  # more than are read at a time


def test_rows_without_an_id_are_named_by_file_and_row(tmp_path):
    names = [f"x.parquet:{row:07}" for row in range(ROWS)]
    file = tmp_path / "x.parquet"
    write_parquet(file, image=[{"bytes": b"one", "path": None}] * ROWS)
    refs, reports = listed(file)
    assert [(ref.image_id, ref.data) for ref in refs] == [(name, b"one") for name in names]
    assert reports == []
    write_parquet(file, image=[b"one"] * ROWS)
    assert listed(file)[0] == refs
    write_parquet(file, image=[b"one"] * ROWS, key=["a", "", *[None] * (ROWS - 3), "z"])
    assert ids(listed(file, columns=Columns(image_id="key"))[0]) == ["a", *names[1:-1], "z"]


def test_a_row_without_a_photo_fails_under_its_name(tmp_path):
    images = [None, {"bytes": None, "path": None}, {"bytes": None, "path": "3.jpg"}]
    refs, _ = listed(write_parquet(tmp_path / "x.parquet", image=images))
    assert ids(refs) == ["x.parquet:0000000", "x.parquet:0000001", "3.jpg"]
    assert failures(refs) == [ErrorType.MISSING] * 2


def test_row_names_are_relative_to_the_common_folder(tmp_path, monkeypatch):
    for folder in "ab":
        (tmp_path / "data" / folder).mkdir(parents=True)
        write_parquet(tmp_path / "data" / folder / "x.parquet", image=[b"one"])
    names = ["a/x.parquet:0000000", "b/x.parquet:0000000"]
    monkeypatch.chdir(tmp_path)
    for pattern in ("data/*/x.parquet", "./data/?/x.parquet", f"{tmp_path}/data/*/*.parquet"):
        assert ids(listed(pattern)[0]) == names
    assert ids(listed("data/b/x.parquet")[0]) == ["x.parquet:0000000"]
    # Ray's workers list one archive at a time.
    assert ids(ref for one in archives_in("data/*/x.parquet") for ref in list_images(one)) == names


def test_row_names_are_the_same_in_a_store(tmp_path):
    file = write_parquet(tmp_path / "x.parquet", image=[b"one"])
    fsspec.filesystem("memory").pipe("/rows/0/x.parquet", file.read_bytes())
    for pattern in ("memory://rows/*/x.parquet", "memory://rows/{0..0}/x.parquet"):
        assert ids(listed(pattern)[0]) == ["0/x.parquet:0000000"]
    assert ids(listed("memory://rows/0/x.parquet")[0]) == ["x.parquet:0000000"]


@pytest.mark.parametrize(
    "image",
    [
        pa.array([b"one"], pa.large_binary()),
        pa.array([b"one"], pa.binary_view()),
        pa.array([b"one"], pa.binary(3)),
        pa.array([b"one"]).dictionary_encode(),
        pa.array([{"bytes": b"one"}]),
        pa.array([{"bytes": b"one", "path": None}]),
        pa.array([{"bytes": b"one", "path": ""}]),
    ],
    ids=lambda image: str(image.type),
)
def test_bytes_may_be_of_any_binary_type(tmp_path, image):
    refs, reports = listed(write_parquet(tmp_path / "x.parquet", image=image))
    assert [(ref.image_id, ref.data) for ref in refs] == [("x.parquet:0000000", b"one")]
    assert reports == []


@pytest.mark.parametrize(
    "image",
    [
        pa.array(["1.jpg"], pa.large_string()),
        pa.array(["1.jpg"], pa.string_view()),
        pa.array(["1.jpg"]).dictionary_encode(),
        pa.array([{"bytes": None, "path": "1.jpg"}]),
    ],
    ids=lambda image: str(image.type),
)
def test_paths_may_be_of_any_string_type(tmp_path, image):
    refs, _ = listed(write_parquet(tmp_path / "x.parquet", image=image))
    assert refs == [ImageRef("1.jpg", f"{tmp_path}/1.jpg")]


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (pa.array([2**64 - 1], pa.uint64()), ["18446744073709551615"]),
        (pa.array([Decimal("1.50")]), ["1.50"]),
        (pa.array([b"\xffa"]), [r"\xffa"]),
        (pa.array(["a"]).dictionary_encode(), ["a"]),
        (pa.array([1], pa.timestamp("ns")), ["1970-01-01 00:00:00.000000001"]),
        (pa.array([2**55], pa.timestamp("us")), ["3111-09-16 23:10:18.963968"]),
    ],
    ids=lambda keys: str(getattr(keys, "type", "")),
)
def test_ids_may_be_of_any_type(tmp_path, keys, names):
    file = write_parquet(tmp_path / "x.parquet", image=[b"one"], key=keys)
    refs, reports = listed(file, columns=Columns(image_id="key"))
    assert (ids(refs), reports) == (names, [])


def test_a_file_without_rows_has_no_photos(tmp_path):
    file = write_parquet(tmp_path / "x.parquet", image=pa.array([], pa.binary()))
    assert listed(file) == ([], [])


def test_a_later_file_without_the_columns_is_reported_and_the_others_are_read(tmp_path):
    for number, name in enumerate(("image", "photo", "image")):
        write_parquet(tmp_path / f"{number}.parquet", **{name: [b"one"]})
    refs, reports = listed(tmp_path / "*.parquet")
    assert ids(refs) == ["0.parquet:0000000", "2.parquet:0000000"]
    assert reports == [
        (
            f"{tmp_path}/1.parquet",
            "it has no column 'image': name one of photo with --image-column",
        )
    ]


@pytest.mark.parametrize("name", ["x.tar.zst", "photos-{0..9}.tar.zst", "x.zip", "s3://b/x.7z"])
def test_other_archives_are_refused(name):
    with pytest.raises(UsageError, match="an unsupported archive: unpack it"):
        listed(name)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns("photo"), "no column 'photo': name one of image, size with --image-column"),
        (Columns("image", "key"), "no column 'key': name one of image, size with --id-column"),
        (Columns("size"), "neither bytes nor paths"),
    ],
)
def test_missing_or_unsuitable_columns_are_usage_errors(tmp_path, columns, message):
    write_parquet(tmp_path / "x.parquet", image=[b"x"], size=[1])
    with pytest.raises(UsageError, match=message):
        listed(tmp_path / "x.parquet", columns=columns)


def test_a_file_that_is_not_parquet_is_reported(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"no Parquet")
    refs, reports = listed(tmp_path / "x.parquet")
    assert (refs, len(reports)) == ([], 1)


def test_large_files_are_read_a_few_rows_at_a_time(tmp_path):
    photos = [bytes(1 << 20)] * 64
    write_parquet(tmp_path / "x.parquet", image=photos, key=[str(n) for n in range(64)])
    before = pa.total_allocated_bytes()
    refs = list_images(f"{tmp_path}/x.parquet", columns=Columns(image_id="key"))
    next(refs)
    assert pa.total_allocated_bytes() - before < 48 << 20
