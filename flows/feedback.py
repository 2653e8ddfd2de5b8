"""The commands of `rlhf feedback`: serve the pages, add people, import items, export what was said."""

import getpass
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from flows.listening import LOOPBACK, in_address, require_free
from rlhf_core.errors import ConfigError, MissingArtifact
from tasks.environment import record_folder
from tasks.pipeline import find_root

if TYPE_CHECKING:
    from rlhf_core.feedback.judging import Kind
    from rlhf_core.feedback.store import Store

KINDS = ("rank", "compare", "write")
EXPORTS = ("rankings", "demonstrations", "pairs")

HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(rich_markup_mode="markdown", pretty_exceptions_enable=False, context_settings=HELP)
Database = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|URL", envvar="RLHF_FEEDBACK_DATABASE", show_default=False,
        help="Where judgements are kept: a file, or a URL such as postgresql+psycopg://user@host/name. "
        ".rlhf/feedback.db if not given.",
    ),
]  # fmt: skip


@app.callback(invoke_without_command=True)
def feedback(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="Address to listen on. 127.0.0.1 is this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    database: Database = None,
    guideline: Annotated[
        str | None, typer.Option(metavar="FILE", help="What people judge by, in Markdown; one that ships if not given.")
    ] = None,
    daily: Annotated[
        int, typer.Option(min=0, help="Judgements of a kind that each person is asked for a day; 0: all there are.")
    ] = 0,
    https: Annotated[bool, typer.Option("--https", help="Behind a proxy with TLS: cookies over HTTPS alone.")] = False,
) -> None:
    """Serve the pages on which people rank responses, compare policies and write. Ctrl-C ends it.

    On this machine alone, with no accounts, nobody has to log in. Another --host needs an account with a password,
    and so does --https.

    A first judgement of PPO against SFT:

    - `rlhf feedback import artifacts/evaluate/answers.jsonl` takes the answers of the last evaluation, ppo against sft
    - `rlhf feedback` serves the pages; the results are among them
    - `rlhf feedback export rankings.jsonl` writes what was judged, as rankings to train on
    """
    context.obj = database
    if context.invoked_subcommand:
        return
    text = _guideline(guideline)
    store = _open(database)
    if host not in LOOPBACK and not store.has_login():
        raise ConfigError(
            f"{host} can be reached from other machines, and nobody has a password. "
            "First: `rlhf feedback add-user NAME --admin`"
        )
    if https and not store.has_login():
        raise ConfigError(
            "--https is for a proxy, by way of which others come in as the person of this machine while nobody has a "
            "password. First: `rlhf feedback add-user NAME --admin`"
        )
    import uvicorn

    from rlhf_core.feedback.accounts import secret_key
    from rlhf_core.feedback.app import create_app

    require_free(host, port, "rlhf feedback")
    secret = secret_key(record_folder(find_root()) / "feedback.key")
    artifacts = find_root() / "artifacts"
    page = create_app(store, secret=secret, guideline=text, https=https, a_day=daily, artifacts=artifacts)
    typer.echo(f"Feedback: http://{in_address(host)}:{port}   (Ctrl-C ends it)")
    if not store.has_login():
        typer.echo("Nobody has a password: whoever sits at this machine is its admin, without login.")
    # X-Forwarded-For is believed only where a proxy was said to be: else anyone here may write any address.
    uvicorn.run(page, host=host, port=port, log_level="warning", server_header=False, proxy_headers=https)
    store.close()


@app.command("add-user")
def add_user(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME")],
    admin: Annotated[bool, typer.Option("--admin", help="May see results, import and export.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Give someone who is there a new password and role.")
    ] = False,
    database: Database = None,
) -> None:
    """Add a person who judges, with a password that is asked for (or read from standard input).

    With the first account, everybody has to log in.

    - `rlhf feedback add-user kim`
    - `rlhf feedback add-user sam --admin`
    """
    from rlhf_core.feedback.accounts import add_user as add

    store = _open(database or context.obj)
    add(store, name, _ask_password(), admin=admin, replace=replace)
    store.close()
    typer.echo(f"{name} can log in{' as an admin' if admin else ''}.")


