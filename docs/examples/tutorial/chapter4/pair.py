"""Pair the device `thermometer`, and print its secret."""

from homeagent import Database, DevicePair, Role

with Database.open("data/gateway.db") as database:
    paired = database.pair(DevicePair(id="thermometer", role=Role.NODE, metadata={"room": "hall"}))
    print(paired.shared_secret.get_secret_value())
