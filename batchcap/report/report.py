"""Writes a page about a run's output: photos, captions, scores, attention.

The page is a single file that loads nothing. Names, captions and messages are untrusted: the
template escapes them, the script sets them as text, and a content security policy lets nothing else
run.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from batchcap.caption_files.predictions import check_out, read_rows
from batchcap.captioning.summary import read_summary
from batchcap.errors import InputError
from batchcap.evaluation.metrics import METRIC_NAMES
from batchcap.evaluation.per_image import read_evaluation
from batchcap.photos.archives import Columns
from batchcap.process.wording import counted, printable
from batchcap.report.cards import Digest, digest_rows, grid_of
from batchcap.report.thumbnails import (
    CHANGED,
    MISSING,
    Thumbnail,
    find_photos,
    make_thumbnails,
)
from batchcap.rows.layout import Layout
from batchcap.rows.parquet import saying_where
from batchcap.settings import DecodeSettings, ReportSettings
from batchcap.storage.files import followed, replace_text

TEMPLATES = Path(__file__).parent
BARS = 20  # of the histogram, each 5 % wide


def write_report(settings: ReportSettings) -> str:
    """Write the page, whole or not at all; return a message for the user.

    Raises:
        UsageError: a file or INPUT is missing, or OUT is one that is read or not a plain file.
        InputError: captions or evaluation are damaged or do not belong together.
        OutputError: the page can't be written.
    """
    check_out(settings.out, settings.captions, settings.evaluation)
    evaluation = read_evaluation(settings.evaluation) if settings.evaluation else ([], "", {})
    evaluated = {row["image_id"]: row for row in evaluation[0]}
    digest = digest_rows(
        read_rows(settings.captions), settings.sample, settings.seed, evaluated=evaluated
    )
    if settings.evaluation and not digest.scored:
        raise InputError(
            f"{settings.evaluation} has scores of none of these captions: evaluate them again"
        )
    problems = _add_photos(digest, settings)
    text = render_page(digest, settings, evaluation[1], evaluation[2])
    with saying_where(settings.out):
        replace_text(settings.out, text.encode("utf-8", "replace").decode())  # lone surrogates
    return _message(settings, digest, problems)


def _add_photos(digest: Digest, settings: ReportSettings) -> list[str]:
    """Add photos of `settings.images` to the cards; return why others have none."""
    if settings.images is None:
        return []
    captioned = {shown.card["id"]: shown for shown in digest.shown if not shown.card["failed"]}
    columns = Columns(settings.image_column, settings.id_column)
    refs = find_photos(str(settings.images), captioned, columns)
    sums = {image_id: shown.sha256 for image_id, shown in captioned.items()}
    found = dict(make_thumbnails(refs, sums))
    problems = []
    for image_id, shown in captioned.items():
        photo = found.get(image_id, MISSING)
        if isinstance(photo, Thumbnail):
            shown.card["photo"] = base64.b64encode(photo.webp).decode()
            shown.card["size"] = [photo.width, photo.height]
        else:
            shown.card["problem"] = photo
            problems.append(photo)
    return problems


def render_page(
    digest: Digest, settings: ReportSettings, signature: str, scores: Mapping[str, float]
) -> str:
    """Return the page as HTML; `signature` and `scores` are of the evaluation, if any."""
    style, script = (
        Markup((TEMPLATES / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js")
    )
    data = {
        "grid": grid_of(digest.metadata),
        "metrics": METRIC_NAMES,
        "photos": settings.images is not None,
        "cards": [shown.card for shown in digest.shown],
    }
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        name=printable(settings.captions.absolute().name),
        digest=digest,
        seed=settings.seed,
        made_with=made_with(digest.metadata),
        attention=digest.metadata.get("batchcap.attention", ""),
        last_run=last_run(read_summary(Layout(followed(settings.captions)).summary)),
        histogram=histogram(digest.confidences),
        scores={METRIC_NAMES.get(key, key): f"{value:.1f}" for key, value in scores.items()},
        signature=signature,
        scored=counted(digest.scored, "caption"),
        has_evaluation=settings.evaluation is not None,
        style=style,
        script=script,
        style_hash=content_hash(style),
        script_hash=content_hash(script),
        data=Markup(json_for_html(data)),
    )


def content_hash(text: str) -> str:
    """Return the hash by which a Content-Security-Policy allows an inline block."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def json_for_html(value: Any) -> str:
    """Return JSON in which nothing looks like a tag, a comment or the end of a script line."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)


def made_with(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return how the captions were generated, from the metadata of their file."""
    facts = {
        "Model": metadata.get("batchcap.model", "")[:12],
        "Words": _decoding(metadata.get("batchcap.decode", "")),
        "Runtime": metadata.get("batchcap.runtime", ""),
        "Precision": metadata.get("batchcap.precision", ""),
        "Attention": metadata.get("batchcap.attention", ""),
        "batchcap": metadata.get("batchcap.version", ""),
    }
    return {name: value for name, value in facts.items() if value}


def _decoding(text: str) -> str:
    try:
        settings = DecodeSettings(**json.loads(text))
        default = asdict(DecodeSettings(settings.max_length))
        included = {"max_length", "beam_size", "temperature"}  # in str(settings)
        others = [
            f"{name.replace('_', ' ')} {value}"
            for name, value in asdict(settings).items()
            if name not in included and value != default[name]
        ]
        return ", ".join([str(settings), *others])
    except (ValueError, TypeError):  # from another version
        return text


def last_run(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return facts about the last run from its summary; empty without one."""
    stages = summary.get("stage_seconds")
    stages = stages.items() if isinstance(stages, dict) else ()
    facts = {
        "Outcome": str(summary.get("outcome", "")),
        "Started": _moment(summary.get("started_at")),
        "Ended": _moment(summary.get("ended_at")),
        "Captioning": _with_unit(summary.get("seconds"), "s"),
        "Rate": _with_unit(summary.get("images_per_second"), "photos a second"),
        "All threads": ", ".join(f"{stage} {_with_unit(s, 's')}" for stage, s in stages),
    }
    return {name: value for name, value in facts.items() if value}


def _moment(text: object) -> str:
    return str(text or "").replace("T", " ").replace("+00:00", " UTC")


def _with_unit(number: object, unit: str) -> str:
    return f"{number:,.1f} {unit}" if isinstance(number, int | float) else ""


def histogram(confidences: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Count captions by geometric mean probability of a word, 5 % per bar.

    `bars` are (percent at the left end, captions, height relative to the highest).
    """
    counts, _ = np.histogram(confidences, bins=BARS, range=(0, 1))
    highest = max(int(counts.max()), 1)
    width = 100 // BARS
    return {
        "bars": [(n * width, int(count), count / highest) for n, count in enumerate(counts)],
        "width": width,
        "highest": highest,
        "median": float(np.median(confidences)) if len(confidences) else None,
    }


def _message(settings: ReportSettings, digest: Digest, problems: list[str]) -> str:
    size = settings.out.stat().st_size / 2**20
    text = (
        f"{printable(str(settings.out))}: {len(digest.shown):,} of {digest.photos:,} photos, "
        f"{size:.1f} MiB"
    )
    if settings.images is None:
        return f"{text}; add --images INPUT to show the photos"
    counts = {
        "missing": problems.count(MISSING),
        "changed since": problems.count(CHANGED),
    }
    counts["not shown"] = len(problems) - sum(counts.values())
    reasons = [f"{count:,} {reason}" for reason, count in counts.items() if count]
    return "; ".join([text, *reasons])
