"""What the pages for people say of the code: links, paths, commands, the tables of files, the diagram of the rooms."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from flows.cli import main

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "infra/README.md", "data/README.md")
ENDINGS = ("py", "md", "yaml", "toml", "html", "json", "env", "txt")
# What a workspace, a version's folder or another repository has, and this one has not.
ELSEWHERE = ("lineage.json", "gates.json", "job.json", "dvc.lock", "job_variables.env", ".copal/prefect.yaml")
ELSEWHERE += (".copal/open.html", "bench/plots/", "bench/tables.md", "bench/gpu.md", "flows/NAME.py", "data/NAME/")


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
    folders = re.findall(r"`((?:flows|copal|tests|infra|data|bench)/(?:[\w.-]+/)*)`", text(page))
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    missing += [name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)]
    missing += [folder for folder in folders if not (ROOT / folder).is_dir()]
    missing = [name for name in missing if name not in ELSEWHERE]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_a_page_names_are_there(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = set(re.findall(r"(?:`|^ +|; )copal ((?:audit )?[a-z]+)", text(page), re.MULTILINE))
    names |= {f"{name} {option}" for name, option in re.findall(r"`copal ([a-z]+)[^`]*?(--[a-z-]+)", text(page))}
    unknown = []
    for name in sorted(names):
        command, _, option = name.partition(" --")
        code = main([*command.split(), "--help"])
        if code != 0 or (option and f"--{option}" not in capsys.readouterr().out + " --help"):
            unknown.append(name)
    assert unknown == []


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
