"""Schema migrations: find the revisions, lock, back up, upgrade and verify. The modules sqlite.py and postgresql.py
contain the code of each engine.
"""

from homeagent.migrations.revisions import REVISION, revision_of
from homeagent.models import VERSION_TABLE
