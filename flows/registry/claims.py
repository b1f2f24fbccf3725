"""Who may work on a lineage, or move its aliases: a claim with an expiry and a fencing token, kept in the registry.

The claims of a lineage are numbered entries (`Registry.add_entry`): of any number of processes on any number of hosts
one gets a number. An entry either takes the lineage or frees it; the last one counts, and its number is the fencing
token. Claims on the aliases are entries of a kind of their own: they are held for moments, so that a rollback does not
wait for a step that runs for hours.

- Who holds the lineage moves the expiry of its own entry on, in a thread. A claim past its expiry, or of a process of
  this machine that is dead, may be taken by anybody: they append the next entry.
- To publish, the holder appends an entry too (`Claim.seal`), which names what it is about to publish. Whoever was
  taken over finds that number gone, however late it wakes: it publishes nothing.
- Who takes over from a sealed claim finishes what the dead one had sealed (`Registry.adopt`) before anything else.

So clocks decide how soon somebody takes over, and never whether two publish.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace

from copal.errors import CopalError
from copal.progress import Progress
from flows.machine import find_process
from flows.registry.registry import Registry, RegistryError

__all__ = ["ALIASES", "LINEAGE", "Claim", "ClaimLostError", "claimed"]

LINEAGE, ALIASES = "claim", "alias-claim"  # what a claim is on; who holds both took the lineage first

_POLL = 0.5  # seconds between two looks at a claim that somebody else holds
_WAITS_QUIETLY = 2.0  # seconds after which a wait is worth a word
_END_WAIT = 5.0  # seconds that freeing a lineage may take before the process goes on without


class ClaimLostError(CopalError):
    """Another process took the lineage over, or may have: nothing was published, what is finished stays staged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """An entry of the log as the registry keeps it: all text.

    Attributes:
        held: "yes" takes the lineage, "no" frees it.
        nonce: tells whose entry it is where the registry's answer was lost.
        what: the holder's work, for people.
        host, pid, started: of the holder's process; started in seconds since the epoch.
        expires: seconds since the epoch.
        sealed: id of the artifacts that are about to be published; "" for none.
    """

    held: str
    nonce: str
    what: str
    host: str
    pid: str
    started: str
    expires: str
    sealed: str

    @property
    def holder(self) -> str:
        return f"process {self.pid} on {self.host.rpartition('-')[0]} ({self.what})"

    def may_be_taken(self) -> bool:
        return self.held == "no" or time.time() >= float(self.expires) or self._is_dead()

    def _is_dead(self) -> bool:
        """Whether the holder was a process of this machine that is no more."""
        return self.host == _host() and find_process(int(self.pid), float(self.started)) is None


_NAMES = {field.name for field in fields(_Entry)}


class Claim:
    """The right to work on a lineage, until `expires`. Made by `claimed`."""

    def __init__(self, registry: Registry, on: str, token: int, entry: _Entry, lease: float) -> None:
        self._registry, self._on, self._entry, self._lease = registry, on, entry, lease
        self.token = token
        self._lost = False
        self._ended = threading.Event()
        self._lock = threading.Lock()  # renewing, sealing and ending change the same entry

    def check(self) -> None:
        """Nothing where the claim holds.

        Raises:
            ClaimLostError: it is past its expiry, or was taken over.
        """
        if self._lost or time.time() >= float(self._entry.expires):
            self._lost = True
            raise ClaimLostError(
                f"the claim on {self._registry.model_name} expired or was taken over while this process was held up "
                f"({self._entry.what}); nothing was published, the next run goes on from what is finished"
            )

    def guard(self, progress: Progress) -> Progress:
        """`progress`, with a `check` at every call: work that is fenced off ends soon."""

        def checked(stage: str, done: int, total: int) -> None:
            self.check()
            progress(stage, done, total)

        return checked

    def seal(self, logged_model: str) -> None:
        """The last thing before a version is created: nobody else can publish from here on, nor could before.

        Args:
            logged_model: id of the version's artifacts; who finds this process dead publishes them.

        Raises:
            ClaimLostError: the lineage was taken over.
        """
        with self._lock:
            self.check()
            entry = _entry("yes", self._entry.what, self._lease, sealed=logged_model)
            if not self._append(entry):
                self._lost = True
                self.check()
            self.token, self._entry = self.token + 1, entry

    def unseal(self) -> None:
        """What was sealed is published: nobody has to see to it any more."""
        with self._lock:
            self._entry = replace(self._entry, sealed="")

    def renew(self) -> None:
        """Move the expiry on; notice where the claim is not ours any more."""
        with self._lock:
            self.check()
            expires = repr(time.time() + self._lease)
            if max(self._registry.entries(self._on), default=0) != self.token:
                self._lost = True
                self.check()
            self._registry.change_entry(self._on, self.token, {"expires": expires})
            self._entry = replace(self._entry, expires=expires)

    def keep(self) -> None:
        """Renew until the claim ends or is lost: the body of a thread."""
        while not self._ended.wait(self._lease / 4):
            try:
                self.renew()
            except ClaimLostError:
                return
            except CopalError:  # the registry does not answer: it may before the claim expires
                continue

    def end(self) -> None:
        """Free the lineage, if it is still ours."""
        self._ended.set()
        with self._lock, contextlib.suppress(CopalError):  # the registry is gone: then the claim expires
            if not self._lost:
                self._append(_entry("no", self._entry.what, 0.0, self._entry.sealed))

    def _append(self, entry: _Entry) -> bool:
        return self._registry.add_entry(self._on, self.token + 1, asdict(entry))


