"""What the pages for people say of the code: links, paths, commands, tables of figures and of files, the diagram."""

from __future__ import annotations

import ast
import re
import runpy
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from flows.cli.app import make_app
from support.pages import blocks, commands, is_figure, tables
from support.understood import problem

ROOT = Path(__file__).parents[1]
DOCS = ("README.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md")))
PAGES = (*DOCS, "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "infra/README.md", "data/README.md")
ENDINGS = ("py", "md", "yaml", "toml", "html", "json", "env", "txt")
# What a workspace, a version's folder or another repository has, and this one has not.
ELSEWHERE = ("lineage.json", "gates.json", "job.json", "dvc.lock", "job_variables.env", ".copal/prefect.yaml")
ELSEWHERE += (".copal/open.html", "bench/plots/", "bench/tables.md", "bench/gpu.md", "flows/NAME.py", "data/NAME/")
ELSEWHERE += ("manifest.json", "report.json", "step.json", "evaluation.json", "BASE_README.md", "version_files.json")


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def tracked() -> list[str]:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    return [file for file in done.stdout.splitlines() if (ROOT / file).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_that_a_page_names_are_there(page: str) -> None:
    files = tracked()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text(page))
    named = re.findall(rf"`([\w./-]+\.(?:{'|'.join(ENDINGS)}))`", text(page))
    folders = re.findall(r"`((?:flows|copal|tests|infra|data|bench|docs)/(?:[\w.-]+/)*)`", text(page))
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    missing += [name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)]
    missing += [folder for folder in folders if not (ROOT / folder).is_dir()]
    missing = [name for name in missing if name not in ELSEWHERE]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_of_a_page_are_there(page: str) -> None:
    """In backticks; what a command wants may be left out or be a word for it, and options may stand in brackets."""
    stands_for = {"S": "60", "N": "9464", "SHELL": "bash", "QUESTION": "worse", "COMMAND": "status", "NUMBER": "1"}
    problems = []
    for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text(page)):
        words = [stands_for.get(word, word) for word in re.sub(r"[\[\]]", "", code).split()]
        if words[0] not in ("copal", "make") or len(words) == 1:
            continue
        wrong = problem(words, whole=False)
        problems += [f"`{code}`: {wrong}"] if wrong else []
    assert problems == []


@pytest.mark.parametrize("page", DOCS)
def test_commands_in_the_blocks_of_a_page_can_be_run(page: str) -> None:
    found = [words for block in blocks(text(page), "sh") for words in commands(block)]
    assert [(words, problem(words)) for words in found if problem(words)] == []


@pytest.mark.parametrize("page", DOCS)
def test_commands_stand_in_blocks_that_are_marked(page: str) -> None:
    """So that the test above sees them."""
    other = re.sub(r"^```sh\n.*?^```$", "", text(page), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^(?: {4,}|\$ )(?:copal|make|dvc|git|pip|prefect|mlflow) .*$", other, re.MULTILINE) == []
    marks = re.findall(r"^```(.+)$", text(page), re.MULTILINE)
    assert set(marks) <= {"sh", "python", "text", "mermaid"}
    assert len(re.findall(r"^```$", text(page), re.MULTILINE)) == len(marks)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("copal stauts", "Unknown command"),
        ("copal status --jsn", "Unknown option"),
        ("copal init", "requires an argument"),
        ("copal metrics --port many", "Invalid value"),
        ("make dmeo", "no target dmeo"),
        ("make demo TORCH_INDX=x", "no variable TORCH_INDX"),
        ("python tests/bench/nonesuch.py", "no file"),
        ("python -P -m flows.nonesuch", "no module"),
        ("dvc repor", "does not understand"),
        ("git comit", "no command comit"),
        ("mlflow uii", "no command uii"),
        ("mlflow models serve --bakend x", "no option --bakend"),
        ("prefect worker strat", "Unknown command"),
        ("pip instal x", "no command instal"),
        ("pip install --traget y x", "no such option: --traget"),
        ("A=1 nonesuch --x && copal status", "nonesuch: a program that no page has named"),
    ],
)
def test_a_command_that_is_wrong_is_noticed(line: str, says: str) -> None:
    (wrong,) = filter(None, map(problem, commands(f"{line}   # as one writes it\n")))
    assert says in wrong


def test_what_a_block_of_commands_is_read_as() -> None:
    block = "A=x B=y copal init a#b > out   # why\nexport C=d\ncd a && dvc add \\\n  'my data'; cat < x | wc\n"
    read = [["copal", "init", "a#b"], ["export", "C=d"], ["cd", "a"], ["dvc", "add", "my data"], ["cat"], ["wc"]]
    assert commands(block) == read


