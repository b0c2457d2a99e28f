"""What users bring: folders and lists of photos, and files of captions written by people.

Names and texts only: no photo is opened here, and whether one can be decoded is not known.
"""

import fnmatch
import json
import logging
import os
import posixpath
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from batchcap.contracts import InputError, UsageError

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = frozenset(
    (
        *("jpg", "jpeg", "jpe", "jfif", "png", "bmp", "dib", "gif", "webp"),
        # Not decoded, but their owners believe them to be photos and want to be told.
        *("tif", "tiff", "heic", "heif", "avif", "jp2", "jxl", "psd", "ico"),
    )
)

SPLITS = ("train", "val", "test")
FLICKR_LINE = re.compile(
    r"(?P<name>.+?)#(?:(?P<kind>[^#\s]+)#)?(?P<number>\d+)(?:\s+(?P<caption>.*))?"
)
SHOWN_PROBLEMS = 10
MISSING = "missing"


# (folder, why it can't be listed)
Unlisted = Callable[[str, str], object]


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One photo to caption: its id, and the path that opens it (surrogateescape str)."""

    image_id: str
    path: str


@dataclass(frozen=True)
class AnnotatedImage:
    """One photo's captions as people wrote them, and `train`, `val`, `test` or whatever split."""

    image_id: str
    captions: tuple[str, ...]
    split: str | None


def warn_unlisted(folder: str, reason: str) -> None:
    """Say that a folder is left out."""
    logger.warning(
        "The folder %s cannot be listed (%s); its photos are left out.", printable(folder), reason
    )


def list_images(
    source: str, pattern: str | None = None, unlisted: Unlisted = warn_unlisted
) -> Iterator[ImageRef]:
    """List the photos of a folder (recursive), of a `.txt` file of paths, or of stdin (`-`).

    A folder is listed by extension, in code-point order of the ids, without dot files and without
    entering linked folders; a subfolder is read when its turn comes, and `unlisted` is told of one
    that can't be: its name and why. A list keeps its order and is read line by line; relative lines
    start at the list's folder. `pattern` decides instead of the extension: an fnmatch pattern, case
    ignored, matched against the relative path if it holds a `/`, or else against the file name.

    Raises UsageError if there is no such source, InputError if it cannot be read or is neither.
    """
    is_wanted = _matcher(pattern)
    if source == "-":
        if sys.stdin is None:
            raise InputError("standard input is closed: give the list of photos there, or name it")
        return _read_list(sys.stdin.buffer, "standard input", "", is_wanted)
    path = Path(source)
    if path.is_dir():
        return _list_folder(source, is_wanted or _has_image_extension, unlisted)
    if path.suffix.lower() == ".txt" or not path.exists():
        with _saying_which(path):
            lines = path.open("rb")
        return _read_list(lines, source, f"{path.parent}/", is_wanted)
    raise InputError(f"{source} is neither a folder nor a .txt file of paths; name one of these.")


def printable(name: str) -> str:
    """A file's name without the control characters that a terminal would obey."""
    return "".join(char if char.isprintable() else "?" for char in name)


def image_id_of(path: str) -> str:
    r"""Escape a relative POSIX path reversibly: `\` is doubled, invalid bytes become `\xNN`."""
    if path.isascii() and "\\" not in path:
        return path
    doubled = path.replace("\\", "\\\\")
    return doubled.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _matcher(pattern: str | None) -> Callable[[str], bool] | None:
    if pattern is None:
        return None
    wanted = pattern.lower(), pattern.lower().replace("**/", "")  # **/ may stand for no folder
    matches = re.compile("|".join(map(fnmatch.translate, wanted))).match
    if "/" in pattern:
        return lambda relative: matches(relative.lower()) is not None
    return lambda relative: matches(posixpath.basename(relative).lower()) is not None


def _has_image_extension(relative: str) -> bool:
    _, dot, extension = relative.rpartition(".")
    return bool(dot) and extension.lower() in IMAGE_EXTENSIONS


def _list_folder(
    root: str, is_wanted: Callable[[str], bool], unlisted: Unlisted
) -> Iterator[ImageRef]:
    prefix = root if root.endswith("/") else f"{root}/"
    try:
        top = _folder_entries(prefix, "")
    except OSError as error:
        raise InputError(f"{prefix} cannot be listed ({error.strerror}).") from error
    return (
        ImageRef(image_id_of(relative), prefix + relative)
        for relative in _walk(prefix, top, unlisted)
        if is_wanted(relative)
    )


def _walk(root: str, pending: list[str], unlisted: Unlisted) -> Iterator[str]:
    """Paths relative to `root` of all that is no folder, from the last of `pending` to the first.

    Each folder is sorted by itself: with the slash that its paths go on with, all are in order.
    """
    while pending:
        path = pending.pop()
        if not path.endswith("/"):
            yield path
            continue
        try:
            pending += _folder_entries(root, path)
        except OSError as error:
            unlisted(image_id_of(path), str(error.strerror))


