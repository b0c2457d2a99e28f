"""Tars as lists of photos: ids, order, links, damage."""

import bz2
import gzip
import io
import lzma
import tarfile
from pathlib import Path
from typing import Any

import pytest
from helpers.shard_files import MTIME, failures, ids, listed, tar_of, write_tar

from batchcap.photos import tars
from batchcap.photos.listing import list_images
from batchcap.schema import ErrorType, ImageRef


def test_members_are_photos_whose_ids_are_their_paths(tmp_path):
    tar = write_tar(tmp_path / "x.tar", [("./b/2.jpg", b"two"), ("a//1.PNG", b"one")])
    refs, reports = listed(tar)
    assert refs == [
        ImageRef("b/2.jpg", f"{tar}: b/2.jpg", 3, MTIME * 10**9, b"two"),
        ImageRef("a/1.PNG", f"{tar}: a/1.PNG", 3, MTIME * 10**9, b"one"),
    ]
    assert reports == []
    assert listed(f"file://{tar}")[0] == refs


def test_captions_labels_and_hidden_files_beside_photos_are_left_out(tmp_path):
    members = [(name, b"x") for name in ("1.txt", "1.json", "1.jpg", "._1.jpg", ".x/2.jpg", "1")]
    assert ids(listed(write_tar(tmp_path / "x.tar", members))[0]) == ["1.jpg"]
    assert ids(listed(tmp_path / "x.tar", "*.json")[0]) == ["1.json"]


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


ONE, TWO = tar_of(("1.jpg", b"one")), tar_of(("2.jpg", b"two"))
PACKERS = {"tar": bytes, "tar.gz": gzip.compress, "tar.bz2": bz2.compress, "txz": lzma.compress}


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("packer", PACKERS.values())
def test_reads_all_tars_in_a_file_whatever_its_name_says(tmp_path, name, packer):
    refs, reports = listed(put(tmp_path / f"x.{name}", packer(ONE) + packer(TWO)))
    assert [ref.data for ref in refs] == [b"one", b"two"]
    assert reports == []


@pytest.mark.parametrize(
    "data",
    [
        ONE + bytes(51_200) + TWO,  # padded
        ONE[:1024] + TWO,  # the first without its end mark
        ONE[:1536] + TWO,  # with half of it
        tar_of() + ONE + tar_of() + TWO + bytes(100),
    ],
)
def test_zeros_between_tars_are_not_damage(tmp_path, data):
    refs, reports = listed(put(tmp_path / "x.tar", data))
    assert (ids(refs), reports) == (["1.jpg", "2.jpg"], [])


@pytest.mark.parametrize(
    "rest",
    [
        b"garbage",
        b"garbage" * 1000,
        TWO[:1] + b"!" + TWO[2:],
        b"\x1f\x8b" + TWO,
        TWO[:1024],
    ],
)
@pytest.mark.parametrize("packer", [bytes, gzip.compress])
def test_reports_damage_after_the_first_tar(tmp_path, packer, rest):
    file = put(tmp_path / "x.tar", packer(ONE + rest))
    refs, reports = listed(file)
    assert ids(refs)[:1] == ["1.jpg"]
    assert [path for path, _ in reports] == [str(file)]


@pytest.mark.parametrize("packer", [gzip.compress, bz2.compress, lzma.compress])
def test_reports_garbage_after_compressed_data(tmp_path, packer):
    refs, reports = listed(put(tmp_path / "x.tar", packer(ONE) + bytes(range(1, 256)) * 1000))
    assert (ids(refs), len(reports)) == (["1.jpg"], 1)


def test_zstd_is_reported_with_advice(tmp_path):
    _, ((_, reason),) = listed(put(tmp_path / "x.tar", b"\x28\xb5\x2f\xfd" + bytes(1000)))
    assert reason == "it is compressed with zstd: decompress it"


