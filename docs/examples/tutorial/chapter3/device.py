"""Send each temperature of the command line to the gateway, as the device `thermometer`."""

import asyncio
import os
import sys

import websockets

from homeagent.handshake.client import authenticate

URL = os.environ.get("GATEWAY_URL", "ws://127.0.0.1:8000/ws")


async def main() -> None:
    async with websockets.connect(URL) as connection:
        await authenticate("thermometer", os.environ["SECRET"], send=connection.send, receive=connection.recv)
        for temperature in sys.argv[1:]:
            await connection.send(temperature)
            print(await connection.recv())


asyncio.run(main())
