"""What admins see: results, which would tell annotators what to expect; import, export, gold questions, people."""

from pathlib import Path as Folder
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import Response
from sqlalchemy import select
from starlette.exceptions import HTTPException

from rlhf_core.errors import RLHFError
from rlhf_core.feedback import exchange, gold, judging, results
from rlhf_core.feedback.app import desk_of, raw_body, render, require_admin
from rlhf_core.feedback.judging import Kind, Refused
from rlhf_core.feedback.pages import KINDS, checked
from rlhf_core.feedback.store import Annotator

router = APIRouter()
Admin = Annotated[Annotator, Depends(require_admin)]
ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")


@router.get("/results")
def show_results(request: Request, _: Admin) -> Response:
    """Win rates, agreement, and how people judged."""
    return render(request, "results.html.j2", found=_results(request))


@router.get("/results/live")
def live_results(request: Request, _: Admin) -> Response:
    """What changes on the results page while people judge."""
    return render(request, "results_live.html.j2", found=_results(request))


@router.get("/admin")
def show_admin(request: Request, me: Admin) -> Response:
    """Progress by kind, import, export, gold questions, people."""
    desk = desk_of(request)
    with desk.store.session() as session:
        progress = {kind: judging.progress(session, None, kind) for kind in KINDS}
        people = [(one.name, one.role) for one in session.scalars(select(Annotator).order_by(Annotator.name))]
        mine = gold.candidates(session, me.id)
        known = gold.count(session)
    return render(
        request, "admin.html.j2", progress=progress, people=people, artifacts=artifacts(desk.artifacts),
        mine=mine, known=known, exports=list(exchange.EXPORTS),
    )  # fmt: skip


@router.post("/admin/import", dependencies=checked)
def import_items(
    request: Request,
    _: Admin,
    body: Annotated[bytes, Depends(raw_body)],
    name: Annotated[str, Query(max_length=200)] = "the file",
    artifact: Annotated[str, Query(max_length=400)] = "",
    kind: Annotated[Kind | None, Query()] = None,
    overlap: Annotated[int, Query(ge=1, le=20)] = 1,
    first: Annotated[str, Query(max_length=80)] = "ppo",
    second: Annotated[str, Query(max_length=80)] = "sft",
    how: Annotated[str, Query(max_length=80)] = "sampled",
    axes: Annotated[str, Query(max_length=400)] = "",
    known: Annotated[bool, Query()] = False,
) -> dict[str, Any]:
    """Items from JSON lines that were sent, or from a stage's artifact that lies on this machine."""
    try:
        rows = _artifact_rows(request, artifact) if artifact else list(exchange.read_text(body.decode("utf-8-sig")))
        items = exchange.find_items(artifact or name, rows, kind=kind, policies=(first, second), how=how, gold=known)
        with desk_of(request).store.session() as session:
            imported = exchange.add_items(session, items, overlap=overlap, axes=exchange.names(axes))
    except UnicodeDecodeError:
        raise HTTPException(422, f"{name} is not UTF-8 text.") from None
    except RecursionError:  # read, but too deep to be told
        raise HTTPException(422, f"{name} has brackets within brackets within brackets.") from None
    except RLHFError as error:
        raise HTTPException(422, str(error)) from None
    return {"message": str(imported)}


@router.post("/admin/gold/{judgement}", dependencies=checked)
def mark_gold(request: Request, me: Admin, judgement: Annotated[int, Path(ge=1, lt=2**31)]) -> dict[str, Any]:
    """Make an own judgement the known answer of its item, or no longer."""
    try:
        with desk_of(request).store.session() as session:
            return {"gold": gold.toggle(session, me.id, judgement)}
    except Refused as refused:
        raise HTTPException(refused.status, str(refused)) from None


@router.get("/admin/{what}.jsonl")
def export(request: Request, _: Admin, what: Literal["rankings", "demonstrations", "pairs"]) -> Response:
    """All judgements that rank, as rankings; all that was written, as demonstrations or pairs."""
    with desk_of(request).store.session() as session:
        lines = exchange.as_lines(exchange.EXPORTS[what](session))
    return Response(
        lines, media_type="application/jsonl",
        headers={"Content-Disposition": f'attachment; filename="{what}.jsonl"'},
    )  # fmt: skip


def artifacts(folder: Folder | None) -> list[str]:
    """The files of rows below a folder, as the page offers them."""
    if folder is None:
        return []
    found = (path for path in folder.rglob("*") if path.name.endswith(ENDINGS) and path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _artifact_rows(request: Request, artifact: str) -> list[exchange.Row]:
    folder = desk_of(request).artifacts
    # One of those that were offered, by name: no path that was sent is ever opened.
    if folder is None or artifact not in artifacts(folder):
        raise HTTPException(404, f"There is no artifact {artifact!r}.")
    return exchange.read_file(str(folder / artifact))


def _results(request: Request) -> results.Results:
    """The results; those of the last look where nothing was said since, or while another look counts anew."""
    desk = desk_of(request)
    if desk.counting.acquire(blocking=not desk.results):
        try:
            with desk.store.session() as session:
                mark = results.mark(session)
                if desk.results.get("mark") != mark:
                    desk.results = {"mark": mark, "found": results.find(session)}
        finally:
            desk.counting.release()
    return desk.results["found"]
