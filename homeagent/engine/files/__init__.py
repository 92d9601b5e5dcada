"""Files and directories of the operating system: checks, permissions, locks and syncs. No SQL, no driver."""
