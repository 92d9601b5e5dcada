"""Engines for SQLite and PostgreSQL, and their common parts: connections, statements, files and locks.

The modules of this layer do not refer to devices, agents, sessions, nonces or keys.
"""
