import re
from html.parser import HTMLParser

import numpy as np

from msae_sweep.go import draw
from msae_sweep.go.draw import Diagram, LatentDiagrams


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
    tags = Tags(draw.page("t", [], [LatentDiagrams(7, 0.25, 0.5, [diagram()])])).found
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
    text = draw.page("t", ["one", "two"], [LatentDiagrams(7, 0.25, 0.5, [diagram(), diagram(last_move=None)])])
    assert "4.00 at B18" in text
    assert "white to play" in text
    assert "25.0%" in text
    assert all(address.startswith("#") for address in Tags(text).addresses)
    assert not re.search(r"https?:", text)


def test_what_a_record_is_called_runs_no_script():
    text = draw.page("<i>", [], [LatentDiagrams(1, 0.1, 0.1, [diagram(game="<script>alert(1)</script>")])])
    assert "<script>" not in text
    assert "&lt;i&gt;" in text
