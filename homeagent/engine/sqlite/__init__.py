"""The SQLite engine, the file checks and the backups."""
