"""An agent, which has a name, a workspace directory and a configuration."""

from sqlalchemy import Column
from sqlmodel import Field

from homeagent.models.base import Table
from homeagent.models.types import (
    Identifier,
    Json,
    JsonColumn,
    Name,
    Timestamp,
    TimestampColumn,
    WorkspacePath,
    text_column,
)

__all__ = ["Agent"]


class Agent(Table, table=True):
    """A row of the table `agents`."""

    __tablename__ = "agents"

    id: Identifier = Field(
        sa_column=Column("id", text_column(), primary_key=True, nullable=False),
        description="Name of the agent for programs, such as `butler`.",
    )
    name: Name = Field(
        sa_column=Column("name", text_column(), nullable=False), description="Name of the agent for people."
    )
    workspace_path: WorkspacePath = Field(
        sa_column=Column("workspace_path", text_column(), nullable=False),
        description="Directory on the owner's machine. homeagent stores the path and does not open the directory.",
    )
    created_at: Timestamp = Field(
        sa_column=Column("created_at", TimestampColumn, nullable=False), description="Time of the creation."
    )
    config: Json = Field(
        default=None,
        sa_column=Column("config", JsonColumn),
        description="Configuration that the application defines, as JSON.",
    )