def test_global_headers_end_with_their_tar(tmp_path):
    file = tmp_path / "x.tar"
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT, pax_headers={"mtime": "7"}) as tar:
        tar.addfile(tarfile.TarInfo("1.jpg"))
    refs, _ = listed(put(file, file.read_bytes() + TWO))
    assert [ref.mtime_ns for ref in refs] == [7 * 10**9, MTIME * 10**9]


@pytest.mark.parametrize(
    ("seconds", "nanoseconds"),
    [
        ("1600000000.123456789", 1_600_000_000_123_456_789),
        ("9223372036.854775807", 2**63 - 1),
        *((text, None) for text in ("9223372036.854775808", "1e11", "-1e12", "nan", "inf", "?")),
        ("1e999999999", None),
    ],
)
def test_a_time_out_of_range_is_dropped(tmp_path, seconds, nanoseconds):
    data = tar_of(("1.jpg", b"one", {"mtime": seconds}), ("2.jpg", b"two"))
    refs, reports = listed(put(tmp_path / "x.tar", data))
    assert [ref.mtime_ns for ref in refs] == [nanoseconds, MTIME * 10**9]
    assert reports == []


@pytest.mark.parametrize("size", ["-5", "-512", "-5120", "99999999999999999999"])
def test_an_impossible_size_is_reported(tmp_path, size):
    data = tar_of(("1.jpg", b"one"), ("2.jpg", b"two", {"size": size}), ("3.jpg", b"three"))
    refs, reports = listed(put(tmp_path / "x.tar", data))
    assert (ids(refs), len(reports)) == (["1.jpg"], 1)
    assert "size of a member makes no sense" in reports[0][1]


def test_a_huge_header_is_not_read(tmp_path):
    data = tar_of(("1.jpg", b"one", {"comment": "x" * tars.MAX_HEADER_BYTES}))
    refs, reports = listed(put(tmp_path / "x.tar", ONE + data))
    assert (ids(refs), len(reports)) == (["1.jpg"], 1)


def test_reads_sparse_members(tmp_path, monkeypatch):
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "2000"}
    extents = b"2\n0\n5\n1990\n10\n".ljust(512, b"\0")
    file = put(tmp_path / "x.tar", tar_of(("1.jpg", extents + b"first" + b"and so on.", headers)))
    refs, reports = listed(file)
    assert [ref.data for ref in refs] == [b"first" + bytes(1985) + b"and so on."]
    assert reports == []
    monkeypatch.setattr(tars, "MAX_EXTENTS", 1)
    assert failures(listed(file)[0]) == [ErrorType.TOO_LARGE]


# links


LINKS = tar_of(
    ("early.jpg", ">1.jpg"),
    ("1.jpg", b"one"),
    ("hard.jpg", "/./1.jpg"),
    ("chain.jpg", ">hard.jpg"),
    ("folder", ">real"),
    ("real/2.jpg", b"two"),
    ("sub/through.jpg", ">.././folder/2.jpg"),
    ("real/beside.jpg", ">2.jpg"),
    (".objects/3", b"three"),
    ("3.jpg", ">.objects/3"),
)


@pytest.mark.parametrize("packer", [bytes, gzip.compress])
def test_links_have_the_bytes_of_their_targets(tmp_path, packer):
    refs, reports = listed(put(tmp_path / "x.tar", packer(LINKS)))
    assert {ref.image_id: ref.data for ref in refs} == {
        **dict.fromkeys(("1.jpg", "early.jpg", "hard.jpg", "chain.jpg"), b"one"),
        **dict.fromkeys(("real/2.jpg", "sub/through.jpg", "real/beside.jpg"), b"two"),
        "3.jpg": b"three",
    }
    assert {(ref.size, ref.mtime_ns) for ref in refs} == {(n, MTIME * 10**9) for n in (3, 5)}
    assert reports == []


