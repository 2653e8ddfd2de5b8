"""People with browsers, and what they judge."""

import re
from typing import Any

from starlette.testclient import TestClient

PASSWORD = "correct horse"
SECRET = "s" * 64
RANKINGS = [
    {"prompt": f"Name fruit {number}.", "responses": ["A cherry.", "Red.", "A banana."], "category": "explain"}
    for number in range(6)
]
ANSWERS = [
    {
        "policy": policy,
        "how": "sampled",
        "category": "explain",
        "prompt": f"Question {number}?",
        "text": f"{policy} says.",
    }
    for policy in ("base", "sft", "ppo")
    for number in range(6)
]


class Person(TestClient):
    """A browser of one person."""

    def token(self) -> str:
        """The CSRF token of a page."""
        page = self.get("/", headers={"Accept": "text/html"})
        return re.search(r'name="csrf" content="([^"]+)"', page.text)[1]  # type: ignore[index]

    def submit(self, path: str, body: Any = None, **options: Any) -> Any:
        """POST with the token."""
        return self.post(path, json=body, headers={"X-CSRF-Token": self.token()}, **options)

    def item(self, kind: str = "rank") -> str:
        """The ticket of the item that the page shows."""
        return re.search(r'data-item="(\w*)"', self.get(f"/{kind}").text)[1]  # type: ignore[index]

    def last(self, kind: str = "rank") -> str:
        """The judgement that undo would take back."""
        return re.search(r'data-last="(\d*)"', self.get(f"/{kind}").text)[1]  # type: ignore[index]

    def responses(self, kind: str = "rank") -> list[str]:
        """The responses as the page shows them."""
        shown = re.findall(r'<div class="text markdown" dir="auto">(.*?)</div>', self.get(f"/{kind}").text, flags=re.S)
        return [re.sub(r"^<p>|</p>\s*$", "", text) for text in shown]

    def judge(self, kind: str = "rank", *, client_id: str, **changes: Any) -> Any:
        """Judge the item that the page shows, as first, second, third unless told otherwise."""
        ranks = [1, 2, 3] if kind == "rank" else [1, 2]
        body = {"client_id": client_id, "item": self.item(kind), "verdict": "ranked", "ranks": ranks, "seconds": 2.5}
        return self.submit("/judgements", {**body, **changes})


def log_in(client: Person, name: str, password: str) -> Any:
    form = {"name": name, "password": password, "csrf": client.token()}
    return client.post("/login", data=form, follow_redirects=False)
