"""The statements of the hub, and the stores that run the statements in a unit of work."""

from __future__ import annotations

from pydantic import JsonValue
from sqlalchemy import bindparam, insert, literal_column
from sqlmodel import col, select

from homeagent import AgentSession, Statement, Store, UnitOfWork
from hub.models import Message, Preference

ADD = Statement(insert(Message), returning=Message)
OF_SENDER = Statement(
    select(Message)
    .join(AgentSession)
    .where(col(AgentSession.sender_id) == bindparam("sender_id"), col(Message.id) > bindparam("after"))
    .order_by(col(Message.id))
    .limit(bindparam("limit"))
)
# An upsert needs the `insert()` of the dialect. The statement passes this `insert()` to the function.
SET = Statement(
    lambda insert: insert(Preference).on_conflict_do_update(
        index_elements=["device_id", "name"], set_={"value": literal_column("excluded.value")}
    ),
    returning=Preference,
)
OF_DEVICE = Statement(select(Preference).where(col(Preference.device_id) == bindparam("device_id")))


class MessageStore(Store):
    """The messages."""

    def add(self, session_id: str, text: str) -> Message:
        """Add a message to a session, and return the stored message with its id."""
        # The model validates the values, but the statement does not.
        values = Message.model_values(session_id=session_id, text=text, sent_at=self.unit.now())
        added = self.unit.write_one(ADD, **values)
        assert added is not None  # an INSERT always returns its row
        return added

    def of_sender(self, sender_id: str, *, after: int = 0, limit: int = 100) -> list[Message]:
        """Return the messages of a sender with a greater id than `after`, the oldest first."""
        return self.unit.all(OF_SENDER, sender_id=sender_id, after=after, limit=limit)


class PreferenceStore(Store):
    """The preferences of the devices."""

    def set(self, device_id: str, name: str, value: JsonValue) -> Preference:
        """Set a preference, or replace its value."""
        stored = self.unit.write_one(SET, **Preference.model_values(device_id=device_id, name=name, value=value))
        assert stored is not None  # the upsert always returns its row
        return stored

    def of_device(self, device_id: str) -> dict[str, JsonValue]:
        """Return the values of a device's preferences by name."""
        return {each.name: each.value for each in self.unit.all(OF_DEVICE, device_id=device_id)}


class HubUnit(UnitOfWork):
    """A unit of work with the hub's stores. `Database.open(unit=HubUnit)` makes units of this class."""

    messages: MessageStore
    preferences: PreferenceStore
