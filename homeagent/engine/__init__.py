"""How the bytes get to disk: targets, files, drivers, statements, links and lanes. It knows nothing of the domain."""
