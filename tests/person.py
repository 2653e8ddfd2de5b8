"""Somebody with a browser, without the browser, who judges over HTTP what the feedback pages show."""

import html
import json
import re
import urllib.request
from http.cookiejar import CookieJar
from typing import Any


class Person:
    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self.open = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar())).open
        self.token = ""

    def look(self, page: str) -> tuple[str, list[str]]:
        """The item that `rank` or `compare` shows, "" if none is left, and its answers from left to right."""
        shown = self.open(f"{self.address}/{page}", timeout=60).read().decode()
        item, self.token = (
            re.search(pattern, shown)[1]  # type: ignore[index]
            for pattern in (r'data-item="(\w*)"', r'name="csrf" content="([^"]+)"')
        )
        texts = re.findall(r'<div class="text markdown" dir="auto">(.*?)</div>', shown, flags=re.S)
        return item, [html.unescape(re.sub("<[^>]+>", "", text)).strip() for text in texts]

    def say(self, item: str, ranks: list[int] | None, **changes: Any) -> None:
        """Judge the item that was looked at last."""
        body = {"client_id": f"person-{item}", "item": item, "verdict": "ranked", "ranks": ranks, "seconds": 1.0}
        headers = {"Content-Type": "application/json", "X-CSRF-Token": self.token}
        request = urllib.request.Request(f"{self.address}/judgements", json.dumps(body | changes).encode(), headers)
        assert json.load(self.open(request, timeout=60))["stored"]
