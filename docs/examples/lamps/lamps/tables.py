"""The table of the lamps, its store, and the unit of work with this store."""

from sqlalchemy import bindparam, insert
from sqlmodel import Field, col, select

from homeagent import Statement, Store, Table, Timestamp, UnitOfWork


class Switch(Table, table=True):
    """A lamp that a device switched on or off."""

    __tablename__ = "switches"

    id: int | None = Field(default=None, primary_key=True)
    device_id: str = Field(foreign_key="devices.id", ondelete="CASCADE", index=True)
    lamp: str = Field(min_length=1, max_length=100, index=True)
    on: bool
    switched_at: Timestamp


ADD = Statement(insert(Switch), returning=Switch)
OF_LAMP = Statement(select(Switch).where(col(Switch.lamp) == bindparam("lamp")).order_by(col(Switch.id)))


class SwitchStore(Store):
    """The switched lamps."""

    def add(self, device_id: str, lamp: str, on: bool) -> None:
        """Add a row for a lamp that the device switches now."""
        now = self.unit.now()
        self.unit.write_one(ADD, **Switch.model_values(device_id=device_id, lamp=lamp, on=on, switched_at=now))

    def of_lamp(self, lamp: str) -> list[Switch]:
        """Return the rows of a lamp, the oldest first."""
        return self.unit.all(OF_LAMP, lamp=lamp)


class LampUnit(UnitOfWork):
    """A unit of work with the store of the switched lamps."""

    switches: SwitchStore
