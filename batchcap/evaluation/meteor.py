"""METEOR (Denkowski and Lavie 2014), by its authors' Java program in pycocoevalcap.

It is configured for English, as in coco-caption and AI Challenger: each Chinese character counts as
a word, and only equal ones match, since stems, synonyms and paraphrases are English.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from batchcap.errors import BatchcapError, UsageError
from batchcap.evaluation.metrics import Scores, Words

SIGNATURE = "meteor=1.5,en,norm"
JAR = "meteor/meteor-1.5.jar"
# In a locale with decimal commas, METEOR cannot read its own numbers; Java needs the country too.
LOCALE = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8")
FIELD = " ||| "
REASON_LINES = 5
TIMEOUT_S = 3600.0  # 30,000 captions take half a minute


def with_meteor(
    scores: Scores, hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]
) -> Scores:
    """Return the scores with `meteor`, times 100, overall and per image.

    Raises:
        UsageError: Java or pycocoevalcap is not installed.
        BatchcapError: the program fails.
    """
    questions = [
        FIELD.join(["SCORE", *map(_text, captions), _text(words)])
        for words, captions in zip(hypotheses, references, strict=True)
    ]
    statistics = _ask(questions)
    answers = _ask([FIELD.join(["EVAL", *statistics])])
    *per_image, overall = (100 * float(answer) for answer in answers)
    return replace(
        scores,
        overall=scores.overall | {"meteor": overall},
        per_image=scores.per_image | {"meteor": np.array(per_image)},
    )


def _text(words: Words) -> str:
    """Join words by spaces, without the field separator of a request."""
    return " ".join(words).replace(FIELD.strip(), "")


def _ask(lines: Sequence[str]) -> list[str]:
    """Return the program's answers, one per line."""
    java = shutil.which("java")
    package = importlib.util.find_spec("pycocoevalcap")
    if java is None or package is None or not package.submodule_search_locations:
        raise UsageError(
            "METEOR needs Java (`java`) and pycocoevalcap: install them, or omit --meteor"
        )
    jar = Path(package.submodule_search_locations[0]) / JAR
    command = [java, *LOCALE, "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    try:
        done = subprocess.run(
            command,
            input="".join(f"{line}\n" for line in lines),
            capture_output=True,
            encoding="utf-8",
            check=True,
            timeout=TIMEOUT_S,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BatchcapError(f"the METEOR program failed: {_reason(error)}") from error
    return done.stdout.splitlines()


def _reason(error: Exception) -> str:
    """Return the first lines that Java printed, without answers and stack trace."""
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    lines = f"{error.stdout}\n{error.stderr}".splitlines()
    messages = [line for line in lines if not re.match(r"[\d\s]|Picked up |$", line)]
    return "; ".join(messages[:REASON_LINES]) or str(error)
