"""The page in Chromium: sorting, finding, attention, keyboard, contrast."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.report import evaluation, make_photo, names
from helpers.rows import LOOK, METADATA, captioned_row, failed_row
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from batchcap.evaluation.per_image import write_evaluation
from batchcap.rows.parquet import Row

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


def hostile(text: str) -> str:
    """A text that would run code or break the page if it were not escaped."""
    return (
        f"{text}</script><script>window.harm=1</script><img src=x onerror=harm=1>'\"`"
        "<!--{{7*7}}${window.harm=1}&lt;\u2028\u2029\u202e\u0000]]>\\"
    )


def confident(image_id: str, probability: float, **columns: Any) -> Row:
    return captioned_row(image_id, mean_logprob=math.log(probability), **columns)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.skip("install Chromium to test the page")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def look_at(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open pages; at the end, assert that they requested only their file and logged nothing."""
    complaints: list[str] = []
    opened: list[Page] = []

    def open_page(path: Path, **options: Any) -> Page:
        page = browser.new_context(**options).new_page()
        page.add_init_script(
            "window.violations = [];"
            "addEventListener('securitypolicyviolation', (e) => violations.push(e.blockedURI))"
        )
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: check_request(request.url, path))
        page.goto(path.as_uri())
        opened.append(page)
        return page

    def check_request(url: str, path: Path) -> None:
        if url != path.as_uri() and not url.startswith("data:"):
            complaints.append(url)

    yield open_page
    for page in opened:
        complaints += page.evaluate("violations")
        assert page.evaluate("window.harm") is None
        page.context.close()
    assert complaints == []


def announced(page: Page) -> str:
    return page.locator("[aria-live=polite]").inner_text()


def test_cards_are_sorted_by_confidence_name_and_score(
    tmp_path: Path, write: Callable[..., Path], look_at: Callable[..., Page]
) -> None:
    rows = [confident("b", 0.5), failed_row("d"), confident("a", 0.2), confident("c", 0.9)]
    scored = evaluation(tmp_path / "s.parquet", [*"abc"], ["一只photo"] * 3, [5.0, 9.0, 7.0])
    page = look_at(write(rows, evaluation=scored))
    orders = {}
    for option in page.locator("#order option").all():
        page.select_option("#order", option.get_attribute("value"))
        orders[option.inner_text()] = "".join(names(page))
    assert orders == {
        "as in the file": "bdac",
        "by file name": "abcd",
        "least sure first": "abcd",
        "most sure first": "cbad",
        "lowest CIDEr-D first": "acbd",
        "highest CIDEr-D first": "bcad",
    }


def test_scores_and_references_are_on_the_card(
    tmp_path: Path, write: Callable[..., Path], look_at: Callable[..., Page]
) -> None:
    scored = evaluation(tmp_path / "s.parquet", ["a"], ["一只photo"], [5.0])
    page = look_at(write([captioned_row("a")], evaluation=scored))
    assert page.locator(".scores").inner_text().split("\n") == ["BLEU-4 5.0", "CIDEr-D 5.0"]
    page.locator("summary", has_text="1 reference").click()
    assert page.locator(".references li").inner_text() == "人写的a"


def test_orders_by_score_need_scores(
    write: Callable[..., Path], look_at: Callable[..., Page]
) -> None:
    page = look_at(write([captioned_row("a")]))
    assert not page.locator("#order option", has_text="CIDEr").count()


