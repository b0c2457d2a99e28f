"""Describes captions and, with references, scores them."""

import logging
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from batchcap.caption_files.annotations import AnnotatedImage, read_annotations
from batchcap.caption_files.matching import match
from batchcap.caption_files.predictions import GeneratedCaption, check_out, read_captions
from batchcap.errors import InputError
from batchcap.evaluation.bootstrap import interval, p_value, resampled
from batchcap.evaluation.meteor import SIGNATURE as METEOR_SIGNATURE
from batchcap.evaluation.meteor import with_meteor
from batchcap.evaluation.metrics import METRICS, Scores, overall_of, score_captions, signature
from batchcap.evaluation.per_image import write_evaluation
from batchcap.evaluation.result import Difference, Evaluation, Score
from batchcap.evaluation.tokenisation import Profile, profile_of
from batchcap.evaluation.traits import FIFTHS, Calibration, calibrate, traits_of
from batchcap.evaluation.warnings import (
    id_warnings,
    score_warnings,
    script_warnings,
    word_warnings,
)
from batchcap.process.wording import counted, printable
from batchcap.settings import EvaluateSettings, MatchBy

ByPlace = dict[int, GeneratedCaption]  # by the image's index in the references

log = logging.getLogger(__name__)


class Reference(NamedTuple):
    """The human captions of an image, and their words."""

    texts: list[str]
    words: list[list[str]]


@dataclass(frozen=True)
class Scored:
    """Captions of the images that have references, in their order, and their scores."""

    captions: list[GeneratedCaption]
    words: list[list[str]]
    scores: Scores

    @property
    def texts(self) -> list[str]:
        """The text of each caption."""
        return [one.caption or "" for one in self.captions]


def evaluate_captions(settings: EvaluateSettings) -> Evaluation:
    """Describe captions and, with references, score them.

    Raises:
        UsageError: a file or a program that metrics need is missing.
        InputError: a file is invalid, or captions and references have no image in common.
        OutputError: the scores per image cannot be written.
    """
    if settings.per_image is not None:
        check_out(settings.per_image, settings.captions, settings.references, settings.against)
    generated = read_captions(settings.captions)
    annotated = read_annotations(settings.references) if settings.references else []
    profile = profile_of(settings.tokens, annotated)
    evaluation = Evaluation(
        printable(settings.captions.name),
        traits_of(generated, profile, settings.training_captions),
        resamples=settings.resamples,
        seed=settings.seed,
    )
    if settings.references is not None:
        evaluation.references = printable(settings.references.name)
        _compare(evaluation, generated, annotated, profile, settings)
    return evaluation


def _compare(
    evaluation: Evaluation,
    generated: list[GeneratedCaption],
    annotated: list[AnnotatedImage],
    profile: Profile,
    settings: EvaluateSettings,
) -> None:
    """Add all results that need references."""
    ours = _by_place(evaluation, evaluation.captions, generated, annotated, settings.match_by)
    theirs = ours
    if settings.against is not None:
        evaluation.against = printable(settings.against.name)
        others = read_captions(settings.against)
        theirs = _by_place(evaluation, evaluation.against, others, annotated, settings.match_by)
    references = _references(evaluation, annotated, ours, theirs, profile)
    scored = _score(ours, references, profile, settings)
    evaluation.images = len(references)
    evaluation.signature = signature(profile.described, [one.words for one in references.values()])
    if settings.meteor:
        evaluation.signature += f"|{METEOR_SIGNATURE}"
    evaluation.scores = _with_intervals(scored.scores, settings)
    texts = [one.texts for one in references.values()]
    evaluation.warn(word_warnings(scored.texts, scored.words, texts))
    evaluation.warn(script_warnings(evaluation.captions, scored.texts, texts))
    if evaluation.against is not None:
        against = _score(theirs, references, profile, settings)
        evaluation.warn(script_warnings(evaluation.against, against.texts, texts))
        evaluation.differences = _differences(scored.scores, against.scores, settings)
    evaluation.calibration = _calibration(scored, settings)
    evaluation.warn(score_warnings(scored.scores.overall, len(references)))
    if settings.per_image is not None:
        columns = {
            "image_id": [one.image_id for one in scored.captions],
            "caption": scored.texts,
            "words": scored.words,
            "references": texts,
            "mean_logprob": [one.mean_logprob for one in scored.captions],
            **scored.scores.per_image,
        }
        write_evaluation(settings.per_image, columns, evaluation.signature, scored.scores.overall)


