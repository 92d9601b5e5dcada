"""The commands `homeagent sessions`, which list, move and delete sessions."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated, Any

import typer

from homeagent.cli.application import DatabaseOption, JsonOption, YesOption, confirm, group
from homeagent.cli.opening import open_named
from homeagent.cli.output import Format, FormatOption, format_timestamp, print_facts, print_json, print_table
from homeagent.cli.visible_text import identity, quoted
from homeagent.errors import SessionNotFoundError
from homeagent.models.schemas import AgentSessionPublic
from homeagent.models.session import AgentSession
from homeagent.models.types import MAX_LIMIT
from homeagent.unit_of_work import UnitOfWork

sessions: typer.Typer = group("sessions", help="List, move and delete sessions, which are an index of the transcripts.")

SessionArgument = Annotated[str, typer.Argument(metavar="SESSION", help="Id of the session.", show_default=False)]


def _public(session: AgentSession) -> dict[str, Any]:
    return AgentSessionPublic.model_validate(session, from_attributes=True).model_dump(mode="json", by_alias=True)


def _show(session: AgentSession, *, error: bool = False) -> None:
    facts = {
        "Session": identity(session.session_id),
        "Agent": identity(session.agent_id),
        "Sender": "-" if session.sender_id is None else identity(session.sender_id),
        "Channel": "-" if session.channel_id is None else identity(session.channel_id),
        "Created at": format_timestamp(session.created_at),
        "Last active at": format_timestamp(session.last_active_at),
        "Metadata": json.dumps(session.metadata_),
    }
    print_facts(facts.items(), error=error)


@sessions.command("list")
def list_sessions(
    context: typer.Context,
    agent: Annotated[str | None, typer.Option(help="Only sessions of this agent.", show_default=False)] = None,
    sender: Annotated[str | None, typer.Option(help="Only sessions with this sender.", show_default=False)] = None,
    channel: Annotated[str | None, typer.Option(help="Only sessions in this channel.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(min=1, max=MAX_LIMIT, metavar="ROWS", help="Maximum number of sessions.")] = 100,
    after: Annotated[
        str | None, typer.Option(metavar="SESSION", help="Last id of the previous page.", show_default=False)
    ] = None,
    form: FormatOption = Format.TABLE,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the sessions. The session with the latest activity comes first."""

    def read(unit: UnitOfWork) -> list[AgentSession]:
        last = None if after is None else unit.sessions.get(after)
        found = unit.sessions.list(agent_id=agent, sender_id=sender, channel_id=channel, limit=limit, after=last)
        return list(found)

    with open_named(context, database) as opened:
        page = opened.run(read, read_only=True)
    if as_json:
        print_json([_public(session) for session in page])
        return
    rows = [
        (found.session_id, found.agent_id, found.sender_id, found.channel_id, found.last_active_at) for found in page
    ]
    print_table(("Session", "Agent", "Sender", "Channel", "Last active at"), rows, form=form)


@sessions.command()
def show(
    context: typer.Context, session_id: SessionArgument, database: DatabaseOption = None, as_json: JsonOption = False
) -> None:
    """Show a session."""
    with open_named(context, database) as opened:
        session = opened.sessions.get(session_id)
    if as_json:
        print_json(_public(session))
    else:
        _show(session)


@sessions.command()
def move(
    context: typer.Context,
    session_id: SessionArgument,
    agent: Annotated[str | None, typer.Option(metavar="AGENT", help="New agent.", show_default=False)] = None,
    sender: Annotated[str | None, typer.Option(metavar="SENDER", help="New sender.", show_default=False)] = None,
    no_sender: Annotated[bool, typer.Option("--no-sender", help="Move to a route without a sender.")] = False,
    channel: Annotated[str | None, typer.Option(metavar="CHANNEL", help="New channel.", show_default=False)] = None,
    no_channel: Annotated[bool, typer.Option("--no-channel", help="Move to a route without a channel.")] = False,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a session another agent, sender or channel.

    After the move, the next message on the new route continues the session. The command changes only the given parts of
    the route.
    """
    if (sender is not None and no_sender) or (channel is not None and no_channel):
        raise typer.BadParameter("--no-sender and --sender, or --no-channel and --channel, exclude each other.")
    changes: dict[str, Any] = {"agent_id": agent, "sender_id": sender, "channel_id": channel}
    changes = {name: value for name, value in changes.items() if value is not None}
    changes |= {"sender_id": None} if no_sender else {}
    changes |= {"channel_id": None} if no_channel else {}
    if not changes:
        raise typer.BadParameter("name a new agent, sender or channel.")
    with open_named(context, database) as opened:
        session = opened.sessions.move(session_id, **changes)
    if as_json:
        print_json(_public(session))
    else:
        typer.echo(f"Moved {quoted(session_id)}.")


@sessions.command()
def delete(
    context: typer.Context,
    session_id: SessionArgument,
    yes: YesOption = False,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete a session but not its transcript.

    The command shows the session and asks for a confirmation.
    """
    with open_named(context, database) as opened:
        session = opened.sessions.get(session_id)
        confirm(context, "Delete this session?", yes=yes, show=partial(_show, session, error=True))
        if not opened.sessions.delete(session_id):
            raise SessionNotFoundError(session_id)  # another process deleted the session in the meantime
    if as_json:
        print_json({"deleted": 1})
    else:
        typer.echo(f"Deleted {quoted(session_id)}.")
