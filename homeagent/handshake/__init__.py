"""Handshake over a WebSocket or a similar connection. The package imports no web framework.

Each message is a JSON object in one text frame of at most 8 KiB. Texts in base64 have the standard alphabet.

| number | sender | message |
|---|---|---|
| 1 | device | `{"type": "hello", "device_id": …}` |
| 2 | gateway | `{"type": "challenge", "challenge": …, "salt": base64, "iterations": …, "time": …}` |
| 3 | device | `{"type": "proof", "nonce": …, "time": …, "proof": base64}` |
| 4 | gateway | `{"type": "welcome", "signature": base64}` or `{"type": "refused", "error": …, "detail": …}` |

The challenge is random for each connection. The proof is a proof of SCRAM (module `homeagent.scram`) for the device id,
the nonce `CHALLENGE.NONCE` and the device's time in milliseconds since 1970. The gateway checks the time and the proof,
and consumes the nonce in the unit of work that reads the approval. By the signature, the gateway shows that it has the
verifier of the device's secret. Use TLS, because an attacker between the device and the gateway could otherwise pass on
the messages.
"""

from homeagent.handshake.gateway import REFUSALS, Admission, authenticate_device, recheck
from homeagent.handshake.messages import MAX_MESSAGE, Receive, Send

__all__ = ["MAX_MESSAGE", "REFUSALS", "Admission", "Receive", "Send", "authenticate_device", "recheck"]