def test_cards_are_found_by_text_and_status_and_their_number_is_announced(
    write: Callable[..., Path], look_at: Callable[..., Page]
) -> None:
    failed = failed_row("c.jpg", error_type="truncated", error_message="The file ends early.")
    noted = captioned_row("d.jpg", error_type="truncated", error_message="What there is of it.")
    rows = [captioned_row("Boat.JPG", "船"), captioned_row("b.jpg", "狗"), failed, noted]
    page = look_at(write(rows))
    assert announced(page) == "4 of 4 photos"
    for text, expected in {
        "boat": ["Boat.JPG"],
        "一只狗": ["b.jpg"],
        "ends early": ["c.jpg"],
        " TRUNC ": ["c.jpg", "d.jpg"],
        ".*": [],
        "": ["Boat.JPG", "b.jpg", "c.jpg", "d.jpg"],
    }.items():
        page.fill("#find", text)
        assert names(page) == expected, text
        assert announced(page) == f"{len(expected)} of 4 photos"
    for status, expected in {
        "captioned": ["Boat.JPG", "b.jpg", "d.jpg"],
        "failed": ["c.jpg"],
        "noted": ["d.jpg"],
    }.items():
        page.select_option("#status", status)
        assert names(page) == expected, status
    page.fill("#find", "boat")
    assert announced(page) == "0 of 4 photos"


@pytest.fixture
def looked(tmp_path: Path, write: Callable[..., Path]) -> Path:
    """A page of photos with attention: whole grids, summaries alone, and none."""
    sums = {name: make_photo(tmp_path / "photos" / name) for name in ("full", "summary", "none")}
    maps = [[0.0] * 49, [0.0] * 49]
    maps[0][16] = maps[1][48] = 0.5
    look = [{**LOOK, "peak_row": 2, "peak_col": 2}, {**LOOK, "peak_row": 6, "peak_col": 6}]
    rows = [
        captioned_row("full", "船", attention_map=maps, attention=look),
        captioned_row("summary", "狗", attention=look, attention_map=None),
        captioned_row("none", "猫", attention=None, attention_map=None),
    ]
    for row in rows:
        row["sha256"] = sums[row["image_id"]]
    return write(rows, images=tmp_path / "photos")


def word(page: Page, text: str) -> Locator:
    return page.locator(".word", has_text=text).and_(page.locator(".card .word"))


def overlay(page: Page) -> list[str]:
    parts = page.locator(".photo > :not(img)").all()
    return [str(part.get_attribute("class")) for part in parts]


VEIL = """() => {
  const map = document.querySelector("canvas.map");
  const pixels = map.getContext("2d").getImageData(0, 0, map.width, map.height).data;
  return [map.width, map.height, pixels.filter((_, at) => at % 4 === 3).indexOf(0)];
}"""


def test_pointing_at_a_word_shows_where_the_model_looked(
    looked: Path, look_at: Callable[..., Page]
) -> None:
    page = look_at(looked)
    assert overlay(page) == []
    word(page, "船").hover()
    assert overlay(page) == ["map", "peak"]
    assert page.evaluate(VEIL) == [7, 7, 48]
    said = page.locator(".card", has_text="full").locator(".said")
    assert said.inner_text() == "船 probability 78 %; looked most at row 7, column 7 (25 %)"
    photo, peak = (page.locator(name).first.bounding_box() for name in (".photo", ".peak"))
    assert photo is not None
    assert peak is not None
    assert (peak["x"] - photo["x"]) / photo["width"] == pytest.approx(6 / 7, abs=0.01)
    word(page, "狗").hover()
    assert overlay(page) == ["peak", "centre"]
    assert "78 % a word" in said.inner_text()
    word(page, "猫").hover()
    assert overlay(page) == []
    page.locator("h1").hover()
    assert page.locator(".word.shown").count() == 0


def test_the_overlay_covers_the_photo_exactly(looked: Path, look_at: Callable[..., Page]) -> None:
    page = look_at(looked)
    word(page, "船").hover()
    image, veil = (page.locator(name).first.bounding_box() for name in (".photo img", ".map"))
    assert image == veil


