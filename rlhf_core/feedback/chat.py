"""Asks a chat endpoint that speaks OpenAI's form, and lives with all that a service on a network can do.

It waits where the service says so, tries again where that may help, stops where it cannot, and never spends more than
it may. What is asked, and whether an answer makes sense, is endpoint.py's matter.
"""

import json
import math
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx

from rlhf_core.config import Judge
from rlhf_core.errors import ConfigError

KEY_VARIABLE = "RLHF_JUDGE_KEY"  # the one place where a key may stand
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LARGEST_ANSWER = 256 * 1024  # bytes; a judgement has a few hundred
LONGEST_WAIT = 300.0  # seconds that a service may ask for before the run stops instead
BYTES_A_TOKEN = 3  # a low guess: four in English, three and less in other scripts


class BadAnswer(Exception):
    """This request got no usable answer, and the next one may. The message says why; `text` is what came."""

    def __init__(self, message: str, text: str = "") -> None:
        super().__init__(message)
        self.text = text


class NoAnswer(BadAnswer):
    """Every retry failed: the service may be away."""


class MustStop(Exception):
    """No further request makes sense; the message says why and what helps."""


class Price(NamedTuple):
    """Money a token."""

    prompt: float
    answer: float


class Budget:
    """Money spent, and set aside for requests that are under way, never above a limit.

    A request whose cost is not told, since it broke off, is taken to have cost what was set aside for it.
    """

    def __init__(self, limit: float, price: Price) -> None:
        self.limit, self.price = limit, price
        self.spent = 0.0
        self._lock = threading.Lock()

    def reserve(self, prompt_bytes: int, answer_tokens: int) -> float:
        """Set aside what a request may cost; raises MustStop where that would pass the limit."""
        cost = math.ceil(prompt_bytes / BYTES_A_TOKEN) * self.price.prompt + answer_tokens * self.price.answer
        with self._lock:
            if self.spent + cost > self.limit:
                raise MustStop(
                    f"the next request might cost {cost:.4g} and {self.spent:.4g} of judge.max_cost {self.limit:g} are "
                    "spent. Raise it to go on"
                )
            self.spent += cost
        return cost

    def settle(self, reserved: float, usage: Any) -> None:
        """Put the real cost in the place of what was set aside, where the service tells how many tokens it took."""
        told = usage if isinstance(usage, dict) else {}
        sent, answered = told.get("prompt_tokens"), told.get("completion_tokens")
        if type(sent) is int and type(answered) is int and min(sent, answered) >= 0:
            with self._lock:
                self.spent += sent * self.price.prompt + answered * self.price.answer - reserved


class Pace:
    """Hands out moments to begin a request: at most so many a minute, and none while the service asks to wait."""

    def __init__(self, a_minute: float, stopped: threading.Event) -> None:
        self._interval = 60 / a_minute if a_minute else 0.0
        self._next = self._held_until = 0.0
        self._stopped = stopped
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Return when it is this caller's turn; raises MustStop if the run stops first."""
        left = math.inf
        while left > 0:
            with self._lock:
                now = time.monotonic()
                left = max(self._held_until, self._next) - now
                if left <= 0:  # drawn after a hold, or all whom it kept would begin at once
                    self._next = now + self._interval
            self.sleep(left)

    def hold(self, seconds: float) -> None:
        """Let nobody begin for some seconds, whoever waits already included."""
        with self._lock:
            self._held_until = max(self._held_until, time.monotonic() + seconds)

    def sleep(self, seconds: float) -> None:
        """Sleep, unless the run stops."""
        if self._stopped.wait(max(seconds, 0.0)):
            raise MustStop("it was stopped")


