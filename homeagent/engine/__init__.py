"""Engines for SQLite and PostgreSQL. Do not refer to devices, agents, sessions, nonces or keys in this package."""
