"""A database on a PostgreSQL server: its connections, and what one of them does for a unit."""
