"""The commands `homeagent agents`, which list and change agents."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated, Any

import typer

from homeagent.cli.application import DatabaseOption, JsonOption, YesOption, confirm, group
from homeagent.cli.opening import open_named
from homeagent.cli.output import Format, FormatOption, format_timestamp, print_facts, print_json, print_table
from homeagent.cli.request import json_argument, request
from homeagent.cli.visible_text import identity, quoted
from homeagent.errors import AgentNotFoundError
from homeagent.models.agent import Agent
from homeagent.models.schemas import AgentCreate, AgentPublic, AgentUpdate
from homeagent.models.types import MAX_LIMIT

agents: typer.Typer = group("agents", help="Create, list, change and delete agents.")

AgentArgument = Annotated[str, typer.Argument(metavar="AGENT", help="Id of the agent.", show_default=False)]
ConfigOption = Annotated[
    str | None, typer.Option("--config", metavar="JSON", help="Configuration of the agent.", show_default=False)
]


def _public(agent: Agent) -> dict[str, Any]:
    return AgentPublic.model_validate(agent, from_attributes=True).model_dump(mode="json")


def _show(agent: Agent, *, error: bool = False) -> None:
    facts = {
        "Agent": identity(agent.id),
        "Name": identity(agent.name),
        "Workspace": identity(agent.workspace_path),
        "Created at": format_timestamp(agent.created_at),
        "Config": json.dumps(agent.config),
    }
    print_facts(facts.items(), error=error)


def _report(agent: Agent, word: str, *, as_json: bool) -> None:
    if as_json:
        print_json(_public(agent))
    else:
        typer.echo(f"{word} {quoted(agent.id)}.")


@agents.command()
def create(
    context: typer.Context,
    agent_id: AgentArgument,
    name: Annotated[str, typer.Option(metavar="TEXT", help="Name for people.", show_default=False)],
    workspace: Annotated[str, typer.Option(metavar="DIRECTORY", help="Workspace of the agent.", show_default=False)],
    config: ConfigOption = None,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add an agent. The command does not create the workspace directory."""
    values = {"id": agent_id, "name": name, "workspace_path": workspace, "config": json_argument(config, "--config")}
    with open_named(context, database) as opened:
        agent = opened.agents.create(request(AgentCreate, **values))
    _report(agent, "Created", as_json=as_json)


@agents.command("list")
def list_agents(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, max=MAX_LIMIT, metavar="ROWS", help="Maximum number of agents.")] = 100,
    after: Annotated[
        str | None, typer.Option(metavar="AGENT", help="Last id of the previous page.", show_default=False)
    ] = None,
    form: FormatOption = Format.TABLE,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the agents."""
    with open_named(context, database) as opened:
        page = opened.agents.list(limit=limit, after=after)
    if as_json:
        print_json([_public(agent) for agent in page])
        return
    rows = [(agent.id, agent.name, agent.workspace_path, agent.created_at) for agent in page]
    print_table(("Agent", "Name", "Workspace", "Created at"), rows, form=form)


@agents.command()
def show(
    context: typer.Context, agent_id: AgentArgument, database: DatabaseOption = None, as_json: JsonOption = False
) -> None:
    """Show an agent."""
    with open_named(context, database) as opened:
        agent = opened.agents.get(agent_id)
    if as_json:
        print_json(_public(agent))
    else:
        _show(agent)


@agents.command()
def update(
    context: typer.Context,
    agent_id: AgentArgument,
    name: Annotated[str | None, typer.Option(metavar="TEXT", help="New name.", show_default=False)] = None,
    workspace: Annotated[
        str | None, typer.Option(metavar="DIRECTORY", help="New workspace.", show_default=False)
    ] = None,
    config: ConfigOption = None,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change an agent. Only the values of the given options change; --config null clears the configuration."""
    given = {"name": name, "workspace_path": workspace, "config": config}
    values = {field: value for field, value in given.items() if value is not None}
    if not values:
        raise typer.BadParameter("name a change by --name, --workspace or --config.")
    if config is not None:
        values["config"] = json_argument(config, "--config")
    with open_named(context, database) as opened:
        agent = opened.agents.update(agent_id, request(AgentUpdate, **values))
    _report(agent, "Changed", as_json=as_json)


@agents.command()
def delete(
    context: typer.Context,
    agent_id: AgentArgument,
    with_sessions: Annotated[
        bool, typer.Option("--with-sessions", help="Also delete the sessions of the agent.")
    ] = False,
    yes: YesOption = False,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete an agent. The files in the agent's workspace stay.

    The command shows the agent and asks for a confirmation.
    """
    with open_named(context, database) as opened:
        agent = opened.agents.get(agent_id)
        question = f"Delete this agent{' and its sessions' if with_sessions else ''}?"
        confirm(context, question, yes=yes, show=partial(_show, agent, error=True))
        if not opened.agents.delete(agent_id, delete_sessions=with_sessions):
            raise AgentNotFoundError(agent_id)  # another process deleted the agent in the meantime
    if as_json:
        print_json({"deleted": 1})
    else:
        typer.echo(f"Deleted {quoted(agent_id)}.")
