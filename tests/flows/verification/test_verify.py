"""copal verify: everything that differs between a version and what was recorded of it, a line each."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from copal.config import fingerprint
from copal.files import json_text
from flows.cli import main
from flows.lineage.chain import anchor_of, log_problems
from flows.lineage.entries import GatesEntry, PurgeDetails
from flows.lineage.signing import SigningError, signature_problem
from flows.project import append_log, hold_lineage
from flows.step.finish import finish
from flows.step.run import plain_tasks, run_step
from flows.verification.verify import Verification, folder_problems, record_problems, verify
from support.histories import MOVED
from support.toys import altered_entry, documents, step


def make_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """A key pair, as the README says to make one."""
    key, public = folder / f"{name}.pem", folder / f"{name}-public.pem"
    curve = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(key)]
    subprocess.run(curve, check=True, capture_output=True)
    subprocess.run(["openssl", "ec", "-in", str(key), "-pubout", "-out", str(public)], check=True, capture_output=True)
    return key, public


@pytest.fixture(scope="module")
def signed(make_bench, tmp_path_factory):
    """Versions 1 (base, not signed), 2 (code) and 3 (legal), signed; two log entries; the data is on a DVC remote.

    Shared: who alters something puts it back.
    """
    from dvc.repo import Repo

    folder = tmp_path_factory.mktemp("signed")
    bench = make_bench(folder / "workspace")
    make_keys(folder, "other")
    key, _ = make_keys(folder, "own")
    shutil.copy(key, bench.root / "own.pem")
    with bench.workspace.params.open("a") as params:
        params.write("signing: {key: own.pem}\n")
    (bench.root / ".dvc" / "config").write_text(
        f"[core]\n    analytics = false\n    remote = store\n['remote \"store\"']\n    url = {folder / 'remote'}\n"
    )
    for seed, domain in enumerate(("code", "legal")):
        bench.commit(domain, seed)
        assert run_step(bench.project, domain, None, plain_tasks())
    with Repo(str(bench.root)) as dvc:
        dvc.push()
    return bench


def verified(bench, number: int = 3, *, data: bool = False) -> Verification:
    return verify(bench.project, bench.registry.version(number), data=data)


def folder_of(bench, number: int = 3) -> Path:
    return bench.registry.folder(bench.registry.version(number))


@contextlib.contextmanager
def altered(path: Path, content: bytes | None) -> Iterator[None]:
    """The file with other content, or gone; put back afterwards."""
    before = path.read_bytes()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


@contextlib.contextmanager
def retagged(bench, tag: str, value: str, number: int = 3) -> Iterator[None]:
    """Another value of a version's tag, or of the log's anchor where `number` is 0; put back afterwards."""
    uri = bench.registry.tracking_uri
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)

    def put(value: str) -> None:
        if number:
            client.set_model_version_tag("tiny", str(number), tag, value)
        else:
            client.set_registered_model_tag("tiny", tag, value)

    found = client.get_model_version("tiny", str(number)) if number else client.get_registered_model("tiny")
    before = found.tags[tag]
    put(value)
    try:
        yield
    finally:
        put(before)


def test_nothing_differs_in_a_version_as_it_was_registered(signed):
    found = verified(signed, data=True)
    assert found.findings == ()
    assert found.skipped == ()
    files = len(signed.registry.record(signed.registry.version(3)).files)
    assert found.checked == (
        f"{files} files and lineage.json", "signature", "2 ancestors", "2 log entries", "data of 2 domains",
    )  # fmt: skip
    assert verified(signed, 1).skipped == ("signature: there is none", "data")


def test_the_record_names_every_file_of_a_version(signed):
    files = {path.relative_to(folder_of(signed)).as_posix() for path in folder_of(signed).rglob("*") if path.is_file()}
    recorded = set(signed.registry.record(signed.registry.version(3)).files)
    assert files - recorded == {"lineage.json", "model.sig"}


def test_every_finding_is_told_not_only_the_first(signed):
    folder = folder_of(signed)
    with (
        altered(folder / "model" / "config.json", b"{}"),
        altered(folder / "state" / "manifest.json", None),
        altered(folder_of(signed, 2) / "lineage.json", b"{}"),
        altered_entry(signed.project, 1, "[]"),
        retagged(signed, "copal.domain", "medical"),
    ):
        findings = verified(signed).findings
    assert "changed: model/config.json" in findings
    assert "missing: state/manifest.json" in findings
    assert "lineage.json and the registry differ: copal.domain is 'legal' here and 'medical' there" in findings
    assert any(line.startswith("version 2: ") and "schema is None" in line for line in findings)
    assert any(line.startswith("log entry 1: ") for line in findings)
    assert any(line.startswith("signature: ") for line in findings)
    assert verified(signed).findings == ()


def test_a_record_that_was_replaced_with_its_tag_breaks_the_chain_of_its_child(signed):
    path = folder_of(signed, 2) / "lineage.json"
    record = json.loads(path.read_text()) | {"weights_back": 5}
    with (
        altered(path, json_text(record).encode()),
        retagged(signed, "copal.lineage_digest", fingerprint(record), number=2),
    ):
        chain, log = verified(signed).findings
    assert chain.startswith("version 3: its record's parent is {")
    assert log.startswith("log: its entry 1 is not that of the gates of version 2")


def test_a_record_in_another_spelling_is_found(signed):
    path = folder_of(signed) / "lineage.json"
    with altered(path, json.dumps(json.loads(path.read_text())).encode()):
        assert "changed: lineage.json: its spelling" in verified(signed).findings


def test_the_log_is_held_to_its_anchor(signed):
    says = {f"2 {'0' * 64}": "is not the one that the anchor in the registry names", "many": "somebody altered it"}
    for anchor, said in says.items():
        with retagged(signed, "copal.log_head", anchor, number=0):
            (line,) = verified(signed).findings
            assert said in line
    with altered_entry(signed.project, 1, None):
        assert "log entry 1: is missing" in verified(signed).findings
    with altered_entry(signed.project, 2, None):
        (line,) = verified(signed).findings
        assert line == "the log has 1 entries, its anchor in the registry names entry 2: it was cut off"


def test_a_log_that_was_cut_off_is_found_by_what_the_registry_shows(bench):
    for seed, domain in enumerate(("code", "legal")):
        bench.commit(domain, seed)
        assert step(bench, domain)
    uri = bench.registry.tracking_uri
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    first, second = bench.log
    (tag,) = client.get_registered_model("tiny").tags
    client.delete_registered_model_tag("tiny", tag)  # of whoever may write both stores
    with altered_entry(bench.project, 2, None):
        assert verified(bench, 1).findings[0] == (
            f"log: its entry 2 is not that of the gates of version 3 ({first_word(second)})"
        )
        with altered_entry(bench.project, 1, None):
            assert verified(bench, 1).findings[:2] == (
                f"log: its entry 1 is not that of the gates of version 2 ({first_word(first)})",
                f"log: its entry 2 is not that of the gates of version 3 ({first_word(second)})",
            )
    assert verified(bench, 1).findings == ()
    assert "the newest 2 log entries: they are not anchored in the registry yet" in verified(bench, 1).skipped
    with hold_lineage(bench.project, "whatever comes next") as claim:
        finish(bench.project, claim, plain_tasks().gates)
    assert client.get_registered_model("tiny").tags == {tag: anchor_of([first, second])}


def test_a_contribution_is_missed_unless_the_log_tells_of_its_purge(bench):
    bench.commit("code", 0)
    step(bench, "code")
    shutil.rmtree(folder_of(bench, 2) / "state" / "contribution")
    assert verified(bench, 2).findings[0].startswith("missing: state/contribution/")
    uri = bench.registry.tracking_uri
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.set_model_version_tag("tiny", "2", "copal.contribution_dropped", "true")
    assert verified(bench, 2).findings == ("log: no entry tells that the contribution of version 2 was purged",)
    purged = PurgeDetails(domain="code", dvc_md5="a" * 32, deleted=(2,), traces=(2,))
    append_log(bench.project, "purge", details=purged)
    assert verified(bench, 2).findings == ()


def first_word(entry: GatesEntry) -> str:
    return "passed" if entry.details.passed else "failed"


def test_an_alias_that_was_moved_by_hand_is_found(signed):
    uri = signed.registry.tracking_uri
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.set_registered_model_alias("tiny", "champion", "2")
    try:
        assert verified(signed).findings == ("log: champion names version 2, the log says no version",)
    finally:
        client.delete_registered_model_alias("tiny", "champion")
    assert verified(signed).findings == ()


def test_an_alias_that_was_moved_by_hand_after_a_killed_promotion_is_found(bench):
    bench.commit("code", 0)
    step(bench, "code")
    entries = bench.log
    append_log(bench.project, "promotion", version=1, to_version=1, details=MOVED)
    assert verified(bench, 2).findings == ()  # the move may come yet
    uri = bench.registry.tracking_uri
    MlflowClient(tracking_uri=uri, registry_uri=uri).set_registered_model_alias("tiny", "champion", "2")
    assert verified(bench, 2).findings == ("log: champion names version 2, the log says version 1",)
    assert len(bench.log) == len(entries) + 1


def test_a_running_sum_that_was_dropped_is_no_damage(bench):
    bench.commit("code", 0)
    bench.commit("legal", 1)
    for domain in ("code", "legal"):
        assert run_step(bench.project, domain, None, plain_tasks())
    assert bench.registry.drop_sum(bench.registry.version(2)) > 0
    assert verified(bench, 2).findings == ()
    assert verified(bench, 2).skipped == ("signature: there is none", "data")


@pytest.mark.parametrize("part", ["sum", "contribution"])
def test_a_signature_stays_good_when_a_part_of_the_state_is_dropped(signed, part):
    folder = folder_of(signed)
    key = signed.root / "own.pem"
    aside = signed.root.parent / part
    (folder / "state" / part).rename(aside)
    try:
        assert signature_problem(folder, key=key, public_key=None) is None
    finally:
        aside.rename(folder / "state" / part)


# --- data


def test_data_that_is_gone_or_damaged_on_the_remote_is_found_whatever_the_cache_has(signed):
    remote = signed.root.parent / "remote"
    stored = [path for path in remote.rglob("*") if path.is_file() and not path.name.endswith(".dir")]
    assert len(stored) == 2
    contents = [path.read_bytes() for path in stored]
    for path in stored:
        path.chmod(0o644)
    with altered(stored[0], None), altered(stored[1], contents[1] + b"x"):
        gone, damaged = sorted(verified(signed, data=True).findings, key=lambda line: "damaged" in line)
    assert gone.startswith(("data of code: ", "data of legal: "))
    assert "neither in DVC's cache nor on a remote" in gone
    assert "is damaged" in damaged
    assert verified(signed, data=False).findings == ()
    assert not list(signed.workspace.cache.glob("verify-*"))


def test_data_without_a_remote_is_looked_for_in_the_cache(bench):
    bench.commit("code", 0)
    assert run_step(bench.project, "code", None, plain_tasks())
    assert verified(bench, 2, data=True).findings == ()
    bench.lose_data()
    (line,) = verified(bench, 2, data=True).findings
    assert line.startswith("data of code: ")


# --- signatures


def test_a_signature_by_another_key_or_over_other_files_is_refused(signed, tmp_path):
    folder, keys = folder_of(signed), signed.root.parent
    assert signature_problem(folder, key=None, public_key=keys / "own-public.pem") is None
    assert "Key mismatch" in str(signature_problem(folder, key=None, public_key=keys / "other-public.pem"))
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    assert signature_problem(copied, key=keys / "own.pem", public_key=None) is None
    (copied / "report.json").write_text("{}")
    problem = signature_problem(copied, key=keys / "own.pem", public_key=None)
    assert problem is not None
    assert problem.startswith("model.sig: Signature mismatch")
    assert "report.json" in problem


def test_a_signature_that_is_gone_or_was_not_there_is_found(signed):
    with altered(folder_of(signed) / "model.sig", None):
        by_record = "signature: there is none, and by its record the version was signed"
        assert verified(signed).findings == ("missing: model.sig", by_record)
        uri = signed.registry.tracking_uri
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        tag = client.get_model_version("tiny", "3").tags["copal.signature"]
        client.delete_model_version_tag("tiny", "3", "copal.signature")  # whoever removes it may think of this
        try:
            assert verified(signed).findings == (by_record,)
        finally:
            client.set_model_version_tag("tiny", "3", "copal.signature", tag)
    strange = folder_of(signed, 1) / "model.sig"
    shutil.copy(folder_of(signed) / "model.sig", strange)
    try:
        assert verified(signed, 1).findings[0] == "extra: model.sig"
    finally:
        strange.unlink()


def test_a_signature_is_not_checked_where_no_key_is_set(signed):
    signed.set("signing: {key: own.pem}", "signing: {key: null}")
    try:
        found = verified(signed)
    finally:
        signed.set("signing: {key: null}", "signing: {key: own.pem}")
    assert (found.findings, found.skipped[0]) == ((), "signature: signing.public_key is not set")


@pytest.mark.parametrize("content", [None, "no key", "password", "rsa", "another curve"])
def test_a_key_that_cannot_sign_is_refused_before_a_step(bench, content):
    path = bench.root / "key.pem"
    commands = {
        "password": "openssl ecparam -name prime256v1 -genkey | openssl ec -aes128 -passout pass:secret",
        "rsa": "openssl genrsa 2048",
        "another curve": "openssl ecparam -name secp256k1 -genkey -noout",
    }
    if content in commands:
        made = subprocess.run(commands[content], shell=True, check=True, capture_output=True)  # constant text
        path.write_bytes(made.stdout)
    elif content:
        path.write_text(content)
    with bench.workspace.params.open("a") as params:
        params.write("signing: {key: key.pem}\n")
    bench.commit("code", 0)
    with pytest.raises(SigningError, match=r"signing\.key: .*key\.pem cannot sign: .*openssl ecparam"):
        run_step(bench.project, "code", None, plain_tasks())
    assert len(bench.registry.versions()) == 1


def test_without_the_library_signing_says_what_to_install(bench, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "model_signing.signing", None)
    make_keys(bench.root, "own")
    with bench.workspace.params.open("a") as params:
        params.write("signing: {key: own.pem}\n")
    with pytest.raises(SigningError, match="pip install model-signing pyopenssl"):
        bench.registry.check_signing()


# --- no bit and no field goes unnoticed


def test_a_thousand_flips_of_one_bit_are_all_found(signed):
    """In files that are no bigger than they must be: each flip reads all of the version again."""
    project, version, folder = signed.project, signed.registry.version(3), folder_of(signed)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    log = documents(project)
    assert {"lineage.json", "model.sig", "report.json"} <= {path.name for path in files}
    assert {path.parent.name for path in files if path.suffix == ".safetensors"} >= {"model", "sum", "contribution"}
    assert len(log) == 2
    drawn = random.Random(0)
    for number in range(1000):
        of_log = number % 10 == 0  # small files would be drawn too seldom by their size
        at = drawn.choice(range(len(log)) if of_log else files)
        content = bytearray(log[at].encode() if of_log else at.read_bytes())
        place, bit = drawn.randrange(len(content)), drawn.randrange(8)
        content[place] ^= 1 << bit
        if of_log:
            with altered_entry(project, at + 1, content.decode("latin-1")):
                found = log_problems(project.ledger.log_as_stored(), project.registry.log_anchor())
        else:
            with altered(at, bytes(content)):
                found = folder_problems(version, folder)[1]
        assert found, f"bit {bit} of byte {place} of {at}"
    assert verified(signed).findings == ()


def mutations(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(path, whole value with that place altered), for every place in a JSON value, and once with each field gone."""

    def at(replace: Any) -> Any:
        whole = copy.deepcopy(root)
        if not path:
            return replace
        inner = whole
        for key in path[:-1]:
            inner = inner[key]
        if replace is GONE:
            del inner[path[-1]]
        else:
            inner[path[-1]] = replace
        return whole

    root = value[0] if isinstance(value, tuple) else value
    here = value[1] if isinstance(value, tuple) else value
    if path:
        yield path, at(GONE)
    if isinstance(here, dict):
        yield path, at({**here, "added": 1})
        for key, inner in here.items():
            yield from mutations((root, inner), (*path, key))
    elif isinstance(here, list):
        yield path, at([*here, 1])
        for place, inner in enumerate(here):
            yield from mutations((root, inner), (*path, place))
    elif isinstance(here, bool):
        yield path, at(not here)
    elif isinstance(here, int | float):
        yield path, at(here + 1)
    elif isinstance(here, str):
        yield path, at(here[:-1] + ("0" if here[-1:] != "0" else "1"))
    else:
        yield path, at(7)


