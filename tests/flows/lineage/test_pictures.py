"""flows.lineage.pictures: what is drawn, and that the same history gives the same bytes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import support.histories
from flows.lineage.history import up_to
from flows.lineage.pictures import draw_pictures
from support.histories import a_history, a_layer, three_domains


def texts(svg: Path) -> list[str]:
    """The texts of a drawing, which matplotlib keeps as comments beside their outlines."""
    return [found.strip() for found in re.findall(r"<!-- (.*?) -->", svg.read_text(), re.DOTALL)]


def drawn(history: dict[str, Any], folder: Path) -> dict[str, Path]:
    folder.mkdir()
    return {path.name: path for path in draw_pictures(history, folder)}


def test_every_picture_is_drawn_as_png_and_svg_as_wide_as_a_phone(tmp_path: Path) -> None:
    files = drawn(up_to(three_domains(), "5"), tmp_path / "one")
    names = ("perplexity-matrix", "forgetting", "sparsity-by-layer", "layer-error", "response-shift")
    assert list(files) == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    for name, path in files.items():
        if name.endswith(".png"):
            with Image.open(path) as image:
                assert image.width == 800
        else:
            assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_the_matrix_has_the_figure_of_each_version_and_domain(tmp_path: Path) -> None:
    shown = texts(drawn(three_domains(), tmp_path / "one")["perplexity-matrix.svg"])
    assert {"5: med", "6: without code", "legal", "dense 6"} <= {line for text in shown for line in text.split("\n")}
    # From the newest version down; the first data of legal is not that of today.
    figures = [text for text in shown if re.fullmatch(r"[0-9.]+′?", text) and text not in ("1", "1.25", "1.5", "2")]
    assert sorted(figures) == sorted(["20′", "22′", "8", "10", "8.4", "13", "8.2", "7", "11", "6.9"])


def test_forgetting_is_told_since_each_domain_was_the_newest(tmp_path: Path) -> None:
    shown = texts(drawn(three_domains(), tmp_path / "one")["forgetting.svg"])
    assert {"legal of 2 +10.0%", "legal of 4 +10.0%", "code +2.5%", "med -1.4%"} <= set(shown)


def test_what_a_step_did_is_shown_by_kind_of_linear_experts_as_one(tmp_path: Path) -> None:
    layers = tuple(
        a_layer(name=f"model.layers.{block}.{kind}", response_shift=1.0 + block)
        for block in range(3)
        for kind in ("self_attn.q_proj", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj")
    )
    history = a_history([{"add": "code", "perplexity": {"code": 8.0}, "layers": layers}])
    files = drawn(history, tmp_path / "one")
    shown = texts(files["response-shift.svg"])
    assert {"self_attn.q_proj", "mlp.experts.*.up_proj"} <= set(shown)
    assert not any("experts.0" in text for text in shown)


def test_nothing_is_drawn_where_there_is_nothing_to_see(tmp_path: Path) -> None:
    assert drawn(a_history([]), tmp_path / "base") == {}
    one = drawn(a_history([{"add": "code", "perplexity": {"code": 8.0}}]), tmp_path / "one")
    assert list(one) == ["perplexity-matrix.png", "perplexity-matrix.svg"]


def test_a_long_lineage_stays_readable_and_says_what_is_left_out(tmp_path: Path) -> None:
    names = [f"domain $x_{number}$ ^" for number in range(40)]  # no mathematics is read out of names
    steps = [{"add": name, "perplexity": dict.fromkeys(names[: place + 1], 8.0)} for place, name in enumerate(names)]
    files = drawn(a_history(steps), tmp_path / "many")
    matrix = "\n".join(texts(files["perplexity-matrix.svg"]))
    assert "the newest 30 of 40 versions" in matrix
    assert "the newest 24 of 40 domains" in matrix
    assert "domain $x_3…" in matrix
    assert "the 8 most forgotten of 39" in "\n".join(texts(files["forgetting.svg"]))
    with Image.open(files["perplexity-matrix.png"]) as image:
        assert image.width == 800
        assert image.height < 2000


def test_colours_can_be_told_apart_in_grey(tmp_path: Path) -> None:
    """The worse, the darker: whoever sees no colours sees it all the same."""
    ratios = [1.0, 1.2, 1.5, 2.0, 3.0]
    steps = [{"add": "code", "data": place, "perplexity": {"code": 6.0 * r}} for place, r in enumerate(ratios)]
    with Image.open(drawn(a_history(steps), tmp_path / "one")["perplexity-matrix.png"]) as image:
        grey = np.asarray(image.convert("L"), dtype=float)
    column = grey[:, 330]  # beside the figures, inside the frames
    inside = [
        np.median(column[edge : edge + 12]) for edge in np.linspace(60, grey.shape[0] - 130, len(ratios)).astype(int)
    ]
    assert inside == sorted(inside)
    assert inside[-1] - inside[0] > 100


def test_the_same_history_gives_the_same_bytes_whoever_draws(tmp_path: Path) -> None:
    here = drawn(three_domains(), tmp_path / "here")
    program = (
        "import sys; from pathlib import Path; from support.histories import three_domains\n"
        "import matplotlib; matplotlib.rcParams['font.size'] = 30\n"
        "from flows.lineage.pictures import draw_pictures; draw_pictures(three_domains(), Path(sys.argv[1]))"
    )
    there = tmp_path / "there"
    there.mkdir()
    environment = os.environ | {"PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "1", "TZ": "Asia/Tokyo"}
    tests = Path(support.histories.__file__).parent.parent  # before it the project: there is a tests/flows/, too
    environment["PYTHONPATH"] = os.pathsep.join([str(tests.parent), str(tests)])
    subprocess.run([sys.executable, "-c", program, str(there)], check=True, env=environment)
    for name, path in here.items():
        assert path.read_bytes() == (there / name).read_bytes()


def test_each_file_is_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is most of what a picture costs, and matplotlib draws once more where a layout may change."""
    draw, draws = Figure.draw, []
    monkeypatch.setattr(Figure, "draw", lambda figure, renderer: draws.append(figure) or draw(figure, renderer))
    assert len(drawn(three_domains(), tmp_path / "one")) == len(draws)


def test_the_style_of_the_caller_is_left_as_it_was(tmp_path: Path) -> None:
    with matplotlib.rc_context({"font.size": 30}):
        drawn(three_domains(), tmp_path / "one")
        assert matplotlib.rcParams["font.size"] == 30
