"""Engines for SQLite and PostgreSQL. The modules do not refer to devices, agents, sessions, nonces or keys."""
