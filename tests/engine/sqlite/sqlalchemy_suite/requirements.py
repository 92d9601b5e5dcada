"""Which optional features of a database SQLAlchemy's suite tests; both SQLite dialects get the same."""

from typing import Any

from sqlalchemy.testing import exclusions
from sqlalchemy.testing.requirements import SuiteRequirements


class Requirements(SuiteRequirements):
    """SQLAlchemy's defaults, without the schemas that SQLite does not have unless a file is attached."""

    @property
    def schemas(self) -> Any:
        """No second schema."""
        return exclusions.closed()  # type: ignore[no-untyped-call]

    @property
    def cross_schema_fk_reflection(self) -> Any:
        """No foreign key between schemas."""
        return exclusions.closed()  # type: ignore[no-untyped-call]
