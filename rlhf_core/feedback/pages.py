"""The pages: log in, rank, compare, results, admin. Each answers from the store; app.py says who may ask."""

from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_args

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import RedirectResponse, Response
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from starlette.exceptions import HTTPException

from rlhf_core.errors import RLHFError
from rlhf_core.feedback import exchange, judging, results
from rlhf_core.feedback.accounts import password_fits
from rlhf_core.feedback.app import (
    csrf_token,
    desk_of,
    form,
    log_in,
    person,
    raw_body,
    render,
    require_admin,
    require_csrf,
    require_person,
)
from rlhf_core.feedback.judging import Kind, Refused, Submission
from rlhf_core.feedback.store import Annotator

router = APIRouter()
KINDS = get_args(Kind)
Me = Annotated[Annotator, Depends(require_person)]
Admin = Annotated[Annotator, Depends(require_admin)]
Form = Annotated[dict[str, str], Depends(form)]
checked = [Depends(require_csrf)]
Result = TypeVar("Result")


@router.get("/")
def home(request: Request, me: Me) -> Response:
    """What there is to do."""
    with desk_of(request).store.session() as session:
        progress = {kind: judging.progress(session, me.id, kind) for kind in KINDS}
    return render(request, "home.html.j2", progress=progress)


@router.get("/login")
def login_page(request: Request) -> Response:
    """The login form."""
    if person(request):
        return RedirectResponse("/", 303)
    return render(request, "login.html.j2", problem="", possible=desk_of(request).store.has_login())


@router.post("/login", dependencies=checked)
def login(request: Request, fields: Form) -> Response:
    """Check name and password."""
    desk, name = desk_of(request), fields.get("name", "").strip()
    address = request.client.host if request.client else ""
    problem, status = "", 200
    if desk.limit.blocked(name, address):
        problem, status = "Too many wrong passwords. Wait five minutes.", 429
    else:
        with desk.store.session() as session:
            session.expire_on_commit = False
            annotator = session.scalar(select(Annotator).where(Annotator.name == name))
        if password_fits(fields.get("password", ""), annotator.password_hash if annotator else None) and annotator:
            log_in(request, annotator)
            return RedirectResponse("/", 303)
        desk.limit.failed(name, address)
        problem, status = "Name or password is wrong.", 401
    return render(request, "login.html.j2", status, problem=problem, possible=desk.store.has_login())


@router.post("/logout", dependencies=checked)
def logout(request: Request) -> Response:
    """End the session."""
    request.session.clear()
    return RedirectResponse("/login", 303)


@router.get("/rank")
@router.get("/compare")
def judge(request: Request, me: Me) -> Response:
    """The next item of a kind."""
    kind: Kind = "rank" if request.url.path == "/rank" else "compare"
    store = desk_of(request).store

    def show_next() -> judging.Shown | None:
        with store.session() as session:
            return judging.show_next(session, me.id, kind)

    item = _again_if_outrun(show_next)
    with store.session() as session:
        progress = judging.progress(session, me.id, kind)
        last = judging.last_judgement(session, me.id, kind)
    return render(request, f"{kind}.html.j2", kind=kind, item=item, progress=progress, last=last)


@router.post("/judgements", dependencies=checked)
def store_judgement(request: Request, me: Me, sent: Submission) -> dict[str, Any]:
    """Store a judgement; the answer is sent after it was committed."""
    desk = desk_of(request)

    def submit() -> bool:
        with desk.store.session() as session:
            return judging.submit(session, me.id, sent, desk.version)

    try:
        return {"stored": True, "new": _again_if_outrun(submit)}
    except Refused as refused:
        raise HTTPException(refused.status, str(refused)) from None


@router.post("/judgements/{judgement}/undo", dependencies=checked)
def undo(request: Request, me: Me, judgement: int) -> dict[str, Any]:
    """Withdraw a judgement; undoing it again changes nothing."""
    try:
        with desk_of(request).store.session() as session:
            judging.undo(session, me.id, judgement)
    except Refused as refused:
        raise HTTPException(refused.status, str(refused)) from None
    return {"undone": True}


@router.get("/token")
def token(request: Request, me: Me) -> dict[str, Any]:
    """Who is logged in and with which CSRF token, for judgements that waited while a session ended."""
    return {"annotator": me.id, "csrf": csrf_token(request)}


# ---- for admins: results would tell annotators which side to expect


@router.get("/results")
def show_results(request: Request, _: Admin) -> Response:
    """Win rates, and how people judged."""
    with desk_of(request).store.session() as session:
        compared = results.comparisons(session)
        habits = {kind: results.habits(session, kind) for kind in KINDS}
    return render(request, "results.html.j2", comparisons=compared, habits=habits)


@router.get("/admin")
def admin(request: Request, _: Admin) -> Response:
    """Progress by kind, import, export."""
    with desk_of(request).store.session() as session:
        progress = {kind: judging.progress(session, None, kind) for kind in KINDS}
        people = [(one.name, one.role) for one in session.scalars(select(Annotator).order_by(Annotator.name))]
    return render(request, "admin.html.j2", progress=progress, people=people)


@router.post("/admin/import", dependencies=checked)
def import_items(
    request: Request,
    _: Admin,
    body: Annotated[bytes, Depends(raw_body)],
    name: Annotated[str, Query(max_length=200)] = "the file",
    kind: Annotated[Kind | None, Query()] = None,
    overlap: Annotated[int, Query(ge=1, le=20)] = 1,
    first: Annotated[str, Query(max_length=80)] = "ppo",
    second: Annotated[str, Query(max_length=80)] = "sft",
    how: Annotated[str, Query(max_length=80)] = "sampled",
) -> dict[str, Any]:
    """Items from JSON lines."""
    try:
        rows = list(exchange.read_text(body.decode("utf-8-sig")))
        items = exchange.find_items(name, rows, kind=kind, policies=(first, second), how=how)
        with desk_of(request).store.session() as session:
            imported = exchange.add_items(session, items, overlap=overlap)
    except UnicodeDecodeError:
        raise HTTPException(422, f"{name} is not UTF-8 text.") from None
    except RLHFError as error:
        raise HTTPException(422, str(error)) from None
    return {"message": str(imported)}


@router.get("/admin/rankings.jsonl")
def export(request: Request, _: Admin) -> Response:
    """All judgements that rank, as rankings."""
    with desk_of(request).store.session() as session:
        lines = exchange.as_lines(exchange.export_rankings(session))
    return Response(
        lines, media_type="application/jsonl",
        headers={"Content-Disposition": 'attachment; filename="rankings.jsonl"'},
    )  # fmt: skip


def _again_if_outrun(work: Callable[[], Result]) -> Result:
    """Do it once more if the same request, sent twice at once, wrote first: the second look finds what it wrote."""
    try:
        return work()
    except IntegrityError:
        return work()
