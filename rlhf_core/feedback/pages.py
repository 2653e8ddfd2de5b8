"""The pages on which people judge: log in, rank, compare, write. app.py says who may ask; admin.py has the rest."""

from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_args

from fastapi import APIRouter, Depends, Path, Request
from fastapi.responses import RedirectResponse, Response
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from starlette.exceptions import HTTPException

from rlhf_core.feedback import judging
from rlhf_core.feedback.accounts import password_fits
from rlhf_core.feedback.app import (
    csrf_token,
    desk_of,
    form,
    log_in,
    person,
    render,
    require_csrf,
    require_person,
)
from rlhf_core.feedback.judging import Kind, Refused, Submission
from rlhf_core.feedback.store import Annotator

router = APIRouter()
KINDS = get_args(Kind)
Me = Annotated[Annotator, Depends(require_person)]
Form = Annotated[dict[str, str], Depends(form)]
checked = [Depends(require_csrf)]
Result = TypeVar("Result")


@router.get("/")
def home(request: Request, me: Me) -> Response:
    """What there is to do."""
    desk = desk_of(request)
    with desk.store.session() as session:
        progress = {kind: judging.progress(session, me.id, kind, a_day=desk.a_day) for kind in KINDS}
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
    desk, name = desk_of(request), judging.storable(fields.get("name", "")).strip()
    address = request.client.host if request.client else ""
    with desk.store.session() as session:
        session.expire_on_commit = False
        annotator = session.scalar(select(Annotator).where(Annotator.name == name))
    password_hash = annotator.password_hash if annotator else None
    fits = desk.limit.fits(name, address, lambda: password_fits(fields.get("password", ""), password_hash))
    if fits and annotator:
        log_in(request, annotator)
        return RedirectResponse("/", 303)
    problem, status = "Name or password is wrong.", 401
    if fits is None:
        problem, status = "Too many wrong passwords. Wait five minutes.", 429
    return render(request, "login.html.j2", status, problem=problem, possible=desk.store.has_login())


@router.post("/logout", dependencies=checked)
def logout(request: Request) -> Response:
    """End the session."""
    request.session.clear()
    return RedirectResponse("/login", 303)


@router.get("/rank")
@router.get("/compare")
@router.get("/write")
def judge(request: Request) -> Response:
    """The next item of a kind."""
    me = require_person(request)  # here and not as a dependency, which would wait for a thread of its own
    kind: Kind = next(kind for kind in KINDS if request.url.path == f"/{kind}")
    desk = desk_of(request)
    with desk.store.session() as session:
        progress = judging.progress(session, me.id, kind, a_day=desk.a_day)
        last = judging.last_judgement(session, me.id, kind)
        item = judging.show_next(session, me.id, kind, lock=desk.store.lock)  # last, for it holds a lock to the end
    most = judging.MOST_SCORE
    return render(request, f"{kind}.html.j2", kind=kind, item=item, progress=progress, last=last, most=most)


@router.post("/judgements", dependencies=checked)
def store_judgement(request: Request, me: Me, sent: Submission) -> dict[str, Any]:
    """Store a judgement; the answer is sent after it was committed."""
    desk = desk_of(request)

    def submit() -> bool:
        with desk.store.session() as session:
            return judging.submit(session, me.id, sent, desk.version, queue=desk.store.queue)

    try:
        return {"stored": True, "new": _again_if_outrun(submit)}
    except Refused as refused:
        raise HTTPException(refused.status, str(refused)) from None


@router.post("/judgements/{judgement}/undo", dependencies=checked)
def undo(request: Request, me: Me, judgement: Annotated[int, Path(ge=1, lt=2**31)]) -> dict[str, Any]:
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


def _again_if_outrun(work: Callable[[], Result]) -> Result:
    """Do it once more if the same request, sent twice at once, wrote first: the second look finds what it wrote."""
    try:
        return work()
    except IntegrityError:
        return work()
