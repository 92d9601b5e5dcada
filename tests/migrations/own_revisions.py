"""Revisions of an application, which tests write into a folder."""

from __future__ import annotations

from pathlib import Path

CREATE = (
    'op.create_table("notes", sa.Column("id", sa.Integer, primary_key=True), sa.Column("session_id", sa.Text,'
    ' sa.ForeignKey("sessions.session_id", ondelete="CASCADE")), sa.Column("text", sa.Text))'
)
REBUILD = (
    'with op.batch_alter_table("notes", recreate="always") as batch:\n'
    '    batch.add_column(sa.Column("stars", sa.Integer, server_default="0", nullable=False))'
)
CONCURRENTLY = (
    "with op.get_context().autocommit_block():\n"
    '    op.create_index("idx_notes_text", "notes", ["text"], postgresql_concurrently=True)'
)


def write_revision(folder: Path, revision: str, parent: str | tuple[str, ...] | None, body: str) -> Path:
    """Write a script into the folder `versions`, and return the path of the script."""
    (folder / "versions").mkdir(parents=True, exist_ok=True)
    upgrade, _, rest = body.partition("\n\n")
    lines = "\n".join(f"    {line}" for line in upgrade.strip().splitlines())
    script = folder / "versions" / f"{revision}.py"
    script.write_text(
        "import sqlalchemy as sa\nfrom alembic import op\n"
        f"revision: str = {revision!r}\ndown_revision = {parent!r}\n\n\ndef upgrade() -> None:\n{lines}\n\n\n{rest}"
    )
    return script


def write_revisions(folder: Path) -> Path:
    """Write three revisions, of which the last one leaves its transaction, and return the folder."""
    write_revision(folder, "a1", None, CREATE)
    write_revision(folder, "a2", "a1", REBUILD)
    write_revision(folder, "a3", "a2", CONCURRENTLY)
    return folder
