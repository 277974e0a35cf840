"""HTTP bodies made from the server's own OpenAPI description, right and wrong: never a 5xx.

The server is a process of its own, and must be as healthy after the last body as before the first.
"""

import contextlib
import http.client
import json
import random
from typing import Any
from urllib.parse import urlsplit

from tests.fuzz.values import any_value

Schema = dict[str, Any]


def fuzz(url: str, num_inputs: int, seed: int = 0, api_key: str | None = None) -> dict[str, int]:
    """Send bodies to every POST route; returns how many answers had each status."""
    with contextlib.closing(Client(url, api_key)) as client:
        return _fuzz(client, random.Random(seed), num_inputs)


def _fuzz(client: "Client", rng: random.Random, num_inputs: int) -> dict[str, int]:
    openapi = json.loads(client.get("/openapi.json"))
    routes = sorted(path for path, methods in openapi["paths"].items() if "post" in methods)
    statuses: dict[str, int] = {}
    for i in range(num_inputs):
        route = rng.choice(routes)
        body = make_body(rng, openapi, route)
        status, answer = client.post(route, body)
        statuses[str(status)] = statuses.get(str(status), 0) + 1
        if status >= 500:
            raise AssertionError(
                f"input {i}: {status} from {route}: {body[:600]!r} {answer[:600]!r}"
            )
        if status >= 400:
            check_error(answer, route, body)
    assert client.get("/health") is not None
    return statuses


def check_error(answer: bytes, route: str, body: bytes) -> None:
    """An error has a sentence, in both forms that clients read."""
    error = json.loads(answer)
    assert error["error"], f"{route} {body[:300]!r} {answer[:300]!r}"
    for leak in ("Traceback", 'File "/', "0x7f"):
        assert leak not in answer.decode(errors="replace"), answer


def make_body(rng: random.Random, openapi: Schema, route: str) -> bytes:
    """A body for one route: mostly near the schema, sometimes not even JSON."""
    if rng.random() < 0.03:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(64)))
    content = openapi["paths"][route]["post"].get("requestBody", {}).get("content", {})
    schema = content.get("application/json", {}).get("schema", {"type": "object"})
    value = make_value(rng, openapi, schema, 0)
    if isinstance(value, dict):
        keep_it_short(rng, value)
    text = json.dumps(value)
    if rng.random() < 0.03:
        cut = rng.randrange(len(text) + 1)
        text = text[:cut] + rng.choice(["", "}", ",", '"', "[" * 500]) + text[cut:]
    return text.encode("utf-8", "surrogatepass")


def keep_it_short(rng: random.Random, body: dict[str, Any]) -> None:
    """Valid requests should not generate a novel each."""
    if rng.random() < 0.97:
        body["max_tokens"] = rng.choice([1, 2, 4])
    if "model" in body and rng.random() < 0.9:
        del body["model"]


def make_value(rng: random.Random, openapi: Schema, schema: Schema, depth: int) -> Any:
    """A value for a JSON schema; one in eight breaks it on purpose."""
    if rng.random() < 0.04 or depth > 6:
        return any_value(rng)
    if "$ref" in schema:
        part: Schema = openapi
        for key in schema["$ref"].removeprefix("#/").split("/"):
            part = part[key]
        return make_value(rng, openapi, part, depth)
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return make_value(rng, openapi, rng.choice(schema[key]), depth + 1)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return rng.choice(schema["enum"])
    return make_typed(rng, openapi, schema, depth)


def make_typed(rng: random.Random, openapi: Schema, schema: Schema, depth: int) -> Any:
    """A value for a schema that names a type."""
    kind = schema.get("type")
    if kind == "object":
        return make_object(rng, openapi, schema, depth)
    if kind == "array":
        items = schema.get("items", {})
        return [make_value(rng, openapi, items, depth + 1) for _ in range(rng.randrange(4))]
    if kind == "string":
        return rng.choice(["user", "Hello", "def f(x):", "", "a" * 50, "\u00fc\u4e16\U0001f642"])
    if kind == "integer":
        return rng.choice([0, 1, 2, 3, 5, -1, 20, 2000])
    if kind == "number":
        return rng.choice([0, 0.5, 1, 1.0, -1.5, 2])
    if kind == "boolean":
        return rng.random() < 0.5
    if kind == "null":
        return None
    return any_value(rng)


def make_object(rng: random.Random, openapi: Schema, schema: Schema, depth: int) -> dict[str, Any]:
    """Required properties nearly always, each other one now and then, an unknown one rarely."""
    required = set(schema.get("required", ()))
    value: dict[str, Any] = {}
    for name, part in schema.get("properties", {}).items():
        if rng.random() < (0.97 if name in required else 0.12):
            value[name] = make_value(rng, openapi, part, depth + 1)
    if rng.random() < 0.05:
        value["never_heard_of_it"] = any_value(rng)
    return value


class Client:
    """One connection, opened again when the server closes it, as it may after a bad body."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._address = urlsplit(url)
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._connection: http.client.HTTPConnection | None = None

    def get(self, path: str) -> bytes:
        """Body of a GET; any status but 200 raises."""
        status, body = self._ask("GET", path, None)
        assert status == 200, f"{path}: {status} {body[:200]!r}"
        return body

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body; a stream is read to its end."""
        return self._ask("POST", path, body)

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()

    def _ask(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        for attempt in range(2):
            if self._connection is None:
                self._connection = http.client.HTTPConnection(
                    self._address.hostname or "", self._address.port, timeout=30
                )
            try:
                self._connection.request(method, path, body, self._headers)
                answer = self._connection.getresponse()
                return answer.status, answer.read()
            except (http.client.HTTPException, ConnectionError):
                self.close()
                self._connection = None
                if attempt:
                    raise
        raise AssertionError("unreachable")
