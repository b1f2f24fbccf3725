"""The page of a lineage: what stands on it, that nothing in it is obeyed or loaded, and how a real browser takes it."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from copal.printable import printable_lines
from flows.lineage.history import History, up_to
from flows.lineage.page.page import render_page
from support.histories import MOVED, a_history, a_task, altered, layers, logged, three_domains, with_gates

HOSTILE = (
    "</title><script>document.title='owned';console.error('owned')</script>\"' onload=x <img src=https://evil.example/>"
    "</style><style>*{display:none}</style>;background:url(//evil.example)\u202egpj.\u2066\u200b\x1b[2J\x00"
)


class Page(HTMLParser):
    """Elements by tag with their attributes, and whether every one that opens is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def big(versions: int = 50, domains: int = 30) -> History:
    perplexity: dict[str, float] = {}
    steps = []
    for number in range(versions - 1):
        perplexity = {name: value * 1.01 for name, value in perplexity.items()}
        name = f"domain-{number % domains:02d}"
        perplexity[name] = 7.0
        data = 1 + number // domains
        steps.append({"add": name, "data": data, "perplexity": perplexity, "layers": layers(30, first=number == 0)})
    return a_history(steps)


def hostile() -> History:
    step = {
        "add": HOSTILE,
        "repository": HOSTILE,
        "perplexity": {HOSTILE: 7.0},
        "settings": {HOSTILE: HOSTILE},
        "layers": (layers()[0].model_copy(update={"name": HOSTILE}),),
        "aliases": [HOSTILE],
        "tasks": {HOSTILE: {HOSTILE: a_task(metric=HOSTILE, figures={HOSTILE: 0.5}, dense={HOSTILE: 0.5})}},
    }
    history = a_history([step, step | {"data": 2}], model=HOSTILE)
    history = altered(history, 2, signature=HOSTILE)
    moved = MOVED.model_copy(update={"alias": HOSTILE})
    history = logged(history, "promotion", "2026-03-01T00:00:00+00:00", to_version=2, why=HOSTILE, details=moved)
    return with_gates(history, 2, **{HOSTILE: False})


def test_every_part_is_on_the_page():
    text = render_page(three_domains())
    page = Page(text)
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    links = {attributes["href"] for attributes in page.of("a")}
    assert {f"#{name}" for name in ids} >= links
    assert ids >= {
        "graph",
        "heat",
        "forgotten",
        "sources",
        "versions",
        "layers",
        "gates",
        "log",
        "signatures",
        "settings",
    }
    assert text.count("not comparable</span>") == 2  # legal on its first data, in versions 2 and 3
    assert "not signed" in text
    assert "champion rolled back to it from version 4" in text
    assert "forgetting of version 6" in text
    assert "<dd>version 5</dd>" in text


def test_the_heat_map_colours_by_the_ratio_to_dense():
    steps = [{"add": "a", "perplexity": {"a": value}, "data": data} for data, value in enumerate((5.0, 6.3, 8.0, 30.0))]
    cells = [cell["class"] for cell in Page(render_page(a_history(steps))).of("td") if "title" in cell]
    assert [cell.split()[0] for cell in cells] == ["h6", "h3", "h1", "h0"]  # the newest first


def with_tasks() -> History:
    """A domain with tasks, another without, and a version before there were any."""
    steps = [
        {"add": "a", "perplexity": {"a": 7.0}},
        {"add": "b", "perplexity": {"a": 7.0, "b": 8.0}, "tasks": {"b": {"deadlines": a_task()}}},
        {
            "add": "b",
            "data": 2,
            "perplexity": {"a": 7.1, "b": 7.5},
            "tasks": {"b": {"deadlines": a_task(figures={"acc": 0.61234, "acc_norm": 0.6}), "names": a_task()}},
        },
    ]
    return a_history(steps)


def test_tasks_stand_beside_the_dense_base_where_a_version_has_any():
    text = render_page(with_tasks())
    (section,) = re.findall(r'<section aria-labelledby="tasks">(.*?)</section>', text, re.S)
    asked = re.findall(r"<summary>Version (\d)", section)
    assert asked == ["4", "3"], "the newest first, and none without tasks"
    bodies = re.findall(r"<tbody.*?</tbody>", section, re.S)
    rows = [re.findall(r"<t[hd] [^>]*>([^<]*)<", row) for body in bodies for row in re.findall(r"<tr.*?</tr>", body)]
    assert rows == [
        ["b", "deadlines", "acc", "200", "0.6123", "0.8"],
        ["b", "deadlines", "acc_norm", "200", "0.6", "0.725"],
        ["b", "names", "acc", "200", "0.75", "0.8"],
        ["b", "names", "acc_norm", "200", "0.7125", "0.725"],
        ["b", "deadlines", "acc", "200", "0.75", "0.8"],
        ["b", "deadlines", "acc_norm", "200", "0.7125", "0.725"],
    ]
    assert 'href="#tasks"' in text
    assert 'tasks"' not in render_page(three_domains())


