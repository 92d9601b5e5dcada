"""The PostgreSQL engine and its connections."""
