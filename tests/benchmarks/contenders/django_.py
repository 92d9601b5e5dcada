"""Django's ORM: unmanaged models, `get`, `filter`, `create`, `bulk_create`, and `transaction.atomic`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import django
from django.conf import settings

from tests.benchmarks.contender import BATCH, GRACE, GRANULARITY, SESSION_COLUMNS, Contender
from tests.benchmarks.contenders.handwritten import PRAGMAS, route_key
from tests.benchmarks.data import DAY, METHOD

__all__ = ["Django"]

# The models can be declared only once there are settings, and the file is known only when a contender is made.
settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "set later", "CONN_MAX_AGE": None}},
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    USE_TZ=True,
)
django.setup()

from django.db import connection, models, transaction  # noqa: E402  see above
from django.db.models import Q  # noqa: E402  see above


class Device(models.Model):
    """A row of `devices`."""

    id = models.TextField(primary_key=True)
    role = models.TextField()
    shared_secret_hash = models.TextField()
    approved = models.IntegerField(default=0)
    paired_at = models.BigIntegerField()
    last_seen_at = models.BigIntegerField(null=True)
    metadata = models.TextField(null=True)
    approved_at = models.BigIntegerField(null=True)
    revoked_at = models.BigIntegerField(null=True)
    revoked_reason = models.TextField(null=True)
    previous_secret_hash = models.TextField(null=True)
    previous_secret_expires_at = models.BigIntegerField(null=True)
    proof_verifier = models.TextField(null=True)

    class Meta:
        app_label = "benchmarks"
        db_table = "devices"
        managed = False


class Agent(models.Model):
    """A row of `agents`."""

    id = models.TextField(primary_key=True)
    name = models.TextField()
    workspace_path = models.TextField()
    created_at = models.BigIntegerField()
    config = models.TextField(null=True)

    class Meta:
        app_label = "benchmarks"
        db_table = "agents"
        managed = False


class AgentSession(models.Model):
    """A row of `sessions`."""

    session_id = models.TextField(primary_key=True)
    agent_id = models.TextField()
    sender_id = models.TextField(null=True)
    channel_id = models.TextField(null=True)
    created_at = models.BigIntegerField()
    last_active_at = models.BigIntegerField()
    route_key = models.TextField(null=True)

    class Meta:
        app_label = "benchmarks"
        db_table = "sessions"
        managed = False


class Nonce(models.Model):
    """A row of `nonces`."""

    pk = models.CompositePrimaryKey("device_id", "nonce")
    nonce = models.TextField()
    device_id = models.TextField()
    created_at = models.BigIntegerField()
    expires_at = models.BigIntegerField()

    class Meta:
        app_label = "benchmarks"
        db_table = "nonces"
        managed = False


class IdempotencyKey(models.Model):
    """A row of `idempotency_keys`."""

    pk = models.CompositePrimaryKey("device_id", "method", "key")
    key = models.TextField()
    method = models.TextField()
    device_id = models.TextField()
    result = models.TextField()
    created_at = models.BigIntegerField()
    expires_at = models.BigIntegerField()
    state = models.TextField(default="completed")
    fingerprint = models.TextField(null=True)
    owner = models.TextField(null=True)
    attempt = models.IntegerField(default=1)
    lease_expires_at = models.BigIntegerField(null=True)
    downstream_key = models.TextField(null=True)
    omitted = models.IntegerField(default=0)

    class Meta:
        app_label = "benchmarks"
        db_table = "idempotency_keys"
        managed = False


class Django(Contender):
    """Models."""

    def __init__(self, target: str, durability: str, *, traced: bool = False) -> None:
        super().__init__(target, durability, traced=traced)
        connection.settings_dict["NAME"] = target
        connection.settings_dict["OPTIONS"] = {"transaction_mode": "IMMEDIATE"}
        with connection.cursor() as cursor:
            for pragma in (*PRAGMAS, f"synchronous={durability}"):
                cursor.execute(f"PRAGMA {pragma}")

    @classmethod
    def describe(cls) -> str:
        """Return the version."""
        return version("django")

    def prepare(self, work: str, arguments: list[Any]) -> list[Any]:
        """Make models of sessions."""
        if work == "index":
            return [([_session((*row, route_key(*row[1:4]))) for row in rows],) for (rows,) in arguments]
        return arguments

    def device(self, device_id: str) -> Any:
        """Find a device."""
        return Device.objects.filter(id=device_id).first()

    def find_key(self, device_id: str, method: str, key: str) -> Any:
        """Find a live key."""
        live = Q(expires_at__gt=self.now()) | Q(state="in_progress")
        return IdempotencyKey.objects.filter(live, device_id=device_id, method=method, key=key).first()

    def agent_sessions(self, agent_id: str, limit: int) -> Any:
        """List sessions."""
        found = AgentSession.objects.filter(agent_id=agent_id).order_by("-last_active_at", "-session_id")
        return list(found[:limit])

    def seen(self, device_id: str) -> bool:
        """Remember when a device was seen."""
        with transaction.atomic():
            return self._see(device_id)

    def _see(self, device_id: str) -> bool:
        now = self.now()
        due = Q(last_seen_at=None) | Q(last_seen_at__lte=now - GRANULARITY)
        wrote: int = Device.objects.filter(due, id=device_id).update(last_seen_at=now)
        return wrote > 0

    def consume(self, device_id: str, nonce: str, expires_at: int) -> bool:
        """Use up a nonce."""
        now = self.now()
        with transaction.atomic():
            row, made = Nonce.objects.get_or_create(
                device_id=device_id, nonce=nonce, defaults={"created_at": now, "expires_at": expires_at}
            )
            if not made:
                if row.expires_at > now:
                    return False
                row.created_at, row.expires_at = now, expires_at
                row.save()
        return True

    def insert_key(self, device_id: str, method: str, key: str, result: Any) -> bool:
        """Store a result."""
        with transaction.atomic():
            return self._store(device_id, method, key, result)

    def _store(self, device_id: str, method: str, key: str, result: Any, **others: Any) -> bool:
        now = self.now()
        scope = {"device_id": device_id, "method": method, "key": key}
        row = IdempotencyKey.objects.filter(**scope).first()
        if row is not None:
            if row.expires_at > now or row.state == "in_progress":
                return False
            row.delete()
        values = {"result": json.dumps(result), "created_at": now, "expires_at": now + DAY, **others}
        IdempotencyKey.objects.create(**scope, **values)
        return True

    def claim(self, device_id: str, method: str, key: str, result: Any) -> bool:
        """Claim and complete."""
        claimed = self.claimed()
        owner = claimed["owner"]
        with transaction.atomic():
            if not self._store(device_id, method, key, None, **claimed):
                return False
        with transaction.atomic():
            owned = IdempotencyKey.objects.filter(device_id=device_id, method=method, key=key, owner=owner)
            wrote: int = owned.update(state="completed", result=json.dumps(result), lease_expires_at=None)
        return wrote > 0

    def index(self, sessions: Sequence[AgentSession]) -> int:
        """Add sessions, or move on those that exist."""
        with transaction.atomic():
            AgentSession.objects.bulk_create(
                sessions, update_conflicts=True, unique_fields=["session_id"], update_fields=["last_active_at"]
            )
        return len(sessions)

    def welcome(self, device_id: str) -> None:
        """Pair and approve a device."""
        if self.device(device_id) is None:
            secret = f"sha256$of-{device_id}"
            with transaction.atomic():
                Device.objects.create(id=device_id, role="client", shared_secret_hash=secret, paired_at=self.now())
            with transaction.atomic():
                Device.objects.filter(id=device_id).update(approved=1, approved_at=self.now())

    def answer(self, event: Any) -> bool:
        """Take a message."""
        now, agent_id, session_id = self.now(), event["agent"], event["session"]
        with transaction.atomic():
            self._see(event["device"])
            if Agent.objects.filter(id=agent_id).first() is None:
                path = f"/srv/agents/{agent_id}"
                Agent.objects.create(id=agent_id, name=agent_id.title(), workspace_path=path, created_at=now)
            if AgentSession.objects.filter(session_id=session_id).first() is None:
                sender, channel = event["sender"], event["channel"]
                route = route_key(agent_id, sender, channel)
                taken = AgentSession.objects.filter(route_key=route).exists()
                row = (session_id, agent_id, sender, channel, now, now, None if taken else route)
                _session(row).save(force_insert=True)
            AgentSession.objects.filter(session_id=session_id, last_active_at__lt=now).update(last_active_at=now)
            if self.find_key(event["device"], METHOD, event["key"]) is not None:
                return True
            self._store(event["device"], METHOD, event["key"], {"session": session_id, "accepted_at": now})
        return False

    def sweep(self) -> int:
        """Delete dead rows."""
        now, total = self.now(), 0
        for model, before in ((Nonce, now - GRACE), (IdempotencyKey, now)):
            count = BATCH
            while count == BATCH:
                with transaction.atomic():
                    dead: Any = model.objects.filter(expires_at__lte=before).order_by("expires_at")
                    oldest = list(dead.values_list("pk", flat=True)[:BATCH])
                    count = model.objects.filter(pk__in=oldest).delete()[0] if oldest else 0
                total += count
        return total

    def close(self) -> None:
        """Close the connection."""
        connection.close()


def _session(row: Sequence[Any]) -> AgentSession:
    return AgentSession(**dict(zip(SESSION_COLUMNS, row, strict=True)))
