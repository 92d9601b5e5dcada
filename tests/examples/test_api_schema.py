"""The replies of `docs/examples/api.py` follow its OpenAPI document, for generated requests.

The tests need the extra `test-schema`. They are a separate step of `.ci/run`, because they take longer than all other
tests.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from homeagent import AgentCreate, Database, DevicePair, Limits, Role
from homeagent.fastapi import bearer_token
from tests.conftest import RecordProperty
from tests.examples.test_api import load_example

schemathesis = pytest.importorskip("schemathesis", reason="the extra test-schema is not installed")

# Rules for texts that JSON Schema can't express. Only these rules may refuse a request that the document allows.
INEXPRESSIBLE = re.compile(
    "bytes of UTF-8|an invisible character|a segment|a lone surrogate|must be JSON|a date|outside the years"
)


def is_explained(failure: Exception, response: Any) -> bool:
    """Return whether a refusal is due to a rule that the document can't express, or an answer is due to FastAPI."""
    if type(failure).__name__ == "AcceptedNegativeData":
        # FastAPI reads the last one of several query parameters with one name. A query has only texts, so a value of
        # another type in place of null is a valid text, except for a time. An object in place of null becomes query
        # parameters with other names.
        text = str(failure)
        is_time = "`after_active_at`" in text and "became object" not in text
        in_query = "query" in text and "body" not in text and not is_time
        return "became array" in text or ("(was null, became " in text and in_query)
    if type(failure).__name__ != "RejectedPositiveData" or response.status_code != 422:
        return False
    reply = response.json()
    if reply["error"] == "InvalidArgumentError":
        return True  # the method of a store checks the query parameters, and the document has their type only
    return all(INEXPRESSIBLE.search(each["msg"]) for each in reply["errors"])


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 11))])
def test_replies_follow_the_document(
    part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: RecordProperty
) -> None:
    """Every reply has a documented status and body, none has status 5xx, and each route checks the credentials.

    A part has at least 500 requests. A single test with all 5,000 requests can take longer than pytest allows
    (`faulthandler_timeout`).
    """
    monkeypatch.chdir(tmp_path)  # schemathesis reads a configuration from the working directory
    # The check of invalid credentials sends wrong secrets again and again.
    limits = Limits(failed_checks_per_minute=1_000_000, pending_devices=100_000)
    counts: dict[int, int] = {}
    failures: list[str] = []
    with Database.open(tmp_path / "api.db", durability="normal", limits=limits) as database:
        boss = database.pair(DevicePair(id="boss", role=Role.ADMIN))
        database.devices.approve("boss")
        database.agents.create(AgentCreate(id="0", name="Zero", workspace_path="/srv"))  # an id that is often generated
        headers = {"Authorization": f"Bearer {bearer_token('boss', boss.shared_secret)}"}
        document = schemathesis.openapi.from_asgi("/openapi.json", load_example().create_app(database))

        def check(case: Any) -> None:
            response = case.call(headers=headers)
            counts[response.status_code] = counts.get(response.status_code, 0) + 1
            try:
                case.validate_response(response, headers=headers)
            except* schemathesis.core.failures.Failure as group:
                found = [each for each in group.exceptions if not is_explained(each, response)]
                failures.extend(f"{each}\n{case.as_curl_command()}\n{response.text}" for each in found)

        limits_of_run = settings(
            max_examples=16,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        number = part * 1_000
        while sum(counts.values()) < 500 and not failures:
            number += 1
            for result in document.get_all_operations():
                operation = result.ok()
                # A request without any parameter can't be invalid.
                modes = [
                    mode for mode in schemathesis.GenerationMode if operation.path != "/health" or mode.is_positive
                ]
                for mode in modes:
                    run: Any = check
                    for decorate in (given(operation.as_strategy(generation_mode=mode)), limits_of_run, seed(number)):
                        run = decorate(run)
                    run()
    assert failures == [], "\n\n".join(failures[:5])
    assert {200, 201, 404, 409, 422} <= set(counts), counts
    record_property("generated requests to the example API", sum(counts.values()))
