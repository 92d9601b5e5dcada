"""Schemas are Pydantic models of requests and replies. A request creates or changes a row."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BaseModel, GetJsonSchemaHandler, SecretStr, WithJsonSchema
from pydantic import Field as PlainField
from pydantic_core import CoreSchema
from sqlmodel import Field

from homeagent.credentials.secret_format import MAX_SECRET_CHARACTERS
from homeagent.models.base import Model
from homeagent.models.device import Device, DeviceStatus, Role
from homeagent.models.session import new_session_id
from homeagent.models.types import (
    MIN_SECRET_CHARACTERS,
    Identifier,
    Json,
    Label,
    Name,
    PairingJson,
    SessionId,
    Timestamp,
    WorkspacePath,
    check_new_secret,
)

# Keep the name `metadata_` first. Pydantic converts a KeyboardInterrupt in `_Metadata` into a ValidationError.
PublicMetadata = Annotated[
    Json, PlainField(validation_alias=AliasChoices("metadata_", "metadata"), serialization_alias="metadata")
]


ChosenSecret = Annotated[
    SecretStr,
    AfterValidator(check_new_secret),
    WithJsonSchema(
        {
            "type": "string",
            "minLength": MIN_SECRET_CHARACTERS,
            "maxLength": MAX_SECRET_CHARACTERS,
            "pattern": r"^[^\u0000-\u001f\u007f-\u009f]*$",
            "writeOnly": True,
            "format": "password",
        }
    ),
]


class MetadataSchema(Model):
    """A schema with the field `metadata_`, whose alias is `metadata`. SQLAlchemy reserves the name `metadata`."""

    # Without a table, SQLAlchemy does not use the attribute `metadata`.
    @property
    def metadata(self) -> Any:  # type: ignore[override]  # see above
        """The value of the field `metadata_`."""
        return self.metadata_  # type: ignore[attr-defined]  # every subclass declares the field

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler, /) -> dict[str, Any]:
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema)["properties"]
        # Of the choices in `PublicMetadata`, Pydantic would use the first choice as the name in a validation schema.
        if isinstance(cls.model_fields["metadata_"].validation_alias, AliasChoices) and "metadata_" in properties:
            properties["metadata"] = properties.pop("metadata_")
        return schema


class AgentCreate(Model):
    """Request to create an agent."""

    id: Identifier
    name: Name
    workspace_path: WorkspacePath
    config: Json = None


class AgentUpdate(Model):
    """Request to change an agent. Omitted fields keep their values. The value None of the field `config` clears the
    configuration.
    """

    # Pydantic refuses null, but does not validate the default None.
    name: Name = Field(default=None)
    workspace_path: WorkspacePath = Field(default=None)
    config: Json = None


# Do not validate the texts of a reply. A text from an earlier version can break the present rules.


class AgentPublic(Model):
    """Reply with the fields of an agent."""

    id: str
    name: str
    workspace_path: str
    created_at: Timestamp
    config: Json = None


class DevicePair(MetadataSchema):
    """Request of a device to pair. The request cannot approve the device."""

    id: Identifier
    role: Role
    shared_secret: ChosenSecret | None = Field(
        default=None,
        description="Secret that a person chose. Without a secret, the reply contains a new secret of 256 bits.",
    )
    metadata_: PairingJson = Field(default=None, alias="metadata", description="JSON of at most 16 KiB.")


class DeviceCreate(MetadataSchema):
    """Request to create a device whose secret is already hashed. For a request body, use `DevicePair` instead."""

    id: Identifier
    role: Role
    shared_secret_hash: Name = Field(repr=False, exclude=True)
    metadata_: Json = Field(default=None, alias="metadata")
    proof_verifier: Name | None = Field(default=None, repr=False, exclude=True)


class DeviceUpdate(MetadataSchema):
    """Request to change a device. Omitted fields keep their values. The role can't be changed."""

    metadata_: Json = Field(default=None, alias="metadata")


class DevicePublic(MetadataSchema):
    """Reply with a device's fields, except the fields about its secrets."""

    id: str
    role: Role
    approved: bool
    status: DeviceStatus
    paired_at: Timestamp
    last_seen_at: Timestamp | None = None
    approved_at: Timestamp | None = None
    revoked_at: Timestamp | None = None
    revoked_reason: str | None = None
    metadata_: PublicMetadata = None


class PairedDevice(BaseModel, frozen=True, arbitrary_types_allowed=True):
    """A device that has just paired, and its secret. The secret can't be read again later.

    Attributes:
        device: the stored device, which is not approved yet.
        shared_secret: the request's secret, or else the generated secret.
    """

    device: Device
    shared_secret: SecretStr


@dataclass(frozen=True, slots=True)
class SecretCheck:
    """The result of a check of a secret. If the status is "approved", `bool(check)` is True.

    Attributes:
        status: status of the device if the secret is right, or else "denied".
        device: device with the presented id; None if the secret is wrong.
    """

    status: Literal["approved", "pending", "revoked", "denied"]
    device: Device | None = None

    def __bool__(self) -> bool:
        return self.status == "approved"


class AgentSessionCreate(MetadataSchema):
    """Request to create a session."""

    session_id: SessionId = Field(default_factory=new_session_id, description="Default: a new UUIDv7.")
    agent_id: Identifier
    sender_id: Label | None = None
    channel_id: Label | None = None
    metadata_: Json = Field(default=None, alias="metadata")


class AgentSessionUpdate(MetadataSchema):
    """Request to change a session. Omitted fields keep their values. To change the agent, sender or channel, call
    `sessions.move()`.
    """

    metadata_: Json = Field(default=None, alias="metadata")


class AgentSessionPublic(MetadataSchema):
    """Reply with the fields of a session."""

    session_id: str
    agent_id: str
    sender_id: str | None = None
    channel_id: str | None = None
    created_at: Timestamp
    last_active_at: Timestamp
    metadata_: PublicMetadata = None
