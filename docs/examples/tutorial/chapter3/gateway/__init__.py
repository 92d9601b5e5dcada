"""A gateway for the thermometers of a house."""
