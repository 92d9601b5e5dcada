"""Units that share a transaction: the one that begins and commits it, and those that join it in savepoints."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from homeagent.errors import HomeAgentError
from homeagent.unit_of_work import UnitOfWork, UnitSettings

if TYPE_CHECKING:
    from sqlmodel import Session

    from homeagent.engine.link import Link

__all__ = ["AloneRequest", "JoiningUnit", "LeadingUnit"]

_SAVEPOINT = "homeagent_group"


class AloneRequest(BaseException):
    """A unit asks for what it can have in a transaction of its own only."""


class LeadingUnit(UnitOfWork):
    """The unit of a leader: its transaction is the one that others join."""

    __slots__ = ("_committing", "_undone", "took_place")

    def __init__(self, settings: UnitSettings) -> None:
        super().__init__(settings, read_only=False)
        self._committing = False
        self._undone = False
        self.took_place = False
        """Whether the commit took place, also where an interrupt came right after it."""

    def begin(self, timeout: float) -> None:
        """Take the lane and begin."""
        self._begin(timeout)

    def share(self) -> Link | None:
        """Let others join, from when on this unit is of no more use itself, and return the link that they work on.

        None where there is nothing to join: this unit was given up, or has an ORM session.
        """
        if self._state != "open" or self._session is not None:
            return None
        self._state = "shared"
        return self._link

    @property
    def callbacks(self) -> list[Callable[[], object]] | None:
        """What is to be called after the commit."""
        return self._after_commit

    def commit(self) -> None:
        """Commit, or end a unit that was given up by its own `rollback`."""
        if self._state in ("open", "shared"):
            self._state = "open"
            self._committing = True
            self._commit()
        else:
            self._roll_back(None)

    def undo(self, error: BaseException | None) -> None:
        """Undo everything, and give the lane back."""
        self._roll_back(error)

    def _undo(self, link: Link) -> bool:
        # An interrupt may come when COMMIT has returned and nobody has noted it yet.
        refused = isinstance(sys.exception(), HomeAgentError)
        self._undone = refused or link.in_transaction
        return super()._undo(link)

    def _end(self, link: Link, *, sound: bool) -> None:
        self.took_place = self._committing and not self._undone
        super()._end(link, sound=sound)


class JoiningUnit(UnitOfWork):
    """A unit in a savepoint of a leader's transaction."""

    __slots__ = ("wants_alone",)

    def __init__(self, settings: UnitSettings, link: Link) -> None:
        super().__init__(settings, read_only=False)
        self.wants_alone = False
        link.savepoint(_SAVEPOINT)
        self._link = link
        self._state = "open"

    @property
    def session(self) -> Session:
        """None here: the unit is done again, alone."""
        self._require_link()
        self.wants_alone = True
        raise AloneRequest

    def rollback(self) -> None:
        """Abandon the unit: see `UnitOfWork.rollback`."""
        link = self._require_link()
        self._after_commit = None
        link.rollback_to_savepoint(_SAVEPOINT)
        self._state = "rolled back"

    def keep(self) -> list[Callable[[], object]] | None:
        """Leave what it did to the leader's commit, and return what is to be called after that."""
        link, self._link = self._link, None
        kept, self._state = self._state == "open", "ended"
        if kept and link is not None:
            link.release_savepoint(_SAVEPOINT)
        return self._after_commit

    def undo(self) -> None:
        """Undo what it did, and nothing else."""
        link, self._link = self._link, None
        kept, self._state = self._state == "open", "ended"
        # Where the engine undid the whole transaction, there is no savepoint either.
        if kept and link is not None and link.in_transaction:
            link.rollback_to_savepoint(_SAVEPOINT)
