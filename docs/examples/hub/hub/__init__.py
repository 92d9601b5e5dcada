"""A hub that stores the messages and the preferences of devices in the same database as homeagent's tables.

Install `homeagent[fastapi]`, uvicorn, websockets and pytest, and run these commands in the directory of
`pyproject.toml`:

    export HOMEAGENT_DATABASE=data/hub.db
    uvicorn --factory hub.app:create_app          # creates the database, and serves /ws
    homeagent devices pair phone --role client    # prints the secret of the device
    homeagent devices approve phone
    homeagent migrations new -m "add a column" --migrations hub:migrations
    alembic check                                 # compares the classes of hub.models with the tables
    pytest

Each module imports only the modules above it in this table:

| module | content |
|---|---|
| `models` | the tables |
| `stores` | the statements, the stores and the unit of work |
| `app` | the HTTP routes and the WebSocket |
"""