def test_links_that_lead_to_no_member_are_not_files(tmp_path):
    (tmp_path / "outside.jpg").write_bytes(b"outside")
    data = tar_of(
        ("absolute.jpg", f">{tmp_path}/outside.jpg"),
        ("up.jpg", ">../outside.jpg"),
        ("beside.jpg", ">outside.jpg"),
        ("hard.jpg", "/outside.jpg"),
        ("loop.jpg", ">pool.jpg"),
        ("pool.jpg", ">loop.jpg"),
        ("deep.jpg", ">" + "folder/" * 2000),
        ("self.jpg", ">self.jpg"),
    )
    refs, reports = listed(put(tmp_path / "x.tar", data))
    assert failures(refs) == [ErrorType.NOT_A_FILE] * 8
    assert {ref.data for ref in refs} == {tars.LEADS_NOWHERE}
    assert reports == []


def test_links_lead_to_members_of_their_own_tar(tmp_path):
    other = tar_of(("1.jpg", b"other"), ("link.jpg", "/1.jpg"))
    refs, _ = listed(put(tmp_path / "x.tar", ONE + other + tar_of(("lost.jpg", "/1.jpg"))))
    assert [(ref.image_id, ref.data) for ref in refs] == [
        ("1.jpg", b"one"),
        ("1.jpg", b"other"),
        ("link.jpg", b"other"),
        ("lost.jpg", tars.LEADS_NOWHERE),
    ]


def test_a_member_that_was_packed_twice_is_listed_once(tmp_path):
    refs, _ = listed(put(tmp_path / "x.tar", tar_of(("1.jpg", b"one"), ("1.jpg", "/1.jpg"))))
    assert ids(refs) == ["1.jpg"]


def test_links_before_damage_are_followed_and_the_damage_is_reported_once(tmp_path):
    whole = tar_of(("1.jpg", b"one"), ("2.jpg", ">1.jpg"), ("3.jpg", ">4.jpg"), ("4.jpg", b"four"))
    refs, reports = listed(put(tmp_path / "x.tar", whole[: 4 * 512 + 100]))
    assert (ids(refs), len(reports)) == (["1.jpg", "2.jpg"], 1)


def test_number_of_links_in_memory_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_LINKS", 2)
    data = tar_of(("1.jpg", b"one"), *((f"{n}.jpg", ">1.jpg") for n in range(2, 5)))
    refs, _ = listed(put(tmp_path / "x.tar", data))
    assert [(ref.image_id, ref.data) for ref in refs] == [
        ("1.jpg", b"one"),
        ("4.jpg", tars.TOO_MANY_LINKS),
        ("2.jpg", b"one"),
        ("3.jpg", b"one"),
    ]


# names, devices, damage


def test_long_and_non_utf8_names_are_ids(tmp_path):
    raw, long = b"\xff.jpg".decode("utf-8", "surrogateescape"), f"{'照' * 100}/{'片' * 100}.jpg"
    tar = write_tar(tmp_path / "x.tar", [(raw, b"x"), (long, b"x")])
    assert ids(listed(tar)[0]) == [r"\xff.jpg", long]


