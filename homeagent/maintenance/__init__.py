"""What runs beside the work."""
