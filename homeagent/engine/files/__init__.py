"""Checks, permissions, locks and syncs of files and directories. This package uses no SQL and no database driver."""
