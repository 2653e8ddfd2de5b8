"""The web application: who is asking, what may be sent, and the headers of every answer.

The pages are in pages.py, those for admins in admin.py.
"""

import hmac
import secrets
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from sqlalchemy.exc import OperationalError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.sessions import SessionMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_core.feedback.accounts import LoginLimit, fingerprint, local_admin
from rlhf_core.feedback.judging import keep_guideline
from rlhf_core.feedback.markdown import as_html
from rlhf_core.feedback.store import CONNECTIONS, Annotator, Store

FOLDER = Path(__file__).parent
MOST_BYTES = 1_000_000  # of a request's body
MOST_FIELDS = 20  # of a form
LOOPBACK = ("127.0.0.1", "localhost", "::1")
FORWARDED = ("forwarded", "via", "x-real-ip")  # what proxies add, beside X-Forwarded-For, -Host, -Proto and the like
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self'; style-src 'self'; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Feedback-Pages": "1",  # by which the page knows that an answer is from here, and not from a proxy on the way
}


@dataclass
class Desk:
    """What the pages share: the store, the guideline, and how they are drawn."""

    store: Store
    guideline: Markup
    version: str
    templates: Jinja2Templates
    a_day: int = 0  # judgements of a kind that a person is asked for; 0 for as many as there are
    artifacts: Path | None = None  # whose files admins may import
    limit: LoginLimit = field(default_factory=LoginLimit)
    results: dict[str, Any] = field(default_factory=dict)  # the last ones, and of which judgements
    counting: threading.Lock = field(default_factory=threading.Lock)  # held by whoever counts them


class Guard:
    """Refuses bodies that are too large, and puts the safety headers on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                if not scope["path"].startswith("/static/"):
                    headers["Cache-Control"] = "no-store"
            await send(message)

        # The whole body is read here: a length that the client claims, or does not, decides nothing.
        body, more = b"", True
        while more and len(body) <= MOST_BYTES:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if len(body) > MOST_BYTES:
            refusal = JSONResponse({"detail": f"More than {MOST_BYTES} bytes."}, 413, {"Connection": "close"})
            await refusal(scope, receive, answer)
            return
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, receive_again, answer)


def create_app(
    store: Store,
    *,
    secret: str,
    guideline: str = "",
    https: bool = False,
    a_day: int = 0,
    artifacts: Path | None = None,
) -> FastAPI:
    """The application on an open store.

    Args:
        secret: the key that signs sessions.
        guideline: in Markdown; the one that ships if empty.
        https: send the session's cookie over HTTPS alone.
        a_day: judgements of a kind that a person is asked for a day; 0 for as many as there are.
        artifacts: a folder whose files of rows admins may import; None for no such offer.
    """
    from rlhf_core.feedback import admin, pages

    guideline = guideline or (FOLDER / "guideline.md").read_text(encoding="utf-8")
    with store.session() as session:
        version = keep_guideline(session, guideline)
    if not store.has_login():
        local_admin(store)  # now, and not by two requests at once
    environment = Environment(
        loader=FileSystemLoader(FOLDER / "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, auto_reload=False,
    )  # fmt: skip
    environment.globals["csrf"] = csrf_token
    environment.filters["markdown"] = as_html
    app = FastAPI(title="rlhf feedback", docs_url=None, redoc_url=None, openapi_url=None, lifespan=_few_at_once)
    app.state.desk = Desk(
        store, as_html(guideline, breaks=False), version, Jinja2Templates(env=environment), a_day, artifacts
    )
    app.mount("/static", StaticFiles(directory=FOLDER / "static"))
    app.include_router(pages.router)
    app.include_router(admin.router)
    app.add_exception_handler(HTTPException, _explain)
    app.add_exception_handler(RequestValidationError, _name_fields)
    app.add_exception_handler(OperationalError, _not_now)
    app.add_middleware(
        SessionMiddleware, secret_key=secret, session_cookie="rlhf_feedback", same_site="lax", https_only=https
    )
    app.add_middleware(Guard)
    return app


@asynccontextmanager
async def _few_at_once(_: FastAPI) -> AsyncIterator[None]:
    """As many requests at once as there are connections kept open: more threads only take Python from each other."""
    current_default_thread_limiter().total_tokens = CONNECTIONS
    yield


# ---- who is asking


def desk_of(request: Request) -> Desk:
    """What the pages share."""
    return request.app.state.desk


def person(request: Request) -> Annotator | None:
    """Who is logged in; on a laptop without users the one person of it."""
    if not hasattr(request.state, "person"):  # asked for by the page and by what is drawn on it
        request.state.person = _find_person(request)
    return request.state.person


def _find_person(request: Request) -> Annotator | None:
    store = desk_of(request).store
    identity = request.session.get("annotator")
    if identity is None and is_local(request):
        identity = local_admin(store)
    if identity is None:
        return None
    with store.session() as session:
        session.expire_on_commit = False
        annotator = session.get(Annotator, identity)
    if annotator is None or (annotator.password_hash is None and not is_local(request)):
        return None
    known = request.session.get("password")
    return annotator if known in (None, fingerprint(annotator)) and (known or is_local(request)) else None


def is_local(request: Request) -> bool:
    """Whether nobody has a password, and the request comes from this machine and not by way of another.

    The host's name is looked at too, or a page elsewhere whose name leads to 127.0.0.1 could ask as the local person.
    A proxy on this machine that adds no header, and asks for 127.0.0.1 itself, cannot be told from its person.
    """
    client = request.client.host if request.client else ""
    here = client in LOOPBACK and request.url.hostname in LOOPBACK
    by_proxy = any(name in FORWARDED or name.startswith("x-forwarded") for name in request.headers)
    return here and not by_proxy and not desk_of(request).store.has_login()


def log_in(request: Request, annotator: Annotator) -> None:
    """Start a session, with a CSRF token of its own."""
    request.session.clear()
    request.session.update(annotator=annotator.id, password=fingerprint(annotator))


class LoginNeeded(HTTPException):
    """Nobody is logged in."""

    def __init__(self) -> None:
        super().__init__(401, "Log in first.")


def require_person(request: Request) -> Annotator:
    """Dependency: who is logged in, or the login page."""
    found = person(request)
    if found is None:
        raise LoginNeeded
    return found


def require_admin(request: Request) -> Annotator:
    """Dependency: an admin."""
    found = require_person(request)
    if found.role != "admin":
        raise HTTPException(403, "Only an admin sees this.")
    return found


# ---- what may be sent


def csrf_token(request: Request) -> str:
    """A secret of the session that every form and every script has to send back."""
    if "csrf" not in request.session:
        request.session["csrf"] = secrets.token_urlsafe(24)
    return str(request.session["csrf"])


async def require_csrf(request: Request) -> None:
    """Dependency of every POST: the session's token, from the header or the form."""
    sent = request.headers.get("x-csrf-token") or (await form(request)).get("csrf", "")
    if not hmac.compare_digest(sent.encode(), str(request.session.get("csrf", "")).encode()) or not sent:
        raise HTTPException(403, "This page is out of date. Load it again.")


