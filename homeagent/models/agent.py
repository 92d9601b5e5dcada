"""An agent has a name, a workspace directory and a configuration."""

from sqlmodel import Field

from homeagent.models.base import Table
from homeagent.models.types import Identifier, Json, Name, Timestamp, WorkspacePath


class Agent(Table, table=True):
    """A row of the table `agents`."""

    __tablename__ = "agents"

    id: Identifier = Field(primary_key=True, description="Name that programs use, such as `butler`.")
    name: Name = Field(description="Name that people see, such as `Butler`.")
    workspace_path: WorkspacePath = Field(
        description="Directory on the owner's machine. homeagent stores the path and does not open the directory."
    )
    created_at: Timestamp = Field(description="Time of the creation.")
    config: Json = Field(default=None, description="Configuration that the application defines, as JSON.")
