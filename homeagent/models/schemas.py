"""Schemas: Pydantic models of requests, which create or change a row, and of replies."""

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
    """Base of the schemas: a Pydantic model without a table."""


class MetadataSchema(Schema):
    """A schema with a field for the application's metadata.

    The field is `metadata_`, because SQLAlchemy uses the attribute `metadata` of a class. The alias is `metadata`.
    """

    # This hides a class variable of SQLModel, which SQLAlchemy does not read for a class without a table.
    @property
    def metadata(self) -> Any:  # type: ignore[override]  # see above
        """The value of `metadata_`."""
        return self.metadata_  # type: ignore[attr-defined]  # every subclass declares the field


class AgentCreate(Schema):
    """Create an agent. May be a request body."""

    id: Identifier
    name: Label
    workspace_path: WorkspacePath
    config: Json = None


class AgentUpdate(Schema):
    """Change an agent. May be a request body. Fields that are left out stay; `config=None` clears the configuration."""

    # The default None means "left out", and Pydantic does not validate it. A null in the request is refused.
    name: Label = Field(default=None)
    workspace_path: WorkspacePath = Field(default=None)
    config: Json = None


class AgentPublic(Schema):
    """An agent in a reply."""

    id: Identifier
    name: Label
    workspace_path: WorkspacePath
    created_at: Timestamp
    config: Json = None


class DevicePair(MetadataSchema):
    """The request of a device to pair, as a request body. It does not influence the approval."""

    id: Identifier
    role: Role
    shared_secret: Annotated[SecretStr, AfterValidator(check_new_secret)] | None = Field(
        default=None,
        description="Secret that a person chose. If left out, the reply returns a new secret of 256 bits once.",
    )
    metadata_: Json = Field(default=None, alias="metadata")


class DeviceCreate(MetadataSchema):
    """Create a device whose secret is hashed already. Do not use as a request body: see `DevicePair`."""

    id: Identifier
    role: Role
    shared_secret_hash: Label = Field(repr=False, exclude=True)
    metadata_: Json = Field(default=None, alias="metadata")
    proof_verifier: Label | None = Field(default=None, repr=False, exclude=True)


class DeviceUpdate(MetadataSchema):
    """Change a device. Fields that are left out stay. The role is fixed when the device pairs."""

    metadata_: Json = Field(default=None, alias="metadata")


class DevicePublic(MetadataSchema):
    """A device in a reply, without values derived from its secret."""

    id: Identifier
    role: Role
    approved: bool
    status: DeviceStatus
    paired_at: Timestamp
    last_seen_at: Timestamp | None = None
    approved_at: Timestamp | None = None
    revoked_at: Timestamp | None = None
    revoked_reason: Label | None = None
    # `metadata_` first: validation from a row would otherwise read SQLAlchemy's MetaData.
    metadata_: Json = PlainField(
        default=None, validation_alias=AliasChoices("metadata_", "metadata"), serialization_alias="metadata"
    )


class PairedDevice(BaseModel):
    """A device that has just paired, and its secret. The secret can't be read again later.

    Attributes:
        device: stored device, not approved.
        shared_secret: secret from the request, or the generated secret.
    """

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    device: Device
    shared_secret: SecretStr


@dataclass(frozen=True, slots=True)
class SecretCheck:
    """The result of a check of a secret. True only if the device is approved and the secret is right.

    Attributes:
        status: status of the device if the secret is right; `denied` if the secret is wrong or the device is absent.
        device: device if the secret is right, else None.
    """

    status: Literal["approved", "pending", "revoked", "denied"]
    device: Device | None = None

    def __bool__(self) -> bool:
        return self.status == "approved"


class AgentSessionCreate(Schema):
    """Create a session. May be a request body."""

    session_id: Identifier = Field(default_factory=new_session_id, description="If left out, a new UUIDv7.")
    agent_id: Identifier
    sender_id: Label | None = None
    channel_id: Label | None = None


class AgentSessionPublic(Schema):
    """A session in a reply."""

    session_id: Identifier
    agent_id: Identifier
    sender_id: Label | None = None
    channel_id: Label | None = None
    created_at: Timestamp
    last_active_at: Timestamp
