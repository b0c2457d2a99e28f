"""Listing of folders and lists like those of users."""

import io
import itertools
import logging
import os
import socket
import tarfile
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.hostile_files import NAMES
from helpers.shard_files import write_parquet, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from batchcap.errors import InputError, UsageError
from batchcap.photos import listing
from batchcap.photos.listing import (
    image_id_of,
    path_of_image_id,
)
from batchcap.schema import ImageRef


def make_tree(root: Path, *names: str) -> str:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return str(root)


def list_images(source: str, pattern: str | None = None) -> list[ImageRef]:
    return list(listing.list_images(source, pattern))


def ids(images: list[ImageRef]) -> list[str]:
    return [image.image_id for image in images]


def test_folder_is_listed_in_code_point_order_of_its_ids(tmp_path):
    root = make_tree(tmp_path, "b/1.jpg", "b.jpg", "B.JPG", "a/10.png", "a/9.png", "照片.webp")
    expected = ["B.JPG", "a/10.png", "a/9.png", "b.jpg", "b/1.jpg", "照片.webp"]
    assert ids(list_images(root)) == expected


@settings(deadline=None, max_examples=50)
@given(
    st.sets(
        st.lists(st.text("ab-.\\照", min_size=1, max_size=3), min_size=1, max_size=3).map(
            lambda parts: "/".join(f"x{part}" for part in parts) + ".jpg"
        )
    )
)
def test_files_of_all_folders_are_sorted_by_id(names):
    with tempfile.TemporaryDirectory() as folder:
        root = make_tree(Path(folder), *names)
        assert ids(list_images(root)) == sorted(map(image_id_of, names))


def test_a_subfolder_is_read_when_its_turn_comes(tmp_path):
    images = listing.list_images(make_tree(tmp_path, "a.jpg", "b/1.jpg"))
    assert next(images).image_id == "a.jpg"
    make_tree(tmp_path, "b/2.jpg")
    assert ids(images) == ["b/1.jpg", "b/2.jpg"]


def test_photos_on_stdin_are_listed_as_they_arrive(monkeypatch):
    read, write = os.pipe()
    with os.fdopen(read, "rb") as stdin:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=stdin))
        images = listing.list_images("-")
        os.write(write, b"a.jpg\n")
        assert next(images).image_id == "a.jpg"  # before the list has ended
        os.close(write)
        assert list(images) == []


def test_a_pipe_is_a_list_whatever_its_name(tmp_path):
    """Names from `<(find ...)` are not relative to /dev/fd."""
    read, write = os.pipe()
    os.write(write, b"a.jpg\n")
    os.close(write)
    source = f"/dev/fd/{read}"
    assert listing.is_list(source)
    assert not listing.can_be_listed_twice(source)
    assert list_images(source) == [ImageRef("a.jpg", "a.jpg")]
    os.close(read)


def test_only_regular_files_and_folders_can_be_listed_twice(tmp_path):
    os.mkfifo(tmp_path / "list.txt")
    (tmp_path / "file.txt").touch()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    sources = ["-", *map(str, sorted(tmp_path.iterdir())), str(tmp_path)]
    twice = [source for source in sources if listing.can_be_listed_twice(source)]
    assert twice == [f"{tmp_path}/file.txt", str(tmp_path)]


@pytest.mark.parametrize("name", ["x.tar", "x.parquet"])
def test_an_archive_in_a_pipe_is_refused_without_waiting(tmp_path, name):
    """Archives are read more than once, and opening a pipe would hang the run."""
    os.mkfifo(tmp_path / name)
    reports: list[tuple[str, str]] = []
    source = f"{tmp_path}/{name}"
    assert list(listing.list_images(source, unlisted=lambda *one: reports.append(one))) == []
    assert reports == [(source, "an archive must be a regular file: save it as one")]


def progress_calls(source: object, pattern: str = "*.none") -> int:
    """How often a listing that finds no photo calls `progress`."""
    calls: list[int] = []
    assert not list(listing.list_images(str(source), pattern, progress=lambda: calls.append(1)))
    return len(calls)


def test_listing_reports_progress_for_entries_that_are_not_photos(tmp_path):
    """Millions of other files must not look like a stall."""
    names = [f"{number:03}.txt" for number in range(100)]
    make_tree(tmp_path / "folder", *names, *(f".{name}" for name in names))
    assert progress_calls(tmp_path / "folder") >= 200
    make_tree(tmp_path / "folders", *(f"{name}/.keep" for name in names))
    assert progress_calls(tmp_path / "folders") >= 200
    (tmp_path / "list.txt").write_text("\n".join(names))
    assert progress_calls(tmp_path / "list.txt") >= 100
    tar = write_tar(tmp_path / "x.tar", [(name, b"x") for name in names])
    assert progress_calls(tar) >= 100
    file = write_parquet(tmp_path / "x.parquet", image=names)
    assert progress_calls(file) >= 100