def test_archives_are_listed_in_order(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", [(f"{number}.jpg", b"x")])
    assert ids(listed(f"{tmp_path}/{{0..2}}.tar")[0]) == ["0.jpg", "1.jpg", "2.jpg"]


def test_devices_are_not_photos_and_names_open_no_file(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        device = tarfile.TarInfo("0.jpg")
        device.type = tarfile.CHRTYPE
        tar.addfile(device)
        tar.addfile(tarfile.TarInfo("../up.jpg"))
        tar.addfile(tarfile.TarInfo("/etc/absolute.jpg"))
    refs, reports = listed(tmp_path / "x.tar")
    assert failures(refs) == [ErrorType.NOT_A_FILE]
    assert ids(refs)[1:] == ["../up.jpg", "etc/absolute.jpg"]
    assert [ref.data for ref in refs[1:]] == [b"", b""]
    assert reports == []


def test_hostile_members_write_nothing_and_open_nothing(tmp_path, monkeypatch):
    """Names and links that lead out of the tar, a device, ten gigabytes of nothing."""
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    for folder in (outside, inside):
        folder.mkdir()
    (outside / "secret.jpg").write_bytes(b"secret")
    sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": f"{10**10}"}
    data = tar_of(
        ("../outside/up.jpg", b"up"),
        (f"{outside}/absolute.jpg", b"absolute"),
        ("folder", f">{outside}"),
        ("folder/through.jpg", b"through"),
        ("soft.jpg", ">folder/secret.jpg"),
        ("hard.jpg", f"/{outside}/secret.jpg"),
        ("sparse.jpg", b"1\n0\n5\n".ljust(512, b"\0") + b"first", sparse),
    )
    put(inside / "x.tar", data)
    with tarfile.open(inside / "x.tar", "a") as tar:
        device = tarfile.TarInfo("device.jpg")
        device.type, device.devmajor, device.devminor = tarfile.CHRTYPE, 1, 5
        tar.addfile(device)
    before = {path: path.lstat().st_mtime_ns for path in (tmp_path, *tmp_path.rglob("*"))}
    monkeypatch.chdir(inside)
    refs, reports = listed(inside / "x.tar")
    assert {path: path.lstat().st_mtime_ns for path in (tmp_path, *tmp_path.rglob("*"))} == before
    assert reports == []
    names = ("sparse.jpg", "device.jpg", "soft.jpg", "hard.jpg")
    found = {ref.image_id: ref.data for ref in refs}
    assert [found[name].error_type for name in names] == [ErrorType.TOO_LARGE] + [
        ErrorType.NOT_A_FILE
    ] * 3
    assert sorted(data for data in found.values() if isinstance(data, bytes)) == [
        *(b"absolute", b"through", b"up")
    ]


def test_a_member_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_PHOTO_BYTES", 5)
    tar = write_tar(tmp_path / "x.tar", [("1.jpg", b"small"), ("2.jpg", b"larger")])
    refs, _ = listed(tar)
    assert refs[0].data == b"small"
    assert failures(refs) == [ErrorType.TOO_LARGE]
    assert refs[1].size == 6


def cut(tar: Path, size: int) -> Path:
    tar.write_bytes(tar.read_bytes()[:size])
    return tar


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Three members of 1,000 bytes: each takes a header and two blocks, of 512 bytes each."""
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
def test_a_cut_tar_is_listed_up_to_the_cut_and_reported(three, size, left):
    refs, reports = listed(cut(three, size))
    assert [ref.data for ref in refs] == [bytes([n]) * 1000 for n in range(left)]
    assert [path for path, _ in reports] == [str(three)]


def test_a_damaged_header_is_reported(three):
    data = bytearray(three.read_bytes())
    data[1536 + 10] ^= 1
    three.write_bytes(data)
    refs, reports = listed(three)
    assert (ids(refs), len(reports)) == (["0.jpg"], 1)


def test_missing_and_invalid_tars_are_reported_and_the_others_read(tmp_path):
    write_tar(tmp_path / "0.tar", [("0.jpg", b"x")])
    (tmp_path / "1.tar").write_bytes(b"no tar" * 1000)
    write_tar(tmp_path / "3.tar", [("3.jpg", b"x")])
    refs, reports = listed(f"{tmp_path}/{{0..3}}.tar")
    assert ids(refs) == ["0.jpg", "3.jpg"]
    assert [Path(path).name for path, _ in reports] == ["1.tar", "2.tar"]
    assert "No such file" in reports[1][1]


def test_one_member_is_read_at_a_time(three, monkeypatch):
    read = tars._member_bytes
    seen: list[str] = []
    monkeypatch.setattr(
        tars, "_member_bytes", lambda tar, one: seen.append(one.name) or read(tar, one)
    )
    refs = list_images(str(three))
    assert seen == []
    assert [next(refs).image_id, *seen] == ["0.jpg", "0.jpg"]


def test_a_listing_that_ends_early_closes_its_tar(three, monkeypatch):
    opened = io.BytesIO(three.read_bytes())
    monkeypatch.setattr(tars, "open_archive", lambda _: opened)
    refs: Any = list_images(str(three))
    next(refs)
    refs.close()
    assert opened.closed
