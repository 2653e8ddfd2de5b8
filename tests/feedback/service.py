"""A chat service on loopback that answers in OpenAI's form, and misbehaves where it is told to."""

import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USAGE = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}


def opinion(payload: dict[str, Any]) -> dict[str, Any]:
    """What the service thinks: the answer with more "good" in it is better."""
    text = payload["messages"][0]["content"]
    a, b = (re.search(rf"<answer {side} \w+>\n(.*?)\n</answer", text, re.S)[1].count("good") for side in "AB")  # type: ignore[index]
    axes = re.search(r"an object with (.*?), each an object", text)
    scores = {axis: {"A": min(1 + a, 5), "B": min(1 + b, 5)} for axis in axes[1].split(" and ")} if axes else {}
    better = "A" if a > b else "B" if b > a else "tie"
    return {"reason": f"{a} against {b}", "scores": scores, "better": better, "confidence": 0.8}


def completion(content: Any, **changes: Any) -> dict[str, Any]:
    """A chat completion whose text is this."""
    text = content if isinstance(content, str) or content is None else json.dumps(content)
    message = {"role": "assistant", "content": text}
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": USAGE, **changes}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer takes 40 ms

    def do_POST(self) -> None:
        service: Service = self.server.service  # type: ignore[attr-defined]
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = service.next_behaviour(payload, dict(self.headers))
        with service.busy():
            BEHAVIOURS[name](self, payload)

    def send(self, body: Any, status: int = 200, *, length: int | None = None, **headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(raw) if length is None else length))
        self.end_headers()
        self.wfile.write(raw)

    def hang_up(self) -> None:
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def good(handler: Handler, payload: dict[str, Any]) -> None:
    handler.send(completion(opinion(payload)))


def slow(handler: Handler, payload: dict[str, Any]) -> None:
    time.sleep(2.6)
    handler.hang_up()


def drip(handler: Handler, payload: dict[str, Any]) -> None:
    """A whole answer, a piece now and then: no single wait is long, and together they are too long."""
    whole = json.dumps(completion(opinion(payload))).encode()
    handler.send(b"", length=len(whole))
    for start in range(0, len(whole), len(whole) // 15):
        time.sleep(0.2)
        handler.wfile.write(whole[start : start + len(whole) // 15])


def cut_off(handler: Handler, payload: dict[str, Any]) -> None:
    handler.send(json.dumps(completion(opinion(payload))).encode()[:50], length=500)
    handler.hang_up()


def closed(handler: Handler, payload: dict[str, Any]) -> None:
    handler.hang_up()


def says(content: Any, **changes: Any) -> Callable[[Handler, dict[str, Any]], None]:
    return lambda handler, payload: handler.send(completion(content, **changes))


def fails(status: int, message: str = "no", **headers: str) -> Callable[[Handler, dict[str, Any]], None]:
    return lambda handler, payload: handler.send({"error": {"message": message}}, status, **headers)


def refuses(*settings: str) -> Callable[[Handler, dict[str, Any]], None]:
    """Turns down requests with these settings by name, as services do that lack them."""

    def answer(handler: Handler, payload: dict[str, Any]) -> None:
        for setting in settings:
            if setting in payload:
                return handler.send({"error": {"message": f"Unsupported parameter: '{setting}'"}}, 400)
        return good(handler, payload)

    return answer


def echo_key(handler: Handler, payload: dict[str, Any]) -> None:
    fails(401, f"Wrong key: {handler.headers['Authorization']}")(handler, payload)


def echo_key_in_answer(handler: Handler, payload: dict[str, Any]) -> None:
    handler.send(completion({**opinion(payload), "reason": f"You sent {handler.headers['Authorization']}"}))


VALID = {"reason": "", "better": "A", "confidence": 0.5}
BEHAVIOURS: dict[str, Callable[[Handler, dict[str, Any]], None]] = {
    "good": good,
    # Trying again helps.
    "slow": slow,
    "drip": drip,
    "cut off": cut_off,
    "closed": closed,
    "429": fails(429, "slow down"),
    "429 with a wait": fails(429, "slow down", Retry_After="0.3"),
    "429 with a longer wait": fails(429, "slow down", Retry_After="1.2"),
    "500": fails(500),
    "503 as a page": lambda handler, payload: handler.send(b"<html>Bad gateway</html>", 503),
    # Asking again helps.
    "half of the JSON": lambda handler, payload: handler.send(json.dumps(completion("")).encode()[:60]),
    "a page": lambda handler, payload: handler.send(b"<html>Welcome to the hotel's network</html>"),
    "no choices": lambda handler, payload: handler.send({"choices": []}),
    "no text": says(None),
    "wrong labels": says({**VALID, "better": "Answer 1"}),
    "wrong confidence": says({**VALID, "confidence": "high"}),
    "confidence beyond 1": says({**VALID, "confidence": 80}),
    "no reason": says({"better": "A", "confidence": 1}),
    "another language": says("Die zweite Antwort ist besser, weil sie höflicher ist."),
    "half an answer": says('{"reason": "The first answer is bet', finish_reason="length"),
    "deep": says("{" * 5 + '"a":' + "[" * 20000),
    "1 MB": says({**VALID, "reason": "A" * 1_000_000}),
    "not even text": lambda handler, payload: handler.send(bytes(range(256))),
    # Nothing helps.
    "401": fails(401, "Incorrect API key provided"),
    "404": fails(404, "The model `tiny-judge` does not exist"),
    "redirect": fails(302, Location="http://127.0.0.1:1/elsewhere"),
    "429 for an hour": fails(429, "quota exceeded", Retry_After="3600"),
    # And what else there is.
    "400": fails(400, "content policy"),
    "no schema": refuses("response_format"),
    "no settings": refuses("response_format", "temperature", "max_tokens"),
    "echo of the key": echo_key,
    "echo of the key in an answer": echo_key_in_answer,
    "fenced": lambda handler, payload: handler.send(completion(f"Sure!\n```json\n{json.dumps(opinion(payload))}\n```")),
    "no usage": lambda handler, payload: handler.send(completion(opinion(payload), usage=None)),
    "half a character": lambda handler, payload: handler.send(completion({**opinion(payload), "reason": "a \ud83d b"})),
}


class Service:
    """The server. `script` says how the next requests are met, `always` the ones after."""

    def __init__(self) -> None:
        self.script: list[str] = []
        self.always = "good"
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.service = self  # type: ignore[attr-defined]
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  (a client that hung up)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def next_behaviour(self, payload: dict[str, Any], headers: dict[str, str]) -> str:
        with self._lock:
            self.requests.append(payload)
            self.headers.append(headers)
            self.times.append(time.monotonic())
            return self.script.pop(0) if self.script else self.always

    def busy(self) -> Any:
        service = self

        class Busy:
            def __enter__(self) -> None:
                with service._lock:
                    service.at_once += 1
                    service.most_at_once = max(service.most_at_once, service.at_once)

            def __exit__(self, *_: Any) -> None:
                with service._lock:
                    service.at_once -= 1

        return Busy()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
