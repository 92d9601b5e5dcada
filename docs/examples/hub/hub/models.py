"""The tables of the hub. The foreign keys refer to homeagent's tables."""

from __future__ import annotations

from pydantic import JsonValue
from sqlmodel import Field

from homeagent import Table, Timestamp


class Message(Table, table=True):
    """A message that a device sent in a session."""

    __tablename__ = "messages"

    id: int | None = Field(default=None, primary_key=True)
    session_id: str = Field(foreign_key="sessions.session_id", ondelete="CASCADE", index=True)
    text: str = Field(min_length=1, max_length=10_000)
    sent_at: Timestamp


class Preference(Table, table=True):
    """A setting of a device. The value is any JSON value."""

    __tablename__ = "preferences"

    device_id: str = Field(foreign_key="devices.id", ondelete="CASCADE", primary_key=True)
    name: str = Field(min_length=1, max_length=100, primary_key=True)
    value: JsonValue = None