def _folder_entries(root: str, folder: str) -> list[str]:
    """Paths relative to `root`, a folder's with a slash at its end; the last in order first."""
    with os.scandir(root + folder) as entries:
        paths = [
            f"{folder}{entry.name}/" if entry.is_dir(follow_symlinks=False) else folder + entry.name
            for entry in entries
            if not entry.name.startswith(".")
            and not (entry.is_symlink() and _leads_to_folder(entry))
        ]
    return sorted(paths, key=image_id_of, reverse=True)


def _leads_to_folder(link: os.DirEntry[str]) -> bool:
    """Whether to leave a link out, since it may lead in a circle; False where it leads nowhere."""
    try:
        return link.is_dir()
    except OSError:
        return False


def _read_list(
    lines: IO[bytes], source: str, base: str, is_wanted: Callable[[str], bool] | None
) -> Iterator[ImageRef]:
    seen: set[str] = set()
    with lines, _saying_which(source):
        for number, line in enumerate(lines):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
            text = line.decode("utf-8", "surrogateescape").removesuffix("\n").removesuffix("\r")
            name = _normalised(text)
            if not text.strip() or name in seen or not (is_wanted is None or is_wanted(name)):
                continue
            seen.add(name)
            yield ImageRef(image_id_of(name), posixpath.join(base, name))


def _normalised(line: str) -> str:
    """Without `./` and doubled slashes. `..` stays: behind a link it is another folder."""
    root = "/" if line.startswith("/") else ""
    return root + "/".join(part for part in line.split("/") if part not in ("", "."))


def _read_bytes(path: Path) -> bytes:
    with _saying_which(path):
        return path.read_bytes()


@contextmanager
def _saying_which(file: object) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UsageError(f"There is no {file}; check the path.") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}).") from error


def read_annotations(path: str | os.PathLike[str]) -> list[AnnotatedImage]:
    """Read captions in any known format, told by its content, in order of first appearance.

    Captions come back in NFC with single spaces. Raises UsageError if the file is missing, and
    one InputError that counts everything wrong with it and shows the first ten places.
    """
    return ANNOTATION_READERS[detect_format(path)](Path(path))


def detect_format(path: str | os.PathLike[str]) -> str:
    """The key of `ANNOTATION_READERS` for a file, by its first line that is not blank."""
    lines = _read_bytes(Path(path)).removeprefix(b"\xef\xbb\xbf").splitlines()
    first = next((line.strip() for line in lines if line.strip()), b"")
    if first.startswith(b"["):
        return "ai-challenger"
    if not first.startswith(b"{"):
        return "flickr8k"
    is_one_record = first.endswith(b"}") and b'"annotations"' not in first
    return "jsonl" if is_one_record or Path(path).suffix == ".jsonl" else "coco"