def test_arrow_keys_move_between_words_and_escape_clears(
    looked: Path, look_at: Callable[..., Page]
) -> None:
    page = look_at(looked)
    page.locator("#find").focus()
    page.keyboard.press("Tab")
    shown = page.locator(".word.shown")
    assert shown.inner_text() == "一只"
    assert page.evaluate(VEIL)[2] == 16
    page.keyboard.press("ArrowRight")
    assert shown.inner_text() == "船"
    assert shown.get_attribute("aria-pressed") == "true"
    page.keyboard.press("ArrowRight")  # the last word
    assert shown.inner_text() == "船"
    page.keyboard.press("ArrowLeft")
    assert shown.inner_text() == "一只"
    page.keyboard.press("Escape")
    assert overlay(page) == []
    page.keyboard.press("Enter")
    assert overlay(page) == ["map", "peak"]
    page.keyboard.press("Tab")  # to the next caption, not the next word
    assert overlay(page) == ["peak", "centre"]


def test_tap_on_a_word_shows_attention_and_a_tap_elsewhere_clears_it(
    looked: Path, look_at: Callable[..., Page]
) -> None:
    page = look_at(looked, has_touch=True, is_mobile=True, viewport={"width": 390, "height": 800})
    word(page, "船").tap()
    assert overlay(page) == ["map", "peak"]
    page.locator("h2", has_text="Photos").tap()
    assert overlay(page) == []


def test_word_has_its_probability_as_text(looked: Path, look_at: Callable[..., Page]) -> None:
    first = look_at(looked).locator(".card .word").first
    text = "probability 61 %; looked most at row 3, column 3 (25 %)"
    assert first.get_attribute("title") == text
    assert first.get_attribute("aria-label") == f"一只: {text}"
    assert first.evaluate("word => word.closest('[lang]').lang") == "zh-Hans"


def test_levels_of_probability_differ_in_underline(
    write: Callable[..., Path], look_at: Callable[..., Page]
) -> None:
    page = look_at(
        write(
            [
                captioned_row(n, n, token_logprobs=[math.log(p)] * 3)
                for n, p in enumerate([0.9, 0.4, 0.2, 0.05])
            ]
        )
    )
    lines = [
        page.locator(".card")
        .nth(n)
        .locator(".word")
        .first.evaluate("word => getComputedStyle(word).borderBottom")
        for n in range(4)
    ]
    assert len(set(lines)) == 4


def test_cards_and_photos_are_made_as_they_come_near_the_view(
    tmp_path: Path, write: Callable[..., Path], look_at: Callable[..., Page]
) -> None:
    sha256 = make_photo(tmp_path / "a.png")
    links = [f"{n:03}.png" for n in range(400)]
    for name in links:
        (tmp_path / name).symlink_to("a.png")
    rows = [captioned_row(name, sha256=sha256) for name in links]
    page = look_at(write(rows, images=tmp_path), viewport={"width": 390, "height": 700})
    photos = page.locator(".photo img")
    expect(photos.first).to_have_attribute("src", re.compile("^data:"))
    cards = page.locator(".card").count()
    assert cards < 200
    assert page.locator(".photo img[src]").count() < cards
    for _ in range(40):
        page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
        page.wait_for_timeout(50)
    assert page.locator(".card").count() == 400
    expect(photos.last).to_have_attribute("src", re.compile("^data:"))


