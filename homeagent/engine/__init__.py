"""Engines for SQLite and PostgreSQL, and their common parts: connections, statements, files and locks.

This layer has no knowledge of devices, agents, sessions, nonces and keys.
"""
