"""Handshake over a WebSocket or a similar connection. The package imports no web framework.

Each message is a JSON object in one text frame. A message has at most 8 KiB. Base64 values use the standard alphabet.

| number | sender | message |
|---|---|---|
| 1 | device | `{"type": "hello", "device_id": …}` |
| 2 | gateway | `{"type": "challenge", "challenge": …, "salt": base64, "iterations": …, "time": …}` |
| 3 | device | `{"type": "proof", "nonce": …, "time": …, "proof": base64}` |
| 4 | gateway | `{"type": "welcome", "signature": base64}` or `{"type": "refused", "error": …, "detail": …}` |

Each connection has a new random challenge. The proof covers the device id, a nonce, and the device's time. Times are in
milliseconds since 1970. The proof's nonce is the challenge, a dot, and the `"nonce"` of message 3. The module
`homeagent.scram` describes proofs. The signature proves that the gateway has the device's verifier. Use TLS. An
attacker could otherwise forward the messages, and then use the connection.
"""

from homeagent.handshake.gateway import REFUSALS, Admission, authenticate_device, recheck
from homeagent.handshake.messages import MAX_MESSAGE, Receive, Send

__all__ = ["MAX_MESSAGE", "REFUSALS", "Admission", "Receive", "Send", "authenticate_device", "recheck"]
