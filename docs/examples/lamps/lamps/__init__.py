"""A small gateway: it switches lamps over HTTP and over a WebSocket."""