def test_listing_reports_progress_for_folders_and_links_of_a_tar(tmp_path):
    """Links are read in a second pass, which skips all other members."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number in range(100):
            folder = tarfile.TarInfo(f"{number}")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "nowhere.jpg"
        tar.addfile(link)
    assert progress_calls(tmp_path / "x.tar") >= 100
    calls: list[int] = []
    list(listing.list_images(f"{tmp_path}/x.tar", progress=lambda: calls.append(1)))
    assert len(calls) >= 2 * 101


def test_path_opens_the_photo_and_id_is_relative(tmp_path):
    root = make_tree(tmp_path, "a/1.jpg")
    assert list_images(root) == [ImageRef("a/1.jpg", f"{root}/a/1.jpg")]
    assert list_images(root + "/") == list_images(root)


@pytest.mark.parametrize(
    "extension",
    [
        *(
            "jpg",
            "JPEG",
            "jpe",
            "jfif",
            "mpo",
            "apng",
            "Gif",
            "tiff",
            "avif",
            "HEIC",
            "heif",
            "hif",
        ),
        *("CR2", "cr3", "NEF", "dng", "arw", "orf", "RW2", "raf", "pef", "psd", "jp2", "ppm"),
    ],
)
def test_image_extensions_match_in_any_case(tmp_path, extension):
    assert ids(list_images(make_tree(tmp_path, f"a.{extension}"))) == [f"a.{extension}"]


def test_other_files_dot_files_and_dot_folders_are_left_out(tmp_path):
    root = make_tree(tmp_path, "a.txt", "jpg", ".a.jpg", "._b.jpg", ".git/c.jpg", "d.jpg.bak")
    assert list_images(root) == []


def test_linked_files_are_followed_and_linked_folders_not_entered(tmp_path):
    root = make_tree(tmp_path, "a/1.jpg")
    (tmp_path / "2.jpg").symlink_to("a/1.jpg")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "loop.jpg").symlink_to(tmp_path)
    assert ids(list_images(root)) == ["2.jpg", "a/1.jpg"]


def test_dangling_links_and_pipes_are_listed(tmp_path):
    (tmp_path / "a.jpg").symlink_to("none")
    os.mkfifo(tmp_path / "b.jpg")
    assert ids(list_images(str(tmp_path))) == ["a.jpg", "b.jpg"]


def test_equal_names_in_other_folders_or_with_other_extensions_are_distinct(tmp_path):
    root = make_tree(tmp_path, "x/a.jpg", "y/a.jpg", "x/a.png", "a.jpg")
    assert len(set(ids(list_images(root)))) == 4


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.dat", ["a/x.dat"]),
        ("X*", ["a/x.JPG", "a/x.dat"]),
        ("a/*.jpg", ["a/x.JPG"]),
        ("A/x.*", ["a/x.JPG", "a/x.dat"]),
        ("b/*", []),
        ("**/*.jpg", ["a/x.JPG", "y.jpg"]),
        ("a/**/*.dat", ["a/x.dat"]),
        ("[xy].jpg", ["a/x.JPG", "y.jpg"]),
    ],
)
def test_pattern_decides_instead_of_the_extension(tmp_path, pattern, expected):
    root = make_tree(tmp_path, "a/x.JPG", "a/x.dat", "y.jpg")
    assert ids(list_images(root, pattern)) == expected


def left(root: str, *patterns: str) -> list[str]:
    """The photos of a source that are not excluded."""
    is_excluded = listing.excluder(root, patterns)
    return ids(list(listing.list_images(root, is_excluded=is_excluded)))


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["b"], ["a/b.jpg", "a/c/1.jpg", "x.jpg"]),
        (["B*"], ["a/c/1.jpg", "x.jpg"]),
        (["c/"], ["a/b.jpg", "b/2.jpg", "x.jpg"]),
        (["a/c"], ["a/b.jpg", "b/2.jpg", "x.jpg"]),
        (["./a/*", "x.jpg"], ["b/2.jpg"]),
        (["/c", "?"], ["x.jpg"]),
        (["**/1.jpg"], ["a/b.jpg", "b/2.jpg", "x.jpg"]),
    ],
)
def test_excluded_paths_are_left_out_with_all_below(tmp_path, patterns, expected):
    names = ["a/b.jpg", "a/c/1.jpg", "b/2.jpg", "x.jpg"]
    assert left(make_tree(tmp_path, *names), *patterns) == expected
    tar = write_tar(tmp_path / "x.tar", [(name, b"") for name in names])
    assert left(str(tar), *patterns) == expected
    (tmp_path / "list.txt").write_text("\n".join(names))
    assert left(str(tmp_path / "list.txt"), *patterns) == expected
    file = write_parquet(tmp_path / "x.parquet", image=names)
    assert left(str(file), *patterns) == expected


def test_excluded_folders_are_not_entered(tmp_path, monkeypatch):
    root = make_tree(tmp_path, "a/1.jpg", "a/lost+found/2.jpg", "raw/3.jpg")
    entered = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: entered.append(str(path)) or scandir(path))
    assert left(root, "raw") == ["a/1.jpg"]
    assert entered == [f"{root}/", f"{root}/a/"]


def test_system_folders_are_left_out_unless_named(tmp_path):
    names = ["lost+found/1.jpg", "a/@eaDir/2.jpg", "#recycle/3.jpg", "__MACOSX/4.jpg", "5.jpg"]
    names.append("$RECYCLE.BIN/6.jpg")
    root = make_tree(tmp_path, *names)
    assert ids(list_images(root)) == ["5.jpg"]
    assert ids(list_images(f"{root}/lost+found")) == ["1.jpg"]
    tar = write_tar(tmp_path / "x.tar", [(name, b"") for name in names])
    assert ids(list_images(str(tar))) == ["5.jpg"]
    (tmp_path / "list.txt").write_text("\n".join(names))
    assert ids(list_images(str(tmp_path / "list.txt"))) == names


def test_file_urls_are_paths_as_input_in_lists_and_in_parquet(tmp_path):
    folder = tmp_path / "a b"
    make_tree(folder, "1 2.jpg")
    url = f"file://localhost{tmp_path}/a%20b"
    assert [ref.path for ref in list_images(url)] == [f"{folder}/1 2.jpg"]
    lines = [f"file:{folder}/1%202.jpg", f"file://{folder}/1%202.jpg"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    assert {ref.path for ref in list_images(f"file:{tmp_path}/list.txt")} == {f"{folder}/1 2.jpg"}
    file = write_parquet(tmp_path / "x.parquet", image=lines)
    assert {ref.path for ref in list_images(f"file://{file}")} == {f"{folder}/1 2.jpg"}


def test_broken_links_are_listed_and_hide_no_photo(tmp_path):
    root = make_tree(tmp_path, "1.jpg")
    for name, target in (("circle.jpg", "circle.jpg"), ("dangling.jpg", "nothing")):
        (Path(root) / name).symlink_to(Path(root) / target)
    assert ids(list_images(root)) == ["1.jpg", "circle.jpg", "dangling.jpg"]


def test_folder_that_cannot_be_listed_is_skipped_with_a_warning(tmp_path, monkeypatch, caplog):
    """The refusal is scripted, because root can list any folder."""
    root = make_tree(tmp_path, "a/1.jpg", "b/2.jpg")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/a/"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with caplog.at_level(logging.WARNING, logger="batchcap.photos.listing"):
        assert ids(list_images(root)) == ["b/2.jpg"]
    assert [record.getMessage() for record in caplog.records] == [
        "could not fully read a/ (Permission denied); skipping its remaining photos"
    ]


def test_warning_about_a_folder_contains_no_escape_sequence(tmp_path, monkeypatch, caplog):
    """A terminal would obey the raw name."""
    root = make_tree(tmp_path, "a\x1b[2J\n/1.jpg")
    scandir = os.scandir

    def refuse(path):
        if "\x1b" in str(path):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with caplog.at_level(logging.WARNING, logger="batchcap.photos.listing"):
        assert list_images(root) == []
    assert "could not fully read a?[2J?/ (" in caplog.records[0].getMessage()


def test_root_that_cannot_be_listed_is_an_input_error(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        list_images(str(tmp_path))


def test_missing_source_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="none"):
        list_images(str(tmp_path / "none"))


def test_source_that_is_neither_folder_nor_list_is_an_input_error(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(InputError, match="neither a directory nor a"):
        list_images(str(tmp_path / "a.jpg"))


def test_list_keeps_its_order(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"b.jpg\n./a//1.jpg\n\n  \n/x/c.jpg\n")
    assert list_images(str(tmp_path / "list.txt")) == [
        ImageRef("b.jpg", f"{tmp_path}/b.jpg"),
        ImageRef("a/1.jpg", f"{tmp_path}/a/1.jpg"),
        ImageRef("/x/c.jpg", "/x/c.jpg"),
    ]


def test_list_with_bom_crlf_and_names_that_are_not_utf8(tmp_path):
    (tmp_path / "list.TXT").write_bytes(b"\xef\xbb\xbfa b.jpg\r\n\xff.jpg\r\nlast.jpg")
    assert ids(list_images(str(tmp_path / "list.TXT"))) == ["a b.jpg", r"\xff.jpg", "last.jpg"]


def test_list_may_be_nul_separated_or_utf16(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"./a\nb.jpg\0./c.jpg\0")
    assert ids(list_images(str(tmp_path / "a.txt"))) == ["a\nb.jpg", "c.jpg"]
    (tmp_path / "b.txt").write_text("./猫.jpg\r\nc.jpg\r\n", encoding="utf-16")
    assert ids(list_images(str(tmp_path / "b.txt"))) == ["猫.jpg", "c.jpg"]


def test_list_from_stdin_is_relative_to_the_current_folder(monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"a/1.jpg\n/2.jpg\n")))
    assert list_images("-") == [ImageRef("a/1.jpg", "a/1.jpg"), ImageRef("/2.jpg", "/2.jpg")]


def test_two_dots_after_a_link_go_up_from_its_target(tmp_path):
    (tmp_path / "far" / "folder").mkdir(parents=True)
    (tmp_path / "far" / "1.jpg").write_bytes(b"far")
    (tmp_path / "1.jpg").write_bytes(b"near")
    (tmp_path / "link").symlink_to(tmp_path / "far" / "folder")
    (tmp_path / "list.txt").write_text("./link//../1.jpg\n")
    (image,) = list_images(str(tmp_path / "list.txt"))
    assert image.image_id == "link/../1.jpg"
    assert Path(image.path).read_bytes() == b"far"


def test_pattern_selects_from_a_list_too(tmp_path):
    (tmp_path / "list.txt").write_text("a.jpg\nb.png\n")
    assert ids(list_images(str(tmp_path / "list.txt"), "*.png")) == ["b.png"]


@pytest.mark.parametrize(
    ("name", "image_id"),
    [
        (b"a/b.jpg", "a/b.jpg"),
        ("猫.jpg".encode(), "猫.jpg"),
        (b"\xff\xe4\xb8.jpg", r"\xff\xe4\xb8.jpg"),
        (rb"\xff.jpg", r"\\xff.jpg"),
        (b"line\nbreak.jpg", "line\nbreak.jpg"),
    ],
)
def test_image_id_escapes_only_what_it_must(name, image_id):
    assert image_id_of(os.fsdecode(name)) == image_id


@given(st.binary(max_size=40))
def test_image_id_gives_back_the_same_bytes(name):
    image_id = image_id_of(name.decode("utf-8", "surrogateescape"))
    image_id.encode("utf-8")
    assert path_of_image_id(image_id).encode("utf-8", "surrogateescape") == name


@given(st.text(alphabet="\\x89af猫/"))
def test_any_text_converts_to_a_path(text):
    assert os.fsencode(path_of_image_id(text)) is not None


@given(st.binary(max_size=6), st.binary(max_size=6))
def test_two_names_never_share_an_image_id(one, other):
    first, second = (name.decode("utf-8", "surrogateescape") for name in (one, other))
    assert (image_id_of(first) == image_id_of(second)) == (one == other)


ODD_BYTES = b"\\\xff\x80\xc3\xa9\n\t\x7f*x"


def test_five_hundred_odd_names_have_distinct_ids(tmp_path):
    """All bytes, all pairs of odd ones, hostile names, and one name in a hundred folders."""
    names = {bytes([byte]) for byte in range(1, 256)} - {b".", b"/"}
    names |= {bytes(pair) for pair in itertools.product(ODD_BYTES, repeat=2)}
    names = {name + b".jpg" for name in names | {b"a" * 251}}
    names |= {os.fsencode(name) for name in NAMES if name[:1] not in (".", b".")}
    names |= {b"%d/same.jpg" % number for number in range(100)}
    try:
        make_tree(tmp_path, *map(os.fsdecode, names))
    except OSError:  # as on macOS
        pytest.skip("this file system refuses names")
    found = list_images(str(tmp_path))
    assert len(names) > 500
    assert len({image.image_id for image in found}) == len(found) == len(names)
    assert {os.fsencode(path_of_image_id(image.image_id)) for image in found} == names
    assert all(Path(image.path).is_file() for image in found)


def test_names_that_are_not_utf8_are_listed_and_opened(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).write_bytes(b"x")
    (image,) = list_images(str(tmp_path))
    assert image.image_id == r"\xff.jpg"
    assert Path(image.path).read_bytes() == b"x"