class ChatEndpoint:
    """One model at one endpoint, inside a `with` block; may be used by several threads at once.

    Args:
        config: section `judge`.
        backoff: seconds before the first retry; each further one waits twice as long.
    """

    def __init__(self, config: Judge, *, backoff: float = 1.0) -> None:
        self.config = config
        self.stopped = threading.Event()
        self.budget = Budget(config.max_cost, Price(config.prompt_price / 1e6, config.answer_price / 1e6))
        self.requests = self.retries = 0
        self._pace = Pace(config.requests_per_minute, self.stopped)
        self._backoff = backoff
        self._lock = threading.Lock()
        self._refused: set[str] = set()  # settings that this service does not take
        self._key = os.environ.get(KEY_VARIABLE, "").strip()  # a key read from a file often ends its line
        if not (self._key.isascii() and self._key.isprintable()):  # the error of a header that cannot be would show it
            raise ConfigError(
                f"{KEY_VARIABLE} holds a character that no key has, such as a line end or one beyond ASCII. Set it to "
                "the key alone."
            )
        try:
            httpx.URL(config.url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"judge.url {config.url} cannot be asked: {error}") from error
        parts = urlsplit(config.url)
        self._is_here = parts.hostname in LOOPBACK
        if self._key and parts.scheme == "http" and not self._is_here:
            raise ConfigError(
                f"judge.url is {config.url}: {KEY_VARIABLE} would go over the network unencrypted. "
                f"Use https, or unset {KEY_VARIABLE}."
            )

    def __enter__(self) -> "ChatEndpoint":
        self.stopped.clear()
        headers = {"Accept-Encoding": "identity"}  # what is unpacked has no size that could be limited beforehand
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        limits = httpx.Limits(max_connections=self.config.concurrency)
        self._client = httpx.Client(
            headers=headers,
            timeout=self.config.timeout,
            limits=limits,
            follow_redirects=False,
            trust_env=not self._is_here,  # a proxy would be sent the key and all questions in clear
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def complete(self, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any]) -> str:
        """The text that the model answers with.

        Args:
            messages: the chat, as `role` and `content`.
            schema: JSON schema of the answer, sent to services that take one.

        Raises:
            NoAnswer: every retry failed.
            BadAnswer: there is an answer, and nothing can be done with it.
            MustStop: no further request makes sense.
        """
        failures, left_out = 0, frozenset(self._refused)
        while True:
            payload = self._payload(messages, schema, left_out)
            try:
                status, headers, body = self._send(payload)
            except httpx.HTTPError as error:
                why = self._shown(f"{type(error).__name__} {error}")
            else:
                if status == 200:
                    self._refused |= left_out
                    return _text_of(body)
                why = self._shown(f"HTTP {status} {_reason_in(body)}")
                if status in (400, 413, 422):
                    blamed = _blamed(body).intersection(payload)
                    if not blamed:
                        raise BadAnswer(f"the request was refused: {why}")
                    left_out |= blamed
                    continue
                self._stop_unless_passing(status, headers, why)
            failures += 1
            if failures > self.config.retries:
                raise NoAnswer(f"{failures} requests failed, the last with: {why}")
            with self._lock:
                self.retries += 1
            wait = min(self._backoff * 2 ** (failures - 1), LONGEST_WAIT)
            self._pace.sleep(wait * random.uniform(0.5, 1.5))  # or all that failed together would come together again

    def _payload(
        self, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any], left_out: frozenset[str]
    ) -> dict[str, Any]:
        """The request, without the settings that are left out; a limit on the answer has a newer name too."""
        payload: dict[str, Any] = {"model": self.config.model, "messages": list(messages)}
        payload["max_completion_tokens" if "max_tokens" in left_out else "max_tokens"] = self.config.answer_tokens
        if "temperature" not in left_out:
            payload["temperature"] = self.config.temperature
        if "response_format" not in left_out:
            form = {"name": "judgement", "strict": True, "schema": schema}
            payload["response_format"] = {"type": "json_schema", "json_schema": form}
        return payload

    def _send(self, payload: Mapping[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and body, within the limits of pace, money, time and size."""
        content = json.dumps(payload).encode()
        self._pace.wait()
        reserved = self.budget.reserve(len(content), self.config.answer_tokens)
        with self._lock:
            self.requests += 1
        deadline = time.monotonic() + self.config.timeout
        body = b""
        url = self.config.url.rstrip("/") + "/chat/completions"
        headers = {"Content-Type": "application/json"}
        with self._client.stream("POST", url, content=content, headers=headers) as response:
            for chunk in response.iter_raw():
                body += chunk
                if len(body) > LARGEST_ANSWER:
                    raise BadAnswer(f"the answer is larger than {LARGEST_ANSWER} bytes")
                if time.monotonic() > deadline:  # httpx counts from one chunk to the next
                    raise httpx.ReadTimeout(f"no whole answer in {self.config.timeout:g} s")
            status = response.status_code
        # What was refused is free; what broke off above may not have been.
        self.budget.settle(reserved, _usage_in(body) if status == 200 else {"prompt_tokens": 0, "completion_tokens": 0})
        # A service may send back what it was sent.
        return status, response.headers, body.replace(self._key.encode(), b"...") if self._key else body

    def _stop_unless_passing(self, status: int, headers: httpx.Headers, why: str) -> None:
        """Raise MustStop where trying again cannot help; else hold every request for as long as the service asks."""
        if 300 <= status < 400:
            place = self._shown(headers.get("location", "nowhere"))
            raise MustStop(f"the endpoint sends to another address, {place}. If you trust it, set judge.url to it")
        if status < 500 and status not in (408, 425, 429):
            raise MustStop(f"the endpoint answers {why}. Check judge.url, judge.model and {KEY_VARIABLE}")
        seconds = _retry_after(headers.get("retry-after", ""))
        if seconds > LONGEST_WAIT:
            raise MustStop(f"the endpoint answers {why} and asks to wait {seconds:.0f} s. Run it again after that")
        self._pace.hold(seconds)

    def _shown(self, text: str) -> str:
        """Some of a text that came from outside, on one line and without the key."""
        text = text.replace(self._key, "…") if self._key else text
        return " ".join(text.split())[:200]


def _retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks for, given as a number or a date; 0 where it is neither."""
    try:
        return max(float(value), 0.0) if math.isfinite(float(value)) else 0.0
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0


def _blamed(body: bytes) -> frozenset[str]:
    """The settings that a service may mean when it refuses a request: those it names, or else the one it may lack."""
    text = body.decode(errors="replace")
    return frozenset(name for name in ("max_tokens", "temperature") if name in text) or frozenset({"response_format"})


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _usage_in(body: bytes) -> Any:
    answer = _json(body)
    return answer.get("usage") if isinstance(answer, dict) else None


def _reason_in(body: bytes) -> str:
    """What an error says of itself, in OpenAI's form or any other."""
    answer = _json(body)
    error = answer.get("error", answer) if isinstance(answer, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else body.decode(errors="replace")


def _text_of(body: bytes) -> str:
    """The message's text in a chat completion."""
    try:
        choice = _json(body)["choices"][0]
        text = choice["message"]["content"]
    except (TypeError, KeyError, IndexError):
        text = None
    if not isinstance(text, str):
        start = " ".join(body.decode(errors="replace").split())[:80]
        raise BadAnswer(f"the service sent no chat completion but {start!r}")
    return text
