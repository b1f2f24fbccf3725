"""The right to work on a lineage, or to move its aliases: a claim with an expiry and a fencing token.

A lineage has a claim of each kind, one row each. Claims on the aliases are held for moments, so that a rollback does
not wait for a step that runs for hours.

- The holder of a claim moves its expiry on, in a thread. A claim that is past its expiry, or whose holder was a process
  of this machine and is dead, may be taken by anybody: the token rises.
- To publish, the holder raises the token too (`Claim.seal`), and names what it is about to publish. A holder that was
  taken over finds its token gone, however late it wakes: it publishes nothing.
- Whoever takes over a sealed claim first publishes what the dead holder had sealed (`Claim.inherited`).

So clocks decide how soon somebody takes over, and never whether two publish.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from copal.errors import CopalError
from copal.progress import Progress
from flows.ledger.errors import ClaimLostError, LedgerError
from flows.ledger.rows import Place, change, look, take

__all__ = ["ALIASES", "LINEAGE", "Claim", "holding"]

LINEAGE, ALIASES = "lineage", "aliases"  # the kinds of claim; a process that needs both takes the lineage first

_POLL = 0.02, 0.5  # seconds between the first two looks at a claim that somebody else holds, and at most
_WAITS_QUIETLY = 2.0  # seconds after which a wait is worth a word
_END_WAIT = 5.0  # seconds that freeing a claim may take before the process goes on without


class Claim:
    """The right to work on a lineage, or to move its aliases. Made by `flows.ledger.Ledger.hold`.

    Attributes:
        token: the fencing token: of two claims of one kind on one lineage, the later has the higher one.
        inherited: id of what the last holder had sealed and maybe not published; "" for none. The holder publishes it,
            and then calls `unseal`.
    """

    def __init__(self, place: Place, token: int, what: str, lease: float, sent: float, inherited: str) -> None:
        self._place, self._what, self._lease = place, what, lease
        self.token, self.inherited = token, inherited
        self._sent = sent  # when the last request that moved the expiry on was sent, by this machine's monotonic clock
        self._sealed = inherited
        self._lost = False
        self._ended = threading.Event()
        self._lock = threading.Lock()  # renewing, sealing and ending change the same row

    def check(self) -> None:
        """Return where the claim still holds; does not ask the ledger.

        Raises:
            ClaimLostError: it is past its expiry, or was taken over.
        """
        if self._lost or time.monotonic() - self._sent >= self._lease:
            self._lost = True
            next_one = "whoever took over publishes what was sealed" if self._sealed else "nothing was published"
            raise ClaimLostError(
                f"the claim on {self._place.lineage} expired or was taken over while this process was held up "
                f"({self._what}); {next_one}, the next run goes on from what is finished"
            )

    def guard(self, progress: Progress) -> Progress:
        """`progress`, with a `check` at every call: work that is fenced off ends soon."""

        def checked(stage: str, done: int, total: int) -> None:
            self.check()
            progress(stage, done, total)

        return checked

    def seal(self, logged_model: str) -> None:
        """The last thing before a version is created: from here on only this process, or who inherits, can publish.

        Args:
            logged_model: id of the version's artifacts; who finds this process dead publishes them.

        Raises:
            ClaimLostError: the claim expired or was taken over.
            LedgerError: the ledger does not answer.
        """
        with self._lock:
            assert not (self.inherited and self._sealed == self.inherited), "what was inherited is not published"
            self._change({"token": self.token + 1, "sealed": logged_model}, lease=self._lease)
            self.token, self._sealed = self.token + 1, logged_model

    def unseal(self) -> None:
        """What was sealed is published: nobody has to see to it any more.

        Raises:
            ClaimLostError: the claim expired or was taken over.
            LedgerError: the ledger does not answer.
        """
        with self._lock:
            self._change({"sealed": ""}, lease=self._lease)
            self._sealed = ""

    def renew(self) -> None:
        """Move the expiry on; notice where the claim is not ours any more.

        Raises:
            ClaimLostError: the claim expired or was taken over.
            LedgerError: the ledger does not answer.
        """
        with self._lock:
            self._change({}, lease=self._lease)

    def keep(self) -> None:
        """Renew until the claim ends or is lost: the body of a thread."""
        while not self._ended.wait(self._lease / 4):
            try:
                self.renew()
            except ClaimLostError:
                return
            except CopalError:  # the ledger does not answer: it may before the claim expires
                continue

    def end(self) -> None:
        """Free the claim, if it is still ours. What is sealed stays so: the next holder inherits it."""
        self._ended.set()
        with self._lock, contextlib.suppress(CopalError):  # the ledger is gone: then the claim expires
            if not self._lost:
                change(self._place, self.token, {"held": False})

    def _change(self, values: dict[str, Any], *, lease: float) -> None:
        self.check()
        sent = time.monotonic()
        if not change(self._place, self.token, values, lease=lease):
            self._lost = True
            self.check()
        self._sent = sent


@contextmanager
def holding(place: Place, what: str, lease: float, tell: Callable[[str], None] | None) -> Iterator[Claim]:
    """Hold a claim, see `flows.ledger.Ledger.hold`."""
    claim = _take(place, what, lease, tell)
    threading.Thread(target=claim.keep, name="copal-claim", daemon=True).start()
    try:
        yield claim
    except (ClaimLostError, LedgerError):
        raise
    except Exception:
        claim.check()  # a lost claim's files may be swept away: what that led to is not what went wrong
        raise
    finally:
        # In a thread, for a server that is gone keeps its callers waiting, and a cancelled run has to end.
        ending = threading.Thread(target=claim.end, name="copal-claim-end", daemon=True)
        ending.start()
        ending.join(_END_WAIT)


def _take(place: Place, what: str, lease: float, tell: Callable[[str], None] | None) -> Claim:
    began, told = time.monotonic(), tell is None
    pause, wait = threading.Event(), _POLL[0]
    while True:
        before = look(place)
        dead = before is not None and not before.over and before.is_dead()
        if before is None or before.over or dead:
            sent = time.monotonic()
            if take(place, before, what, lease, dead=dead):
                token, inherited = (before.token + 1, before.sealed) if before else (1, "")
                return Claim(place, token, what, lease, sent, inherited)
            continue
        if not told and time.monotonic() - began > _WAITS_QUIETLY:
            assert tell is not None
            tell(f"waiting for {before}, which works on {place.lineage}")
            told = True
        pause.wait(wait)
        wait = min(2 * wait, _POLL[1])