GONE = object()


def test_a_mutation_of_any_field_of_a_record_is_found(signed):
    version, folder = signed.registry.version(3), folder_of(signed)
    path = folder / "lineage.json"
    record = json.loads(path.read_text())
    before = path.read_bytes()
    seen = set()
    try:
        for where, mutated in mutations(record):
            assert mutated != record
            path.write_text(json_text(mutated))
            assert record_problems(version, path)[1], where
            seen.add(where[0] if where else None)
    finally:
        path.write_bytes(before)
    assert seen == {None, *record}
    assert record_problems(version, path)[1] == []


def test_a_mutation_of_any_field_of_the_log_is_found(signed):
    entries, anchor = signed.project.ledger.log_as_stored(), signed.registry.log_anchor()
    assert anchor == anchor_of(signed.log)
    mutated = [altered for _, altered in mutations(entries)]
    assert len(mutated) > 50
    assert all(altered != entries and log_problems(altered, anchor) for altered in mutated)
    assert log_problems(entries, anchor) == []


# --- the command


def test_the_command_prints_a_line_each_and_exits_with_2_where_something_differs(signed, capsys):
    here = ["--workspace", str(signed.root)]
    assert main(["verify", "latest", *here]) == 0
    assert "version 3 of tiny: nothing differs; checked " in capsys.readouterr().out
    with altered(folder_of(signed) / "model" / "config.json", b"{}"):
        assert main(["verify", "3", "--no-data", *here]) == 1
        out = capsys.readouterr().out.splitlines()
        assert main(["verify", "3", "--no-data", "--json", *here]) == 1
        found = json.loads(capsys.readouterr().out)
    assert out[0] == "changed: model/config.json"
    assert out[-2] == "not checked: data"
    assert out[-1].startswith("version 3 of tiny: 2 differences; checked ")
    assert (found["model"], found["version"], found["skipped"]) == ("tiny", 3, ["data"])
    assert found["findings"][0] == "changed: model/config.json"


def test_artifacts_that_are_not_there_are_a_finding(signed):
    folder = folder_of(signed)
    aside = folder.with_name("aside")
    folder.rename(aside)
    try:
        findings = verified(signed).findings
    finally:
        aside.rename(folder)
    assert "cannot be read" in findings[0]
    assert findings[1] == "the files cannot be checked without the record"


def test_what_is_stored_is_verified_and_not_the_cache(signed, monkeypatch):
    """A remote store is read anew: the copy in the cache may be whole where the store is not."""
    monkeypatch.setattr("flows.registry.artifacts.local_path", lambda uri: None)
    stored = signed.workspace.artifacts
    (file,) = [path for path in stored.rglob("report.json") if "legal" in (path.parent / "lineage.json").read_text()]
    signed.registry.folder(signed.registry.version(3))
    with altered(file, b"{}"):
        assert "changed: report.json" in verified(signed).findings
