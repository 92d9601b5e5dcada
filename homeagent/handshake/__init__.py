"""Handshake over a WebSocket or a similar connection. The module imports no framework.

Each message is a JSON object in one text frame of at most 8 KiB. Texts in base64 have the standard alphabet.

| number | sender | message |
|---|---|---|
| 1 | device | `{"type": "hello", "device_id": …}` |
| 2 | gateway | `{"type": "challenge", "challenge": …, "salt": base64, "iterations": …, "time": …}` |
| 3 | device | `{"type": "proof", "nonce": …, "time": …, "proof": base64}` |
| 4 | gateway | `{"type": "welcome", "signature": base64}` or `{"type": "refused", "error": …, "detail": …}` |

The challenge is random for each connection. The proof is SCRAM's (`homeagent.scram`) for the id of the device, the
nonce `CHALLENGE.NONCE` and the device's time in milliseconds since 1970. The gateway checks the time and the proof, and
consumes the nonce in the unit of work that reads the approval. The signature shows the device that the gateway has
the verifier of the device's secret. A proof is not bound to the connection, so use TLS: an attacker between device and
gateway could pass on the messages.
"""

from homeagent.handshake.gateway import REFUSALS, Admission, authenticate_device, recheck
from homeagent.handshake.messages import MAX_MESSAGE, Receive, Send

__all__ = ["MAX_MESSAGE", "REFUSALS", "Admission", "Receive", "Send", "authenticate_device", "recheck"]
