"""Caption metrics on lists of words, as coco-caption defines them. Cuts no words itself."""

import contextlib
import io
from collections.abc import Sequence

from batchcap.contracts import UsageError

Words = Sequence[str]


def score_captions(
    hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]
) -> dict[str, float]:
    """Corpus scores, times 100, of one hypothesis an image against its references.

    BLEU-1 to BLEU-4 (Papineni et al. 2002, closest reference length), ROUGE-L (Lin 2004, beta 1.2)
    and CIDEr-D (Vedantam et al. 2015; document frequencies from these references, so that scores of
    different sets of images do not compare), all as pycocoevalcap computes them.

    Raises:
        UsageError: pycocoevalcap is not installed.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise UsageError(
            "caption metrics need pycocoevalcap: pip install 'batchcap[evaluate]'"
        ) from error
    found = {image: [" ".join(words)] for image, words in enumerate(hypotheses)}
    expected = {
        image: [" ".join(words) for words in captions] for image, captions in enumerate(references)
    }
    with contextlib.redirect_stdout(io.StringIO()):  # the scorers print
        bleu, _ = Bleu(4).compute_score(expected, found)
        rouge_l, _ = Rouge().compute_score(expected, found)
        cider_d, _ = Cider().compute_score(expected, found)
    scores = {f"bleu_{n}": value for n, value in enumerate(bleu, start=1)}
    scores |= {"rouge_l": rouge_l, "cider_d": cider_d}
    return {name: 100 * float(value) for name, value in scores.items()}


def signature(references: Sequence[Sequence[Words]]) -> str:
    """How scores were made: only scores of equal signatures compare."""
    from importlib.metadata import version

    counts = {len(captions) for captions in references}
    per_image = str(counts.pop()) if len(counts) == 1 else f"{min(counts)}-{max(counts)}"
    return "|".join(
        [
            "tok=words",
            f"jieba={version('jieba')}",
            "hmm=1",
            "punctuation=dropped",
            f"refs={per_image}",
            f"n={len(references)}",
            "bleu=closest",
            "cider=D,sigma6,idf=eval",
            f"pycocoevalcap={version('pycocoevalcap')}",
        ]
    )
