"""Commands that list, move and delete sessions (`homeagent sessions`)."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

from homeagent.cli import arguments
from homeagent.cli.application import group, open_named
from homeagent.cli.output import print_deletion, print_list, print_result, rows_in
from homeagent.cli.rows import cascading_tables, change_shown, public, require_expected, show_row
from homeagent.cli.visible_text import quoted
from homeagent.models.session import AgentSession
from homeagent.models.types import check_label
from homeagent.unit_of_work import UnitOfWork

sessions: typer.Typer = group("sessions", help="List, move and delete sessions, which are an index of the transcripts.")


@sessions.command("list")
def list_sessions(
    context: typer.Context,
    agent: Annotated[str | None, arguments.option("AGENT", "Only sessions of this agent.")] = None,
    sender: Annotated[str | None, arguments.option("SENDER", "Only sessions with this sender.")] = None,
    channel: Annotated[str | None, arguments.option("CHANNEL", "Only sessions in this channel.")] = None,
    limit: arguments.LimitOption = 100,
    after: arguments.AfterOption = None,
    form: arguments.FormatOption = arguments.Format.TABLE,
) -> None:
    """List the sessions. The session with the latest activity comes first."""

    def read(unit: UnitOfWork) -> list[AgentSession]:
        last = None if after is None else unit.sessions.get(after)
        found = unit.sessions.list(agent_id=agent, sender_id=sender, channel_id=channel, limit=limit, after=last)
        return list(found)

    with open_named(context) as opened:
        page = opened.run(read, read_only=True)
    rows = [(row.session_id, row.agent_id, row.sender_id, row.channel_id, row.last_active_at) for row in page]
    headings = ("Session", "Agent", "Sender", "Channel", "Last active at")
    print_list(context, headings, rows, list(map(public, page)))


@sessions.command()
def show(context: typer.Context, session_id: arguments.SessionArgument) -> None:
    """Show a session."""
    with open_named(context) as opened:
        session = opened.sessions.get(session_id)
    print_result(context, public(session), partial(show_row, session))


@sessions.command()
def move(
    context: typer.Context,
    session_id: arguments.SessionArgument,
    agent: Annotated[str | None, arguments.option("AGENT", "New agent.")] = None,
    sender: Annotated[str | None, arguments.text("SENDER", "New sender.", check_label)] = None,
    no_sender: Annotated[bool, arguments.flag("--no-sender", "Remove the sender from the session's route.")] = False,
    channel: Annotated[str | None, arguments.text("CHANNEL", "New channel.", check_label)] = None,
    no_channel: Annotated[bool, arguments.flag("--no-channel", "Remove the channel from the session's route.")] = False,
) -> None:
    """Give a session a different agent, sender or channel.

    The next message on the new route continues the session. The command changes only the named parts of the route.
    """
    if (sender is not None and no_sender) or (channel is not None and no_channel):
        raise typer.BadParameter("--no-sender and --sender, or --no-channel and --channel, exclude each other.")
    changes: dict[str, Any] = {"agent_id": agent, "sender_id": sender, "channel_id": channel}
    changes = {name: value for name, value in changes.items() if value is not None}
    changes |= {"sender_id": None} if no_sender else {}
    changes |= {"channel_id": None} if no_channel else {}
    if not changes:
        raise typer.BadParameter("name a new agent, sender or channel.")
    with open_named(context) as opened:
        session = opened.sessions.move(session_id, **changes)
    print_result(context, public(session), f"Moved {quoted(session_id)}.")


@sessions.command()
def delete(
    context: typer.Context,
    session_id: arguments.SessionArgument,
    created_at: arguments.CreatedAtOption = None,
    yes: arguments.YesOption = False,
) -> None:
    """Delete a session but not its transcript.

    The command shows the session and asks for a confirmation. The option --yes needs --created-at.
    """
    require_expected(context, "created_at")
    with open_named(context) as opened:
        cascades = cascading_tables(opened, "sessions")
        change_shown(
            context,
            opened,
            f"Delete this session{rows_in(cascades)}?",
            lambda unit: unit.sessions.get(session_id),
            lambda unit: unit.sessions.delete(session_id),
            name=f"session {session_id!r}",
            columns=("created_at",),
        )
    print_deletion(context, 1, quoted(session_id), cascades)
