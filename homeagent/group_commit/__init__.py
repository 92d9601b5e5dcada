"""How write units that wait for the one writer's lane share a commit: `grouping` does it, and begins the tale."""
