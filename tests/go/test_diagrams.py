import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from msae_sweep.go import diagrams
from msae_sweep.go.diagrams import Diagram, LatentDiagrams


def diagram(**changes):
    stones, acts = np.zeros(361, np.int8), np.zeros(361, np.float32)
    stones[[0, 20]], stones[360] = 1, -1
    acts[[20, 100]] = 4.0, 1.0
    return Diagram(stones, acts, black_to_move=False, last_move=20, ply=3, game="a.sgf")._replace(**changes)


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.addresses = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.addresses += [value for name, value in attrs if name in ("href", "src")]


def test_a_board_shows_stones_last_move_and_where_the_latent_fires_by_area():
    tags = Tags(diagrams.render_page("t", [], [LatentDiagrams(7, 0.25, 0.5, [diagram()])])).found
    stones = {
        (attrs["href"], attrs["x"], attrs["y"]) for tag, attrs in tags if tag == "use" and attrs["href"] in ("#k", "#w")
    }
    assert stones == {("#k", "0", "0"), ("#k", "1", "1"), ("#w", "18", "18")}
    fires = {(a["cx"], a["cy"]): float(a["r"]) for tag, a in tags if tag == "circle" and a.get("fill") == "#D55E00"}
    assert set(fires) == {("1", "1"), ("5", "5")}
    assert fires["1", "1"] == 2 * fires["5", "5"]
    (ring,) = [attrs for tag, attrs in tags if attrs.get("stroke") == "#0072B2"]
    assert (ring["cx"], ring["cy"]) == ("1", "1")


def test_a_page_names_points_as_go_players_do_and_needs_no_network():
    text = diagrams.render_page(
        "t", ["one", "two"], [LatentDiagrams(7, 0.25, 0.5, [diagram(), diagram(last_move=None)])]
    )
    assert "4.00 at B18" in text
    assert "white to play" in text
    assert "25.0%" in text
    assert all(address.startswith("#") for address in Tags(text).addresses)
    assert not re.search(r"https?:", text)


def test_what_a_record_is_called_runs_no_script():
    text = diagrams.render_page("<i>", [], [LatentDiagrams(1, 0.1, 0.1, [diagram(game="<script>alert(1)</script>")])])
    assert "<script>alert" not in text
    assert "&lt;i&gt;" in text


def two_boards() -> str:
    return diagrams.render_page("t", [], [LatentDiagrams(7, 0.25, 0.5, [diagram(), diagram(last_move=None)])])


def test_every_board_is_a_link_that_makes_it_large_and_has_one_that_closes_it():
    tags = Tags(two_boards()).found
    figures = [attrs["id"] for tag, attrs in tags if tag == "figure"]
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    links = [(attrs["class"], attrs["href"]) for tag, attrs in tags if tag == "a" and "class" in attrs]
    assert figures == ["n7-1", "n7-2"]
    assert len(set(ids)) == len(ids)
    assert links == [("large", "#n7-1"), ("close", "#n7"), ("large", "#n7-2"), ("close", "#n7")]


@pytest.mark.slow
@pytest.mark.parametrize("javascript", [True, False])
def test_a_board_is_opened_and_closed_by_keyboard_and_tap_in_a_browser(tmp_path, javascript):
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed; pip install playwright"
    )
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium on PATH")
    boards = [diagram(ply=ply) for ply in range(60)]
    (tmp_path / "boards.html").write_text(
        diagrams.render_page("t", [], [LatentDiagrams(7, 0.25, 0.5, boards)]), encoding="utf-8"
    )
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        context = browser.new_context(
            viewport={"width": 360, "height": 740}, has_touch=True, java_script_enabled=javascript
        )
        page = context.new_page()
        page.goto((tmp_path / "boards.html").as_uri())
        large = page.locator("figure:target svg")

        def width() -> float:
            box = large.bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 360
            assert box["y"] + box["height"] <= 740
            return box["width"]

        board = page.locator("#n7-41 .large")
        board.scroll_into_view_if_needed()
        before = board.bounding_box()
        board.tap()
        assert width() > 2 * before["width"]
        page.locator("figure:target .close").tap()
        playwright.expect(large).to_have_count(0)
        board.press("Enter")
        assert width() > 2 * before["width"]
        if javascript:
            page.keyboard.press("Escape")
            playwright.expect(large).to_have_count(0)
            playwright.expect(board).to_be_focused()
            assert board.bounding_box() == before, "the page stands where it stood"
        else:
            page.keyboard.press("Tab")
            page.keyboard.press("Tab")
            page.keyboard.press("Enter")
            playwright.expect(large).to_have_count(0)
        browser.close()
