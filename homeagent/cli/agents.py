"""Commands that list and change agents (`homeagent agents`)."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from homeagent.cli import arguments
from homeagent.cli.application import group, open_named
from homeagent.cli.output import count, print_deletion, print_list, print_result, rows_in
from homeagent.cli.rows import (
    cascading_tables,
    change_shown,
    count_rows,
    json_argument,
    public,
    request,
    require_expected,
    show_row,
)
from homeagent.cli.visible_text import quoted
from homeagent.models.schemas import AgentCreate, AgentUpdate
from homeagent.models.session import AgentSession

agents: typer.Typer = group("agents", help="Create, list, change and delete agents.")


@agents.command()
def create(
    context: typer.Context,
    agent_id: arguments.AgentArgument,
    name: Annotated[str, arguments.option("TEXT", "Name for people.")],
    workspace: Annotated[str, arguments.option("DIRECTORY", "Workspace of the agent.")],
    config: arguments.ConfigOption = None,
) -> None:
    """Add an agent. The command does not create the workspace directory."""
    values = {"id": agent_id, "name": name, "workspace_path": workspace, "config": json_argument(config, "--config")}
    with open_named(context) as opened:
        agent = opened.agents.create(request(AgentCreate, **values))
    print_result(context, public(agent), f"Created {quoted(agent_id)}.")


@agents.command("list")
def list_agents(
    context: typer.Context,
    limit: arguments.LimitOption = 100,
    after: arguments.AfterOption = None,
    form: arguments.FormatOption = arguments.Format.TABLE,
) -> None:
    """List the agents."""
    with open_named(context) as opened:
        page = opened.agents.list(limit=limit, after=after)
    rows = [(agent.id, agent.name, agent.workspace_path, agent.created_at) for agent in page]
    print_list(context, ("Agent", "Name", "Workspace", "Created at"), rows, list(map(public, page)))


@agents.command()
def show(context: typer.Context, agent_id: arguments.AgentArgument) -> None:
    """Show an agent."""
    with open_named(context) as opened:
        agent = opened.agents.get(agent_id)
    print_result(context, public(agent), partial(show_row, agent))


@agents.command()
def update(
    context: typer.Context,
    agent_id: arguments.AgentArgument,
    name: Annotated[str | None, arguments.option("TEXT", "New name.")] = None,
    workspace: Annotated[str | None, arguments.option("DIRECTORY", "New workspace.")] = None,
    config: arguments.ConfigOption = None,
) -> None:
    """Change the given values of an agent. --config null clears the configuration."""
    given = {"name": name, "workspace_path": workspace, "config": config}
    values = {field: value for field, value in given.items() if value is not None}
    if not values:
        raise typer.BadParameter("name a change by --name, --workspace or --config.")
    if config is not None:
        values["config"] = json_argument(config, "--config")
    with open_named(context) as opened:
        agent = opened.agents.update(agent_id, request(AgentUpdate, **values))
    print_result(context, public(agent), f"Changed {quoted(agent_id)}.")


@agents.command()
def delete(
    context: typer.Context,
    agent_id: arguments.AgentArgument,
    with_sessions: Annotated[bool, arguments.flag("--with-sessions", "Also delete the sessions of the agent.")] = False,
    created_at: arguments.CreatedAtOption = None,
    dry_run: arguments.DryRunOption = False,
    yes: arguments.YesOption = False,
) -> None:
    """Delete an agent. The files in the agent's workspace stay.

    The command shows the agent and asks for a confirmation. The option --yes needs --created-at.
    """
    require_expected(context, "created_at")
    with open_named(context) as opened:
        sessions = count_rows(opened, AgentSession.agent_id, agent_id) if with_sessions else 0
        what = f"this agent and {count(sessions, 'session')}" if with_sessions else "this agent"
        cascades = cascading_tables(opened, "agents", *(["sessions"] if with_sessions else []))
        change_shown(
            context,
            opened,
            f"Delete {what}{rows_in(cascades)}?",
            lambda unit: unit.agents.get(agent_id),
            lambda unit: unit.agents.delete(agent_id, delete_sessions=with_sessions),
            name=f"agent {agent_id!r}",
            columns=("created_at",),
        )
    print_deletion(context, 1, quoted(agent_id), cascades, sessions=sessions)
