"""The SQLite engine, its driver and connections, the checks of the file and the WAL, and backups."""