def test_figures_read_so_far_only_up_to_the_version_asked_for():
    text = render_page(up_to(three_domains(), "3"))
    assert "Data in version 3" in text
    assert "version 6</text>" not in text
    assert "Layer error by block, version 3" in text


@pytest.mark.parametrize("make", [three_domains, big, hostile, with_tasks, lambda: a_history([])])
def test_the_page_is_whole_accessible_and_loads_nothing(make):
    text = render_page(make())
    page = Page(text)
    assert not page.of("script") + page.of("img") + page.of("link") + page.of("iframe")
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert (attributes.get(name) or "#").startswith("#")
    assert printable_lines(text) == text, "nothing turns the direction of writing around, or is hidden"
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.S)
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in text
    drawn = [svg for svg in page.of("svg") if svg.get("aria-hidden") != "true"]
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in drawn)
    assert len(page.of("table")) == len(page.of("caption"))
    assert all("scope" in heading for heading in page.of("th"))


def test_a_page_without_versions():
    assert "No versions yet" in render_page(History(model="tiny", versions=(), log=()))


def test_fifty_versions_and_thirty_domains_stay_small():
    text = render_page(big())
    assert len([cell for cell in Page(text).of("td") if "title" in cell]) > 1000
    assert len(text) < 1_000_000


# --- in a real browser


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine")
    return found


def browse(chromium: str, page: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    command += ["--v=0", "--disable-background-networking", f"--user-data-dir={page.parent / 'profile'}"]
    done = subprocess.run([*command, *arguments, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize("make", [three_domains, big, hostile])
def test_a_browser_shows_the_elements_and_has_no_complaint(chromium, tmp_path, make):
    page = tmp_path / "page.html"
    history = make()
    page.write_text(render_page(history))
    dom = browse(chromium, page, "--dump-dom").stdout
    assert len(re.findall('<circle class="node', dom)) == len(history.versions)
    assert '<table class="heat' in dom
    assert "<title>Lineage of" in dom
    assert "<script" not in dom
    assert "<img" not in dom


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("make", [three_domains, big, hostile, with_tasks])
def test_a_laptop_and_a_phone_scroll_it_down_only_in_light_and_dark(chromium, tmp_path, make, width, scheme):
    # A window is never narrower than 500 pixels, a frame is. The script is the test's: the page has and allows none.
    measure = """<script>addEventListener('load', () => { document.body.dataset.found =
        [document.documentElement.scrollWidth, getComputedStyle(document.body).backgroundColor,
        [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length].join(' ') })
        </script>"""
    policy = re.compile('<meta http-equiv="Content-Security-Policy"[^>]*>')
    (tmp_path / "page.html").write_text(policy.sub(lambda _: measure, render_page(make())))
    frame = tmp_path / "frame.html"
    read = "document.title = document.querySelector('iframe').contentDocument.body.dataset.found"
    frame.write_text(
        f'<title>none</title><iframe src="page.html" width="{width}" height="844" onload="{read}"></iframe>'
    )
    preferred = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    dom = browse(chromium, frame, preferred, "--allow-file-access-from-files", "--dump-dom").stdout
    background = "rgb(15, 20, 25)" if scheme == "dark" else "rgb(255, 255, 255)"
    (found,) = re.findall(f"<title>{width} {re.escape(background)} ([0-9]+)</title>", dom)
    assert found == "0" or width < 1280 or make is hostile  # on a laptop no table of thirty domains hides columns


def test_the_policy_of_the_page_stops_a_script_that_got_in(chromium, tmp_path):
    page = tmp_path / "page.html"
    text = render_page(three_domains())
    page.write_text(text.replace("<main>", "<main><script>document.title = 'owned'</script>"))
    with pytest.raises(AssertionError, match="Content Security Policy"):  # `browse` passes no complaint
        browse(chromium, page, "--dump-dom")
