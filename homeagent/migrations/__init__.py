"""Schema migrations: find the revisions, lock, back up, upgrade and verify."""

from homeagent.migrations.revisions import REVISION, revision_of
from homeagent.models import VERSION_TABLE
