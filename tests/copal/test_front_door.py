"""`import copal`: the public names, what they cost, and the ten lines in the docstring."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

import pytest
from safetensors.torch import load_file

import copal

PUBLIC = """
    Base CalibrationConfig CopalError DataError DomainEntry DomainWindows LayerReport Manifest ModelError Moment
    NewDomain NumericsError Parent Progress PruneConfig PruneGroup Pruned ResourceError Score SettingsError
    SmallerBatchWarning StateError StepReport WithdrawnDomain __version__ backward_transfer base_fingerprint
    domain_windows evaluate geometric_mean magnitude open_base prune_group prune_step read_report sparsegpt wanda
"""
PIPELINE = ("prefect", "mlflow", "dvc", "flows")


def python(program: str, cwd: Path) -> str:
    """What `program` prints in a fresh interpreter."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def typed_imports() -> dict[str, str]:
    """Name -> module, as a type checker sees them."""
    assert copal.__file__
    tree = ast.parse(Path(copal.__file__).read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module.startswith("copal.")]
    return {alias.name: node.module for node in found for alias in node.names}


def test_the_public_names_are_these_and_each_is_what_a_type_checker_takes_it_for() -> None:
    assert sorted(copal.__all__) == sorted(PUBLIC.split())
    assert set(copal.__all__) <= set(dir(copal))
    typed = typed_imports()
    assert typed.keys() | {"__version__"} == set(copal.__all__)
    for name, module in typed.items():
        assert getattr(copal, name) is getattr(importlib.import_module(module), name)
    assert copal.__version__ == version("copal")
    with pytest.raises(AttributeError, match="has no attribute 'prune'"):
        copal.prune  # noqa: B018
    with pytest.raises(ImportError):
        from copal import prune  # noqa: F401


def test_no_module_has_the_name_of_a_public_name() -> None:
    """Importing such a module would put it in the place of what the name stands for."""
    assert copal.__file__
    modules = {path.stem for path in Path(copal.__file__).parent.glob("*.py")}
    assert not modules & set(copal.__all__)


def test_import_copal_takes_nothing_heavy(tmp_path: Path) -> None:
    program = "import copal, sys; dir(copal), copal.__version__, copal.CopalError, copal.PruneConfig()"
    loaded = {name.split(".")[0] for name in python(f"{program}; print(*sys.modules)", tmp_path).split()}
    assert "copal" in loaded
    assert not loaded & {"torch", "transformers", "accelerate", "datasets", "numpy", *PIPELINE}


def test_the_ten_lines_in_the_docstring_prune_for_two_domains(tiny_base: Path, tmp_path: Path) -> None:
    assert copal.__doc__
    blocks = re.findall(r"(?:^    .*\n)+", copal.__doc__, re.MULTILINE)
    program = textwrap.dedent(blocks[0])
    assert len(program.splitlines()) == 10
    (tmp_path / "base").symlink_to(tiny_base)
    for name, word in {"legal": "whereas the lessee ", "medical": "acute otitis media "}.items():
        (tmp_path / name).mkdir()
        for number in range(60):
            (tmp_path / name / f"{number}.txt").write_text(f"{number} {word}" * 60)
    check = f"\nimport sys; assert not set({PIPELINE!r}) & set(sys.modules)"
    printed = python(program + check, tmp_path)
    assert re.fullmatch(r"legal: perplexity \d+\.\d\d\nmedical: perplexity \d+\.\d\d\n", printed)
    reports = [copal.read_report(tmp_path / out) for out in ("v2", "v3")]
    known = [[(entry.name, entry.version) for entry in report.manifest.domains] for report in reports]
    assert known == [[("legal", None)], [("legal", 2), ("medical", None)]]
    assert all(report.sparsity == pytest.approx(0.5, abs=0.01) for report in reports)
    assert reports[1].manifest.base == copal.base_fingerprint(tmp_path / "base")
    stored = [load_file(path) for path in (tmp_path / "v3" / "model").glob("*.safetensors")]
    linears = [tensor for part in stored for name, tensor in part.items() if "_proj" in name]
    assert 2 * sum(int((linear == 0).sum()) for linear in linears) == sum(linear.numel() for linear in linears)