class _Annotations:
    """Gathers captions by photo, and everything that is wrong with the file, to report at once.

    `place` is what follows the file's name in a report: `:12` or `: entry 3`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.captions: dict[str, list[str]] = {}
        self.splits: dict[str, str] = {}
        self.problems: list[str] = []

    def report(self, place: str, reason: str) -> None:
        self.problems.append(f"{self.path}{place}: {reason}")

    def add_image(self, place: str, image_id: object, split: object) -> bool:
        """Whether it is one; a photo that stands in several places is the same photo."""
        if not isinstance(image_id, str) or not image_id:
            self.report(place, f"the name of the photo is {_shown(image_id)}, not a text")
            return False
        self.captions.setdefault(image_id, [])
        if isinstance(split, str) and self.splits.setdefault(image_id, split) != split:
            self.report(place, f"{image_id} stands in two splits")
        return True

    def add_caption(self, place: str, image_id: str, caption: object) -> None:
        reason = _caption_problem(caption)
        if reason is None:
            self.captions[image_id].append(_clean(str(caption)))
        else:
            self.report(place, reason)

    def finish(self) -> list[AnnotatedImage]:
        if not self.problems and not self.captions:
            self.report("", "no captions")
        if self.problems:
            count = len(self.problems)
            shown = "\n".join(
                f"  {printable(problem)}" for problem in self.problems[:SHOWN_PROBLEMS]
            )
            raise InputError(
                f"{self.path} has {count} wrong {'entry' if count == 1 else 'entries'}; "
                f"correct or remove {'it' if count == 1 else 'them'}:\n{shown}"
            )
        return [
            AnnotatedImage(image_id, tuple(captions), self.splits.get(image_id))
            for image_id, captions in self.captions.items()
        ]


def _shown(value: object) -> str:
    return MISSING if value is None else repr(value)[:40]


def _caption_problem(caption: object) -> str | None:
    if not isinstance(caption, str):
        return f"the caption is {_shown(caption)}, not a text"
    if not caption.strip():
        return "empty caption"
    if re.fullmatch(r"""\s*\[\s*(['"]).*\1\s*\]\s*""", caption, re.DOTALL):
        return "the caption is a list written as text; write one caption each"
    if re.search("[\ud800-\udfff]", caption):
        return "the caption holds half a character (a lone surrogate)"
    return None


def _clean(caption: str) -> str:
    return " ".join(unicodedata.normalize("NFC", caption).split())


def _text_lines(annotations: _Annotations) -> Iterator[tuple[str, str]]:
    """(place, line) of each line that is not blank; lines that are not UTF-8 are reported."""
    data = _read_bytes(annotations.path).removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(data.split(b"\n"), start=1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            annotations.report(f":{number}", "not UTF-8")
            continue
        if text:
            yield f":{number}", text


def _read_flickr8k(path: Path) -> list[AnnotatedImage]:
    """`<file name>#<kind>#<n> <caption>` a line, `#<kind>` optional; splits in files beside."""
    annotations = _Annotations(path)
    splits = _splits_beside(annotations)
    seen: set[tuple[str, str | None, str]] = set()
    for place, line in _text_lines(annotations):
        match = FLICKR_LINE.fullmatch(line)
        if match is None:
            annotations.report(place, "not `<file name>#<number> <caption>`")
            continue
        name, kind, number, caption = match.groups()
        if (name, kind, number) in seen:
            annotations.report(place, f"caption {number} of {name} stands twice")
        seen.add((name, kind, number))
        split = splits.get(name) or splits.get(posixpath.splitext(name)[0])
        if annotations.add_image(place, name, split):
            annotations.add_caption(place, name, caption or "")
    return annotations.finish()


def _splits_beside(annotations: _Annotations) -> dict[str, str]:
    """Split by photo name, with or without extension as the lists have it."""
    splits: dict[str, str] = {}
    for split in SPLITS:
        path = annotations.path.with_name(f"{split}.txt")
        if path == annotations.path or not path.is_file():
            continue
        for name in _read_bytes(path).decode("utf-8", "surrogateescape").split():
            if splits.setdefault(name, split) != split:
                annotations.report("", f"{name} stands in {splits[name]}.txt and in {path.name}")
    return splits


def _read_jsonl(path: Path) -> list[AnnotatedImage]:
    """`{"image_id": ..., "captions": [...]}` a line, or one `"caption"`; `"split"` optional."""
    annotations = _Annotations(path)
    for place, line in _text_lines(annotations):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            annotations.report(f"{place}:{error.colno}", error.msg)
            continue
        _add_record(annotations, place, record)
    return annotations.finish()


def _read_ai_challenger(path: Path) -> list[AnnotatedImage]:
    """One array of `{"image_id": ..., "caption": [five texts]}`, as AI Challenger 2017 has it."""
    annotations = _Annotations(path)
    for place, record in _entries(_read_json(path)):
        _add_record(annotations, place, record)
    return annotations.finish()


def _add_record(annotations: _Annotations, place: str, record: Any) -> None:
    if not isinstance(record, dict):
        annotations.report(place, f"{_shown(record)} is not an object")
        return
    captions = record.get("captions", record.get("caption"))
    listed = captions if isinstance(captions, list) else [captions]
    if not listed:
        annotations.report(place, "no caption")
    elif annotations.add_image(place, record.get("image_id"), record.get("split")):
        for caption in listed:
            annotations.add_caption(place, record["image_id"], caption)


def _read_coco(path: Path) -> list[AnnotatedImage]:
    """`images` with `id` and `file_name`, `annotations` with `image_id` and `caption`."""
    document = _read_json(path)
    annotations = _Annotations(path)
    names: dict[str, str] = {}
    for place, image in _section(annotations, document, "images"):
        key = _shown(image.get("id"))
        if key in names or key == MISSING:
            annotations.report(place, f"the id is {key if key == MISSING else 'taken'}")
        elif annotations.add_image(place, image.get("file_name"), image.get("split")):
            names[key] = image["file_name"]
    for place, annotation in _section(annotations, document, "annotations"):
        key = _shown(annotation.get("image_id"))
        if key in names:
            annotations.add_caption(place, names[key], annotation.get("caption"))
        else:
            annotations.report(place, f"unknown image_id ({key})")
    for name in names.values():
        if not annotations.captions[name]:
            annotations.report("", f"{name} has no caption")
    return annotations.finish()


def _section(
    annotations: _Annotations, document: dict[str, Any], name: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each object in one of the document's lists; others are reported."""
    records = document.get(name)
    if not isinstance(records, list):
        annotations.report("", f"no list `{name}`")
        return
    for place, record in _entries(records, f"{name} entry"):
        if isinstance(record, dict):
            yield place, record
        else:
            annotations.report(place, f"{_shown(record)} is not an object")


def _read_json(path: Path) -> Any:
    data = _read_bytes(path).removeprefix(b"\xef\xbb\xbf")
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8; save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}:{error.colno}: {error.msg}") from error


def _entries(records: list[Any], name: str = "entry") -> Iterator[tuple[str, Any]]:
    return ((f": {name} {number}", record) for number, record in enumerate(records, start=1))


ANNOTATION_READERS: dict[str, Callable[[Path], list[AnnotatedImage]]] = {
    "flickr8k": _read_flickr8k,
    "ai-challenger": _read_ai_challenger,
    "coco": _read_coco,
    "jsonl": _read_jsonl,
}