async def form(request: Request) -> dict[str, str]:
    """The fields of a form; other bodies have none."""
    if not request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        return {}
    text = (await request.body()).decode("utf-8", errors="replace")
    try:
        fields = parse_qs(text, max_num_fields=MOST_FIELDS)
    except ValueError:
        raise HTTPException(422, f"More than {MOST_FIELDS} fields.") from None
    return {name: values[-1] for name, values in fields.items()}


async def raw_body(request: Request) -> bytes:
    """Dependency: what was sent, as it is."""
    return await request.body()


def render(request: Request, template: str, status: int = 200, **values: Any) -> Response:
    """A page."""
    desk = desk_of(request)
    shared = {"me": person(request), "guideline": desk.guideline, "local": is_local(request)}
    return desk.templates.TemplateResponse(request, template, {**shared, **values}, status_code=status)


def _explain(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    wants_page = "text/html" in request.headers.get("accept", "")
    if isinstance(error, LoginNeeded) and wants_page and request.method == "GET":
        return RedirectResponse("/login", 303)
    if wants_page:
        return render(request, "message.html.j2", error.status_code, title="Not possible", message=error.detail)
    return JSONResponse({"detail": error.detail}, error.status_code)


def _not_now(request: Request, error: Exception) -> Response:
    """A full disk, or a database that is away: nothing was stored, and the page keeps what it has and tries again."""
    assert isinstance(error, OperationalError)
    message = f"The database cannot store anything now ({error.orig}). Nothing is lost; it is tried again."
    return _explain(request, HTTPException(503, message))


def _name_fields(request: Request, error: Exception) -> Response:
    """What is wrong with which field; what was sent is not sent back, for it may be no text at all."""
    assert isinstance(error, RequestValidationError)
    wrong = (f"{'.'.join(map(str, one['loc'][1:])) or 'body'}: {one['msg']}" for one in error.errors())
    return _explain(request, HTTPException(422, "; ".join(wrong).encode("utf-8", "replace").decode()))
