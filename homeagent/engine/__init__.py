"""How statements and bytes get to the database: what both engines share, each of them, and the disk under one of them.

It knows nothing of devices, agents, sessions, nonces and keys.
"""
