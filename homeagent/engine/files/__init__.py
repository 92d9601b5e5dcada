"""Files and directories as the operating system has them: judged, private, locked, durable. No SQL and no driver."""
