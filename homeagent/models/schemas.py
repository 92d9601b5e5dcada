"""The shapes: what creates or patches a row, and what a reply may show of it."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, SecretStr
from pydantic import Field as PlainField
from sqlmodel import Field

from homeagent.models.base import Model
from homeagent.models.device import Device, DeviceStatus, Role
from homeagent.models.session import new_session_id
from homeagent.models.types import Identifier, Json, Label, Timestamp, WorkspacePath, check_new_secret

__all__ = [
    "AgentCreate",
    "AgentPublic",
    "AgentSessionCreate",
    "AgentSessionPublic",
    "AgentUpdate",
    "DeviceCreate",
    "DevicePair",
    "DevicePublic",
    "DeviceUpdate",
    "PairedDevice",
    "SecretCheck",
]


class Schema(Model):
    """What creates or patches a row, or what a reply may show of it: a plain Pydantic model, no table."""


class MetadataSchema(Schema):
    """A shape with a field of free metadata.

    The field is named `metadata_`, since SQLAlchemy needs the name `metadata` on the class. `metadata` is its alias
    where it is validated and dumped, and a property for who reads it.
    """

    # SQLModel declares a class variable here; a shape is no table, so that nobody looks for a MetaData on it.
    @property
    def metadata(self) -> Any:  # type: ignore[override]  # see above
        """The value of `metadata_`."""
        return self.metadata_  # type: ignore[attr-defined]  # every subclass declares the field


class AgentCreate(Schema):
    """What creates an agent; also a request body."""

    id: Identifier
    name: Label
    workspace_path: WorkspacePath
    config: Json = None


class AgentUpdate(Schema):
    """What may change of an agent; also a request body. What is left out stays; `config=None` empties it."""

    # The default stands for "left out" and is never validated; a null that is sent is refused.
    name: Label = Field(default=None)
    workspace_path: WorkspacePath = Field(default=None)
    config: Json = None


class AgentPublic(Schema):
    """What a reply may show of an agent."""

    id: Identifier
    name: Label
    workspace_path: WorkspacePath
    created_at: Timestamp
    config: Json = None


class DevicePair(MetadataSchema):
    """A request body: a device asks to pair. Whoever sends it decides nothing about its approval."""

    id: Identifier
    role: Role
    shared_secret: Annotated[SecretStr, AfterValidator(check_new_secret)] | None = Field(
        default=None,
        description="The secret that a human chose. Left out, one of 256 bits is made and given back once.",
    )
    metadata_: Json = Field(default=None, alias="metadata")


class DeviceCreate(MetadataSchema):
    """What creates a device, for code that holds a hash already. Never a request body: see `DevicePair`."""

    id: Identifier
    role: Role
    shared_secret_hash: Label = Field(repr=False, exclude=True)
    metadata_: Json = Field(default=None, alias="metadata")
    proof_verifier: Label | None = Field(default=None, repr=False, exclude=True)


class DeviceUpdate(MetadataSchema):
    """What may change of a device. What is left out stays; the role is bound when it pairs."""

    metadata_: Json = Field(default=None, alias="metadata")


class DevicePublic(MetadataSchema):
    """What a reply may show of a device: nothing that its secret could be checked against."""

    id: Identifier
    role: Role
    approved: bool
    status: DeviceStatus
    paired_at: Timestamp
    last_seen_at: Timestamp | None = None
    approved_at: Timestamp | None = None
    revoked_at: Timestamp | None = None
    revoked_reason: Label | None = None
    # From a row, a plain alias would read SQLAlchemy's MetaData off the class.
    metadata_: Json = PlainField(
        default=None, validation_alias=AliasChoices("metadata_", "metadata"), serialization_alias="metadata"
    )


class PairedDevice(BaseModel):
    """A device that has just paired, and its secret, which nobody can ask for again.

    Attributes:
        device: the device as it was stored, unapproved.
        shared_secret: what the device proves itself with: the one it sent, or the one that was made for it.
    """

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    device: Device
    shared_secret: SecretStr


@dataclass(frozen=True, slots=True)
class SecretCheck:
    """Report what a check of a secret found. It is true only if the device is approved and the secret is right.

    Attributes:
        status: where the device stands if the secret is right; `denied` if the secret is wrong or the device is absent.
        device: the device if the secret is right, else None.
    """

    status: Literal["approved", "pending", "revoked", "denied"]
    device: Device | None = None

    def __bool__(self) -> bool:
        return self.status == "approved"


class AgentSessionCreate(Schema):
    """What creates a session; also a request body."""

    session_id: Identifier = Field(default_factory=new_session_id, description="A UUIDv7 is made where it is left out.")
    agent_id: Identifier
    sender_id: Label | None = None
    channel_id: Label | None = None


class AgentSessionPublic(Schema):
    """What a reply may show of a session."""

    session_id: Identifier
    agent_id: Identifier
    sender_id: Label | None = None
    channel_id: Label | None = None
    created_at: Timestamp
    last_active_at: Timestamp