@contextmanager
def claimed(
    registry: Registry, what: str, *, lease: float, on: str = LINEAGE, tell: Callable[[str], None] | None = None
) -> Iterator[Claim]:
    """Hold the lineage of `registry`, or its aliases; waits as long as somebody else does.

    What a dead holder was about to publish is published first, and what it had published and not logged is logged.

    Args:
        what: the work, for people who look who holds the lineage.
        lease: seconds after which a holder that gives no sign of life may be taken over.
        on: `LINEAGE` or `ALIASES`.
        tell: called with a line where it has to wait.

    Raises:
        RegistryError: the registry does not answer.
    """
    claim, sealed = _take(registry, what, lease, on, tell)
    threading.Thread(target=claim.keep, name="copal-claim", daemon=True).start()
    try:
        if sealed:
            registry.adopt(sealed)
            claim.unseal()
        yield claim
    except (ClaimLostError, RegistryError):
        raise
    except Exception:
        claim.check()  # a lost claim's files may be swept away: what that led to is not what went wrong
        raise
    finally:
        # In a thread, for a registry that is gone keeps its callers waiting, and a cancelled run has to end.
        ending = threading.Thread(target=claim.end, name="copal-claim-end", daemon=True)
        ending.start()
        ending.join(_END_WAIT)


def _take(
    registry: Registry, what: str, lease: float, on: str, tell: Callable[[str], None] | None
) -> tuple[Claim, str]:
    """Take the lineage or its aliases: the claim, and what the last holder had sealed and maybe not published."""
    began, told = time.monotonic(), tell is None
    pause = threading.Event()
    while True:
        claims = registry.entries(on)
        last = max(claims, default=0)
        if claims and not claims[last].keys() >= _NAMES:
            continue  # it is being deleted, so there is a later one by now
        before = _Entry(**claims[last]) if claims else None
        if before is None or before.may_be_taken():
            sealed = before.sealed if before else ""
            entry = _entry("yes", what, lease, sealed=sealed)
            if registry.add_entry(on, last + 1, asdict(entry)):
                return Claim(registry, on, last + 1, entry, lease), sealed
            continue
        if not told and time.monotonic() - began > _WAITS_QUIETLY:
            assert tell is not None
            tell(f"waiting for {before.holder}, which works on {registry.model_name}")
            told = True
        pause.wait(_POLL)


def _entry(held: str, what: str, lease: float, sealed: str = "") -> _Entry:
    import psutil

    here = psutil.Process()
    return _Entry(
        held=held,
        nonce=uuid.uuid4().hex,
        what=what,
        host=_host(),
        pid=str(here.pid),
        started=repr(here.create_time()),
        expires=repr(time.time() + lease),
        sealed=sealed,
    )


def _host() -> str:
    """This machine: its name, and the address of a network interface, for names are not unique."""
    return f"{socket.gethostname()}-{uuid.getnode():012x}"
