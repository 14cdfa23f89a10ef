"""Requests made up by schemathesis from /openapi.json, right ones and wrong ones: none fails inside
the server, and what comes back is as the description says."""

import collections
import warnings

import pytest
from served import KEY

pytest.importorskip("schemathesis")
pytestmark = pytest.mark.parity

HEADERS = {"Authorization": f"Bearer {KEY}"}
REQUESTS = 500


def smaller(case, plain=False):
    """The request with few tokens and texts to make, where it asks for a valid number of them.

    plain: with a model and a conversation that there are, so that the rest of it counts.
    """
    body = case.body
    if isinstance(body, dict):
        if plain:
            body.pop("model", None)
            if "messages" in body:
                body["messages"] = [{"role": "user", "content": "A"}]
        for name, most in (
            ("max_tokens", 3),
            ("max_completion_tokens", 3),
            ("n", 2),
            ("best_of", 2),
        ):
            value = body.get(name, most if name == "max_tokens" else 0)
            if isinstance(value, int) and not isinstance(value, bool) and value > most:
                body[name] = most
        if "messages" in body or "prompt" in body:
            body.setdefault("max_tokens", 3)
        for name in ("prompt", "input", "messages"):
            if isinstance(body.get(name), list):
                del body[name][8:]
    return case


def ask(operation, mode, count, seen):
    """Sends requests made up for an operation; counts their statuses in `seen`."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, Verbosity, given, settings, strategies
    from schemathesis.specs.openapi import checks

    wanted = [
        schemathesis.checks.not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    @given(
        operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode]),
        strategies.booleans(),
    )
    def send(case, plain):
        case = smaller(case, plain and mode == "POSITIVE")
        answer = case.call(headers=HEADERS, timeout=60)
        seen[answer.status_code] += 1
        case.validate_response(answer, checks=wanted)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        send()


@pytest.mark.filterwarnings("ignore")  # of schemathesis' own dependencies
def test_fuzzed_requests(served):
    import schemathesis

    schema = schemathesis.openapi.from_url(served.server.url + "/openapi.json", headers=HEADERS)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 5
    asking = [o for o in operations if o.method.upper() == "POST"]
    plan = [(o, mode, 4) for o in operations if o not in asking for mode in ("POSITIVE",)]
    share = -(-REQUESTS // (2 * len(asking)))
    plan += [(o, mode, share) for o in asking for mode in ("POSITIVE", "NEGATIVE")]
    statuses = collections.defaultdict(collections.Counter)
    for operation, mode, count in plan:
        ask(operation, mode, count, statuses[operation.label, mode])
    print(dict(statuses))
    assert sum(sum(seen.values()) for seen in statuses.values()) >= REQUESTS
    for operation in asking:
        right, wrong = (statuses[operation.label, mode] for mode in ("POSITIVE", "NEGATIVE"))
        assert right[200] > 0, right  # some of the right ones are answered
        assert wrong[200] <= wrong.total() // 5, wrong
    assert served.server.healthy()
