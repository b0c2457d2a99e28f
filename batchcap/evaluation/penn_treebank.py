"""Words of a caption as in coco-caption's PTBTokenizer, without Java.

Replaces Stanford CoreNLP 3.4.1 `PTBTokenizer -preserveLines -lowerCase` and coco-caption's list of
punctuation. The rules were found by running that program: equal on Chinese captions cut by jieba;
not on web addresses, English abbreviations before a full stop, contractions such as `gonna`, and
scripts with combining vowels.
"""

import re

# coco-caption's list, matched after -lowerCase: "-LRB-" never matches, so brackets stay as "-lrb-".
# "!!", "，" and "。" stay, too.
DROPPED = re.compile("[\"'`.?!,:;\u2010\u2011]|\\.{2,}|-+")

HYPHENS = "\u2010\u2011"
BRACKETS = str.maketrans(
    {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
)

# Characters beyond ASCII that are rewritten; "" joins the neighbours.
REWRITTEN = {
    "\u00ad": "",
    "\u2019": "'",
    **dict.fromkeys("\u20ac\u00a4\u20a0", " $ "),
    "\u00a3": " # ",
    "\u00a2": " cents ",
    "\u00bc": " 1/4 ",
    "\u00bd": " 1/2 ",
    "\u00be": " 3/4 ",
    "\u2153": " 1/3 ",
    "\u2154": " 2/3 ",
}

# Symbols beyond ASCII that are a word each. Others (《》「」【】〇, emoji) separate words and are
# dropped.
SYMBOL = re.compile(
    "[\u00a1\u00a5-\u00a9\u00ac\u00ae-\u00b4\u00b6-\u00b9\u00bf\u00d7\u00f7"
    "\u2016\u2017\u201a\u201e-\u2023\u2030-\u2038\u203b\u203e-\u2042\u2044\u2070\u2074-\u207e"
    "\u2080-\u208e\u20a4\u2100\u2101\u2103-\u2106\u2108\u2109\u2114\u2116-\u2118\u211e-\u2123"
    "\u2125\u2127\u2129\u212e\u213a\u213b\u2140-\u2144\u214a-\u214d\u214f\u2155-\u215e"
    "\u2190-\u2bff\u3001\u3002\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
    "\uffe0\uffe1\uffe5\uffe6]"
)

LETTER = r"(?:[^\W\d_]|[\u0300-\u036f])"  # or a combining mark
ALNUM = rf"(?:{LETTER}|\d)"
NUMBER = r"(?:\d*(?:[.:,]\d+)+|\d+)"
# The longest match wins, then the earlier rule. Each group of a rule is a word.
RULES = [
    re.compile(rule)
    for rule in (
        rf"({LETTER}{ALNUM}*(?:[.!?]{LETTER}{ALNUM}*)*)",
        rf"([-+]?{NUMBER})",
        # 2008年, e-mail, O'Neil
        rf"((?:[dDoOlL]'(?={ALNUM}))?{ALNUM}+(?:[-{HYPHENS}]{ALNUM}+)*)",
        rf"({ALNUM}(?:{ALNUM}|[.,])*(?:[-_]{ALNUM}+)+)",  # 1.5-2
        r"([A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2})",  # A/B
        r"([A-Z]+(?:[+&][A-Z]+)+)",  # AT&T
        r"((?:[A-Za-z]\.)+)",  # U.S.
        r"((?i:mrs?|ms|dr|st|jr|no(?=\.\d))\.)",  # No.1
        rf"({LETTER}{ALNUM}*)('(?:[msdMSD]|re|ve|ll)(?![A-Za-z]))",
        r"([A-Za-z]*[A-MO-Za-mo-z])(n't)",
        r"('(?:[msdMSD]|re|ve|ll))(?![A-Za-z])",
        r"([A-Z]*\$)",
        rf"(#{LETTER}+)",
        r"(@[A-Za-z_][A-Za-z_0-9]*)",
        r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])(?![A-Za-z])",  # a smiley: the ":(" of 图:(左) too
        r"([cC]\+\+|[cCfF]#)",
        r"([?!]+|\.{2,}|-+|_+|\*+|@+|#+|<<|>>)",
        r"(\S)",
    )
]


def _plain(char: str) -> str:
    """Return what the tokenizer makes of a character: only ASCII, letters and digits are left."""
    if "!" <= char <= "~":
        return char
    if char in REWRITTEN:
        return REWRITTEN[char]
    if SYMBOL.match(char):
        return f" {char} "
    joins = char.isalpha() or char.isdecimal() or "\u0300" <= char <= "\u036f" or char in HYPHENS
    return char if joins and char < "\U00010000" else " "


def ptb_words(text: str) -> list[str]:
    """Return the words of a caption cut by spaces: split further, in lower case, some dropped.

    A caption is one line: line separators of other programs count as a space.
    """
    words: list[str] = []
    for chunk in text.split():
        if chunk.isalpha() and max(chunk) < "\U00010000":
            words.append(chunk.lower())
            continue
        for part in "".join(map(_plain, chunk)).split():
            words.extend(_part_words(part))
    return words


def _part_words(part: str) -> list[str]:
    words: list[str] = []
    at = 0
    while at < len(part):
        matches = (match for rule in RULES if (match := rule.match(part, at)))
        longest = max(matches, key=lambda match: match.end())
        words.extend(word.lower().translate(BRACKETS) for word in longest.groups())
        at = longest.end()
    return [word for word in words if not DROPPED.fullmatch(word)]
