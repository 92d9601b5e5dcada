"""The table of the temperatures, its store, and the unit of work with this store."""

from sqlalchemy import bindparam, insert
from sqlmodel import Field, col, select

from homeagent import Statement, Store, Table, Timestamp, UnitOfWork


class Reading(Table, table=True):
    """A temperature that a device measured."""

    __tablename__ = "readings"

    id: int | None = Field(default=None, primary_key=True)
    device_id: str = Field(foreign_key="devices.id", ondelete="CASCADE", index=True)
    celsius: float = Field(ge=-90, le=60)
    measured_at: Timestamp


ADD = Statement(insert(Reading), returning=Reading)
LATEST = Statement(
    select(Reading).where(col(Reading.device_id) == bindparam("device_id")).order_by(col(Reading.id).desc()).limit(10)
)


class ReadingStore(Store):
    """The readings of all devices."""

    def add(self, device_id: str, celsius: float) -> None:
        """Add a reading with the present time.

        Raises:
            ValidationError: if the temperature is out of range.
        """
        reading = Reading(device_id=device_id, celsius=celsius, measured_at=self.unit.now())
        self.unit.write_one(ADD, **reading.model_dump(exclude={"id"}))

    def latest(self, device_id: str) -> list[Reading]:
        """Return the last ten readings of a device, the newest first."""
        return self.unit.all(LATEST, device_id=device_id)


class GatewayUnit(UnitOfWork):
    """A unit of work with the store of the readings."""

    readings: ReadingStore
