"""Check the secret of the device `thermometer`."""

import os

from homeagent import Database

with Database.open("data/gateway.db") as database:
    check = database.check_secret("thermometer", os.environ["SECRET"])
    print("The device is let in." if check else f"The device is refused: {check.status}.")
