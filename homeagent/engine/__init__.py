"""Engines for SQLite and PostgreSQL. In the package `engine`, do not refer to devices, agents, sessions, nonces or
keys.
"""