@app.command("import")
def import_items(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="JSON lines (gzip too) or Parquet.")],
    second_file: Annotated[
        str | None, typer.Argument(metavar="SECOND", help="Compare with this file's responses, prompt by prompt.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="rank, compare or write; what the rows are if not given.")] = None,
    policies: Annotated[str, typer.Option(metavar="A,B", help="Whose answers are compared.")] = "ppo,sft",
    how: Annotated[str, typer.Option(help="Which answers: sampled or greedy.")] = "sampled",
    overlap: Annotated[int, typer.Option(min=1, max=20, help="How many people judge each item.")] = 1,
    axes: Annotated[
        str, typer.Option(metavar="A,B", help="Score each response to rank from 1 to 5 on these axes too.")
    ] = "",
    gold: Annotated[
        bool, typer.Option("--gold", help="The file's ranks are known to be right: annotators are measured by them.")
    ] = False,
    database: Database = None,
) -> None:
    """Add items to judge. A file that was imported before adds nothing.

    - `rlhf feedback import data/starter/rankings.jsonl` gives rows with `responses` to be ranked
    - `rlhf feedback import artifacts/evaluate/answers.jsonl --policies ppo,base` compares two policies
    - `rlhf feedback import mine.jsonl theirs.jsonl` compares two files of `prompt` and `response`
    - `rlhf feedback import prompts.jsonl --kind write` asks for a response to each prompt, or to correct the one given
    """
    if kind not in (None, *KINDS):
        raise typer.BadParameter(f"Found --kind {kind!r}, expected rank, compare or write.")
    first, _, second = policies.partition(",")
    if not first or not second or "," in second:
        raise typer.BadParameter(f"Found --policies {policies!r}, expected two names such as ppo,sft.")
    from rlhf_core.feedback import exchange

    rows = exchange.read_file(file)
    if second_file:
        others = exchange.read_file(second_file)
        items = exchange.pair_files((exchange.label(file), rows), (exchange.label(second_file), others))
    else:
        of_kind = cast("Kind | None", kind)
        items = exchange.find_items(file, rows, kind=of_kind, policies=(first, second), how=how, gold=gold)
    store = _open(database or context.obj)
    with store.session() as session:
        imported = exchange.add_items(session, items, overlap=overlap, axes=exchange.names(axes))
    store.close()
    typer.echo(str(imported))


@app.command()
def export(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Where the rows are written.")],
    what: Annotated[str, typer.Option(help="rankings, demonstrations or pairs.")] = "rankings",
    database: Database = None,
) -> None:
    """Write what people said, in the formats that `prepare` in params.yaml reads.

    - `rlhf feedback export data/human.jsonl`: what was ranked and compared, as rankings
    - `rlhf feedback export data/written.jsonl --what demonstrations`: what was written or corrected
    - `rlhf feedback export data/corrected.jsonl --what pairs`: each correction, better than what was corrected
    """
    if what not in EXPORTS:
        raise typer.BadParameter(f"Found --what {what!r}, expected rankings, demonstrations or pairs.")
    from rlhf_core.feedback import exchange
    from tasks.stage import write_text

    store = _open(database or context.obj)
    with store.session() as session:
        lines = exchange.as_lines(exchange.EXPORTS[what](session))
    store.close()
    write_text(Path(file), lines)
    typer.echo(f"{file}: {lines.count(chr(10))} {what}.")


@app.command()
def convert(
    file: Annotated[str, typer.Argument(metavar="FILE", help="JSON exported by Label Studio or Argilla.")],
    rankings: Annotated[str, typer.Argument(metavar="RANKINGS", help="Where the rankings are written, as JSON lines.")],
    prompt: Annotated[str, typer.Option(metavar="FIELD", help="What holds the prompt, if it is not called so.")] = "",
    buckets: Annotated[
        str, typer.Option(metavar="BEST,...", help="Label Studio's buckets in order, if items lie in several.")
    ] = "",
) -> None:
    """Turn rankings that were made with Label Studio or Argilla into rankings to train on.

    - `rlhf feedback convert project-1.json data/human.jsonl`
    """
    import json

    from rlhf_core.feedback.exchange import as_lines
    from rlhf_core.feedback.foreign import read_foreign

    if not Path(file).is_file():
        raise MissingArtifact(f"Found no export {file}, expected JSON by Label Studio or Argilla.")
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is no JSON: {error}. Export JSON, not CSV.") from error
    names = [name.strip() for name in buckets.split(",") if name.strip()]
    lines = as_lines(iter(read_foreign(content, name=file, prompt=prompt, buckets=names)))
    Path(rankings).write_text(lines, encoding="utf-8")
    typer.echo(f"{rankings}: {lines.count(chr(10))} rankings.")


def _open(database: str | None) -> "Store":
    from rlhf_core.feedback.store import open_store

    return open_store(database or record_folder(find_root()) / "feedback.db")


def _guideline(file: str | None) -> str:
    if file is None:
        return ""
    if not Path(file).is_file():
        raise MissingArtifact(f"Found no guideline {file}, expected a Markdown file.")
    return Path(file).read_text(encoding="utf-8")


def _ask_password() -> str:
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\n")
    password = getpass.getpass("Password (8 characters or more): ")
    if password != getpass.getpass("Again: "):
        raise ConfigError("The two passwords differ. Run the command again.")
    return password
