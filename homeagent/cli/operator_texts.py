"""Error messages for operators, with commands and options. `homeagent.errors` names methods and arguments."""

from __future__ import annotations

PHRASES = {
    "or find its id with agents.list()": "or find its id by 'homeagent agents list'",
    "create it, or call sessions.resolve()": "find its id by 'homeagent sessions list'",
    "or call rotate_secret()": "or give it a new secret by 'homeagent devices rotate'",
    "change it with agents.update()": "change it by 'homeagent agents update'",
    "or use delete_sessions=True": "or pass --with-sessions",
    "move() or delete() that session": "move or delete that session",
    "or pass force=True": "or pass --force",
    "with expected_status=REVOKED or --status revoked": "with --status revoked",
    "pass live=True (--live)": "pass --live",
    "or raise Limits.pending_devices": "or let the gateway raise its limit",
    " or with migrate=True": "",
    ", or open it with migrate=True": "",
    "open it without read_only=True to write": "use a command that writes",
    "Make that unit of work shorter, or raise busy_timeout": "Try again, or stop that process",
    "End long transactions and open the database again, or raise busy_timeout": "End long transactions, then try again",
    "by another process for longer than busy_timeout": "by another process for too long",
    ", or use run(…, idempotent=True) for a unit that may be committed twice": "",
    "; to read without writing, open a unit with read_only=True": "",
    "begin it with ./ or pass a Path": "begin it with ./",
    "lower pool_size": "stop some of the programs that use the server",
    "use Database.doctor()": "name a file or a server's URL",
    "raise Limits.longest_ttl": "let the gateway raise its limit",
    "plain JSON: None, bool, int, finite float, text, lists and dicts with text keys": "valid, and contain no NaN, "
    "Infinity or lone surrogate",
    "run the unit again": "run the command again",
}


def operator_text(text: str) -> str:
    """Replace methods and arguments in an error message by commands and options."""
    for phrase, replacement in PHRASES.items():
        text = text.replace(phrase, replacement)
    return text
