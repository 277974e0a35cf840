"""Strangers' methods, paths, model names and ids: the metrics have no series for any of them."""

import contextlib
import http.client
import json
import random
import string

from tests.fuzz.servers import running_server


def fuzz(num_inputs: int, seed: int = 0) -> dict[str, int]:
    """Against a server of its own."""
    with running_server("--api-key", "fuzz") as url:
        return fuzz_server(int(url.rsplit(":", 1)[1]), "fuzz", num_inputs, seed)


def fuzz_server(port: int, key: str, num_inputs: int, seed: int = 0) -> dict[str, int]:
    """Send requests full of random words; the series of /metrics must be those of before."""
    rng = random.Random(seed)

    def word() -> str:
        return "".join(rng.choices(string.ascii_letters, k=12))

    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as client:

        def ask(method: str, path: str, body: object = None, bearer: str = key) -> bytes:
            headers = {"Authorization": f"Bearer {bearer}", "X-Request-Id": word()}
            headers["Content-Type"] = "application/json"
            client.request(method, path, None if body is None else json.dumps(body), headers)
            response = client.getresponse()
            assert response.status < 500, (method, path, response.status)
            return response.read()

        def series() -> set[str]:
            lines = ask("GET", "/metrics").decode().splitlines()
            return {line.split(" ")[0] for line in lines if line[0] != "#"}

        ask("POST", "/v1/completions", {"prompt": "Hi", "max_tokens": 1})
        before = series()
        for _ in range(num_inputs):
            match rng.randrange(5):
                case 0:
                    ask(word().upper(), f"/{word()}")
                case 1:
                    ask(rng.choice(["PROPFIND", "LINK", "PURGE", "OPTIONS"]), f"/v1/{word()}")
                case 2:
                    ask("GET", f"/v1/models/{word()}", bearer=word())
                case 3:
                    ask("POST", "/v1/completions", {"prompt": "x", "model": word()})
                case 4:
                    ask("POST", "/v1/completions", {"prompt": "x", "n": word(), "user": word()})
        assert series() == before
    return {"series": len(before), "requests": num_inputs}