CONTRASTS = """(selectors) => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = numbers(colour).map((c) => (c /= 255) <= 0.04045 ? c / 12.92
      : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    const colour = getComputedStyle(node).backgroundColor;
    return numbers(colour)[3] === 0 ? behind(node.parentElement) : colour;
  };
  return Object.fromEntries(selectors.map((selector) => {
    const node = document.querySelector(selector);
    const style = getComputedStyle(node);
    const ink = node instanceof SVGElement ? style.fill : style.color;
    const ground = node instanceof SVGElement ? node.closest("section") : node;
    const [one, other] = [light(ink), light(behind(ground))].sort((a, b) => b - a);
    return [selector, (one + 0.05) / (other + 0.05)];
  }));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_contrast_in_light_and_dark_mode(
    looked: Path, look_at: Callable[..., Page], scheme: str
) -> None:
    page = look_at(looked, color_scheme=scheme)
    texts = ["h1", "h2", ".figures dt", ".facts dt", ".note", "select", "input", "svg text"]
    words = [f".legend .level{n}" for n in range(4)]
    contrasts = page.evaluate(
        CONTRASTS, [*texts, *words, "#controls label", ".said", ".name", "#count"]
    )
    assert min(contrasts.values()) >= 4.5, contrasts
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 21, 23)"
    assert dark == (scheme == "dark")


@pytest.fixture
def attacked(tmp_path: Path, write: Callable[..., Path]) -> Path:
    """A page with hostile names, captions, messages, references and metadata."""
    name = "<img src=x onerror=harm=1>.jpg"
    sha256 = make_photo(tmp_path / "photos" / name)
    long = "长" * 5000 + "x" * 5000
    texts = [hostile("船"), long, "\u202e反了", "{{7*7}}", "line\nbreak\ttab"]
    rows = [
        captioned_row(name if n == 0 else f"{hostile('名')}{n}", caption=text, tokens=[text, ""])
        for n, text in enumerate(texts)
    ]
    rows[0]["sha256"] = sha256
    rows.append(failed_row(hostile("坏"), error_type=hostile("类"), error_message=hostile("话")))
    rows.append(failed_row(long, error_type=long, error_message=long))
    ids = [row["image_id"] for row in rows[:5]]
    columns = {"image_id": ids, "caption": texts, "references": [[hostile("参"), long]] * 5}
    scores = {hostile("分"): 1.0}
    write_evaluation(tmp_path / "s.parquet", columns, hostile("签"), scores)
    metadata = {key: hostile(value) for key, value in METADATA.items()}
    (tmp_path / "captions.summary.json").write_text(json.dumps({"outcome": hostile("果")}))
    asked = {"images": tmp_path / "photos", "evaluation": tmp_path / "s.parquet"}
    return write(rows, metadata, **asked)


def test_hostile_texts_are_shown_verbatim_and_run_nothing(
    attacked: Path, look_at: Callable[..., Page]
) -> None:
    page = look_at(attacked)
    shown = page.locator(".caption").first.evaluate("node => node.textContent")
    assert shown == hostile("船")
    assert page.locator(".name").first.text_content() == "<img src=x onerror=harm=1>.jpg"
    assert page.locator("script").count() == 2
    assert page.locator("img").count() == 1
    assert page.locator(".caption").nth(3).text_content() == "{{7*7}}"
    for details in page.locator("details").all():
        details.evaluate("node => { node.open = true; }")
    for text in page.locator(".card .word").all():
        text.focus()
    page.select_option("#order", "worst")
    page.fill("#find", "<script>window.harm")
    assert announced(page) == "6 of 7 photos"


def test_direction_marks_affect_only_their_own_text(
    attacked: Path, look_at: Callable[..., Page]
) -> None:
    page = look_at(attacked)
    for place in (
        ".name > *",
        ".caption > *",
        ".remark > bdi",
        ".references li > *",
        ".failure td > *",
    ):
        isolation = page.locator(place).first.evaluate("node => getComputedStyle(node).unicodeBidi")
        assert isolation == "isolate", place


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_window(
    attacked: Path, look_at: Callable[..., Page], width: int
) -> None:
    page = look_at(attacked, viewport={"width": width, "height": 800})
    for details in page.locator("details").all():
        details.evaluate("node => { node.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_without_scripts_the_page_says_so(write: Callable[..., Path], browser: Browser) -> None:
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(write([captioned_row(0), failed_row(1)]).as_uri())
    assert "scripts are switched off" in page.locator("main").inner_text()
    assert page.locator("#controls").is_hidden()
    assert "corrupt" in page.locator("main").inner_text()
    page.context.close()
