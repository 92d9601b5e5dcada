"""A database that is a SQLite file: its driver and connections, its log, its backups, what it gives way to."""