@pytest.mark.parametrize("page", DOCS)
def test_every_table_of_figures_names_the_command_that_gives_them_again(page: str) -> None:
    """In the paragraph after it, which begins with *Again:*."""
    found = tables(text(page))
    figures = [after for cells, after in found if any(map(is_figure, cells))]
    assert [after for after in figures if not re.match(r"\*Again:\* `[^`]+`", after)] == []
    named = [re.match(r"\*Again:\* `([^`]+)`", after)[1] for after in figures]
    assert [problem(words) for line in named for words in commands(line) if problem(words)] == []


def test_every_command_has_its_row() -> None:
    rows = set(re.findall(r"^\| `copal ([a-z]+)[^|]*` \|", text("docs/using.md"), re.MULTILINE))
    assert rows == {name for name in make_app() if not name.startswith("-")}


def test_every_page_is_in_the_index_and_on_the_front_page() -> None:
    pages = {Path(page).name for page in DOCS if page.startswith("docs/")} - {"README.md"}
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", text("docs/README.md").split("##")[0])) == pages
    assert set(re.findall(r"\]\(docs/([\w-]+\.md)\)", text("README.md").split("## Where the rest is")[1])) == pages


def test_which_cells_are_figures() -> None:
    assert all(
        map(is_figure, ("11.04", "**11.99 (1.225)**", "10,059 (1,027)", "0.05", "30.0 GB", "44 s", "7.6 and 1.4 GB"))
    )
    assert not any(map(is_figure, ("", "`--port N`", "a domain of 12", "2:4", "SmolLM2-135M", "1")))
    assert tables("| a |\n|---|\n| 1.5 |\n| 2 |\n\n*Again:* `x`\n") == [(["1.5", "2"], "*Again:* `x`")]


def test_the_program_on_the_page_of_the_library_runs(tiny_base: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    (program,) = blocks(text("docs/library.md"), "python")
    shutil.copytree(tiny_base, tmp_path / "base")
    for name, word in {"legal": "whereas the lessee ", "medical": "acute otitis media "}.items():
        (tmp_path / name).mkdir()
        for number in range(60):
            (tmp_path / name / f"{number}.txt").write_text(f"{number} {word}" * 60)
    (tmp_path / "program.py").write_text(program)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("program.py")
    printed = capsys.readouterr().out
    assert re.findall(r"^version (\d): 50\.\d% zeros, (\d+) weights came back$", printed, re.MULTILINE)[0] == ("2", "0")
    assert re.findall(r"^(\w+): perplexity \d+\.\d\d, dense \d+\.\d\d$", printed, re.MULTILINE) == ["legal", "medical"]
    assert "geometric mean " in printed
    assert printed.endswith("version 4 knows ['medical']\n")


@pytest.mark.parametrize("package", ["flows", "copal"])
def test_every_file_has_its_row(package: str) -> None:
    rows = re.findall(rf"^\| .+ \| `({package}/.+)` \|$", text("CONTRIBUTING.md"), re.MULTILINE)
    code = [
        file for file in tracked() if file.startswith(f"{package}/") and not file.endswith(("__init__.py", "py.typed"))
    ]
    assert sorted(rows) == sorted(code)


def test_the_diagram_is_drawn_from_the_imports() -> None:
    """Each arrow is an import; one that follows from others is left out. Floors are those of the import contract."""
    drawn = set(re.findall(r"^ +(\w+) --> (\w+)$", text("CONTRIBUTING.md"), re.MULTILINE))
    imports = rooms()
    wanted = {
        (room, other)
        for room, others in imports.items()
        for other in others
        if other not in reached(imports, others - {other})
    }
    assert sorted(drawn) == sorted(wanted)


def test_every_room_is_on_a_floor_of_the_import_contract() -> None:
    contracts = tomllib.loads(text("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    (floors,) = [contract["layers"] for contract in contracts if contract.get("containers") == ["flows"]]
    assert sorted(room for floor in floors for room in floor.split(" | ")) == sorted(rooms())


def rooms() -> dict[str, set[str]]:
    """Room -> the rooms that it imports, inside functions too."""
    found: dict[str, set[str]] = {}
    for file in sorted((ROOT / "flows").rglob("*.py")):
        room = file.relative_to(ROOT / "flows").parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        imported = found.setdefault(room, set())
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "flows":
                imported |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flows."):
                imported.add(str(node.module).split(".")[1])
        imported.discard(room)
    return found


def reached(imports: dict[str, set[str]], start: set[str]) -> set[str]:
    found: set[str] = set()
    open_ = list(start)
    while open_:
        for other in imports[open_.pop()]:
            if other not in found:
                found.add(other)
                open_.append(other)
    return found