def _by_place(
    evaluation: Evaluation,
    name: str,
    generated: list[GeneratedCaption],
    annotated: list[AnnotatedImage],
    by: MatchBy,
) -> ByPlace:
    """Return captions whose image has references; warn about the others."""
    matched = match(
        [(one.image_id, one.number) for one in generated],
        [(image.image_id, image.number) for image in annotated],
        by,
        names=(name, str(evaluation.references)),
    )
    evaluation.matched_by = evaluation.matched_by or matched.way.name
    evaluation.warn(id_warnings(name, generated, annotated, matched))
    return {place: generated[i] for i, place in matched.pairs if generated[i].caption is not None}


def _references(
    evaluation: Evaluation,
    annotated: list[AnnotatedImage],
    ours: ByPlace,
    theirs: ByPlace,
    profile: Profile,
) -> dict[int, Reference]:
    """Return references of the compared images, by place, without those that have no words."""
    if alone := len(ours.keys() ^ theirs.keys()):
        images = counted(alone, "image")
        evaluation.warn([f"skipped {images} captioned in only one of the two files"])
    references: dict[int, Reference] = {}
    wordless = 0
    for place in sorted(ours.keys() & theirs.keys()):
        reference = Reference([], [])
        for text in annotated[place].captions:
            if words := profile.cut_reference(text):
                reference.texts.append(text)
                reference.words.append(words)
            else:
                wordless += 1
        if reference.texts:
            references[place] = reference
    if wordless:
        evaluation.warn([f"skipped {counted(wordless, 'reference')} without words"])
    if not references:
        raise InputError(
            f"no image of {evaluation.captions} has both a caption and a reference with words in "
            f"{evaluation.references}: check that both files are about the same photos"
        )
    return references


def _score(
    captions: ByPlace,
    references: dict[int, Reference],
    profile: Profile,
    settings: EvaluateSettings,
) -> Scored:
    compared = [captions[place] for place in references]
    words = list(map(profile.cut, compared))
    reference_words = [reference.words for reference in references.values()]
    log.info("scoring %d captions", len(words))
    scores = score_captions(words, reference_words)
    if settings.meteor:
        scores = with_meteor(scores, words, reference_words)
    return Scored(compared, words, scores)


def _with_intervals(scores: Scores, settings: EvaluateSettings) -> dict[str, Score]:
    values = overall_of(resampled(scores.statistics, settings.resamples, settings.seed))
    intervals = dict(zip(METRICS, map(interval, values.T), strict=True))
    return {metric: Score(value, intervals.get(metric)) for metric, value in scores.overall.items()}


def _differences(
    scores: Scores, others: Scores, settings: EvaluateSettings
) -> dict[str, Difference]:
    """Return differences, resampling the same images for both, so that hard images cancel out."""
    ours, theirs = (
        overall_of(resampled(one.statistics, settings.resamples, settings.seed))
        for one in (scores, others)
    )
    draws = dict(zip(METRICS, (ours - theirs).T, strict=True))
    found = {}
    for metric, other in others.overall.items():
        certainty = (interval(draws[metric]), p_value(draws[metric])) if metric in draws else ()
        found[metric] = Difference(other, scores.overall[metric] - other, *certainty)
    return found


def _calibration(scored: Scored, settings: EvaluateSettings) -> Calibration | None:
    confidence = [one.mean_logprob for one in scored.captions if one.mean_logprob is not None]
    if len(confidence) < max(len(scored.captions), FIFTHS):
        return None
    cider_d = scored.scores.per_image["cider_d"]
    return calibrate(np.array(confidence), cider_d, settings.resamples, settings.seed)
