import pytest

from batchcap.caption_files.predictions import GeneratedCaption
from batchcap.evaluation.tokenisation import characters, profile_of
from batchcap.settings import TokenKind


def cut(tokens: TokenKind, caption: str, words: tuple[str, ...] | None = None) -> list[str]:
    return profile_of(tokens).cut(GeneratedCaption("a", caption, words))


def test_words_are_jiebas_without_punctuation() -> None:
    assert cut(TokenKind.WORDS, "一只狗，在草地上。") == ["一只", "狗", "在", "草地", "上"]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("两只狗。", ["两", "只", "狗"]),
        ("穿T恤的人，3个", ["穿", "T", "恤", "的", "人", "3", "个"]),
        ("NBA 2008年", ["NBA", "2008", "年"]),
        ("𠀀〇豈", ["𠀀", "〇", "豈"]),
        ("_ - ……！", []),
    ],
)
def test_chinese_characters_are_separate_and_others_stay_together(
    caption: str, expected: list[str]
) -> None:
    assert characters(caption) == expected
    assert cut(TokenKind.CHAR, caption) == expected


def test_pretokenized_words_are_the_models_or_separated_by_spaces() -> None:
    assert cut(TokenKind.PRETOKENIZED, "一只狗。", ("一只", "狗。")) == ["一只", "狗。"]
    assert cut(TokenKind.PRETOKENIZED, "一只 狗 。") == ["一只", "狗", "。"]
    assert profile_of(TokenKind.PRETOKENIZED).cut_reference("一只 狗 。") == ["一只", "狗", "。"]


@pytest.mark.parametrize("tokens", TokenKind)
def test_failed_photo_has_no_words(tokens: TokenKind) -> None:
    assert profile_of(tokens).cut(GeneratedCaption("a", None)) == []


def test_profiles_describe_themselves() -> None:
    described = [profile_of(tokens).described for tokens in TokenKind]
    assert [first.removeprefix("tok=") for first, *_ in described] == list(TokenKind)
    assert "jieba=0.42.1" in profile_of(TokenKind.WORDS).described
