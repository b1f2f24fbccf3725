"""What copal takes of a repository's DVC settings: its remotes, and a cache that lies in it.

`.dvc/config` comes with a repository, from whoever wrote it. DVC would take folders from it to write to, commands to
run and files of this machine to read. What stands in `.dvc/config.local` and in the user's own settings counts in full.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.data.commits import find_commit
from flows.data.dataset import DatasetError
from flows.data.git import run_git

__all__ = ["Storage", "check_links", "remotes_of", "storage_of"]

# Of a remote: where it is, and who asks. Not among them are what runs a command (bearer_token_command; configpath and
# credentialpath name files that may), what asks at the terminal (ask_...), and what names other files of this machine.
# https://dvc.org/doc/user-guide/project-structure/configuration#remote
_REMOTE = frozenset(
    {
        *("url", "version_aware", "worktree", "jobs", "verify", "timeout", "read_timeout", "connect_timeout"),
        *("connection_timeout", "ssl_verify", "region", "endpointurl", "profile", "use_ssl", "allow_anonymous_login"),
        *("access_key_id", "secret_access_key", "session_token", "projectname", "port", "user", "password", "auth"),
        *("custom_auth_header", "method", "token", "replication", "kerberos", "use_https", "connection_string"),
        *("sas_token", "account_name", "account_key", "tenant_id", "client_id", "client_secret", "oss_key_id"),
        *("oss_key_secret", "oss_endpoint"),
    }
)


@dataclass(frozen=True, slots=True)
class Storage:
    """Where the data of a repository lies.

    Attributes:
        remotes: name -> options, as DVC's settings have them.
        default: the remote that is asked; None where none is set.
        cache: DVC's cache; None where the repository has no files of its own (a clone of copal's, a bare one).
    """

    remotes: Mapping[str, Mapping[str, Any]]
    default: str | None
    cache: Path | None


def storage_of(root: Path) -> Storage:
    """The storage that a repository names today: in its work tree, or, where it has none, at HEAD.

    Raises:
        DatasetError: git tracks a link in `.dvc`, or `.dvc/config` sets a cache outside of the repository.
        DvcException: the settings are none.
    """
    from dvc.config import Config
    from dvc.fs import GitFileSystem

    if not (root / ".dvc").is_dir():
        if find_commit(root, "HEAD") is None:
            return Storage({}, None, None)
        config = Config("/.dvc", fs=GitFileSystem(path=str(root), rev="HEAD"))
        return Storage(remotes_of(config), config["core"].get("remote"), None)
    check_links(root)
    config = Config(str(root / ".dvc"))
    cache = config["cache"].get("dir")
    theirs = "dir" not in config.load_one("local")["cache"] | config.load_config_to_level("repo")["cache"]
    if cache is not None and theirs and not Path(cache).resolve().is_relative_to(root.resolve()):
        raise DatasetError(
            f"{root / '.dvc' / 'config'} sets cache.dir to {cache}, outside of the repository, and comes with it: "
            f"if you trust that folder, run `dvc cache dir --local {cache}` there"
        )
    place = root / ".dvc" / "cache" if cache is None else Path(cache)
    return Storage(remotes_of(config), config["core"].get("remote"), place)


def remotes_of(config: Any) -> dict[str, dict[str, Any]]:
    """The remotes of DVC's settings: what may come from a repository, and all that the user says.

    What the user says of a remote in the settings of the machine is for that URL: no repository gets a password by
    calling its own remote by that name.
    """
    theirs = config.load_one("repo")["remote"] if config.dvc_dir else {}
    local = config.load_one("local")["remote"] if "local" in config.files else {}
    remotes: dict[str, dict[str, Any]] = {**config.load_config_to_level("repo")["remote"]}
    for name, options in theirs.items():
        of_machine = remotes.get(name, {})
        same = "url" not in options or of_machine.get("url") == options["url"]
        allowed = {option: value for option, value in options.items() if option in _REMOTE}
        remotes[name] = {**(of_machine if same else {}), **allowed}
    return {name: {**remotes.get(name, {}), **local.get(name, {})} for name in {**remotes, **local}}


def check_links(root: Path) -> None:
    """Check that nothing in `.dvc` is a link, or a repository, that came with the repository: DVC writes there.

    A link that a user made is no matter of git's.

    Raises:
        DatasetError: git tracks one.
    """
    listed = run_git(root, "ls-files", "--stage", "-z", "--", ".dvc").stdout
    for entry in filter(None, listed.split("\0")):
        mode, name = entry[:6], entry.partition("\t")[2]
        if mode not in ("100644", "100755"):
            raise DatasetError(
                f"{root}: {name!r} is a link that comes with the repository, and DVC would write where it leads: "
                "nothing was read; remove it from the repository"
            )
