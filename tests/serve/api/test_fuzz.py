"""Whatever the description of the API allows, and much that it forbids: no 500."""

from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]


def test_no_request_is_a_server_error(tiny: Any) -> None:
    config = schemathesis.Config.from_dict({"base-url": f"{tiny.url}/v1"})
    schema = schemathesis.openapi.from_url(f"{tiny.url}/v1/openapi.json", config=config)
    seen: set[int] = set()
    for operation in (found.ok() for found in schema.get_all_operations()):
        cases = st.one_of(
            operation.as_strategy(generation_mode=mode)
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        )

        @given(case=cases)
        @settings(
            max_examples=120,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def send(case: Any) -> None:
            response = case.call()
            seen.add(response.status_code)
            case.validate_response(response, checks=CHECKS)

        send()
    assert {200, 422} <= seen
    assert httpx.get(f"{tiny.url}/health").json()["status"] == "ok"
