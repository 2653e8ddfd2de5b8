"""Who may ask, what may be sent, and that what models and people wrote stays text."""

import re
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import pytest
from itsdangerous import TimestampSigner
from people import PASSWORD, SECRET, Person, log_in
from sqlalchemy import event, func, select, text

from rlhf_core.errors import ConfigError, ResourceError
from rlhf_core.feedback import exchange
from rlhf_core.feedback.accounts import LoginLimit, add_user, hash_password, password_fits, secret_key
from rlhf_core.feedback.app import MOST_BYTES, create_app
from rlhf_core.feedback.markdown import LONGEST, as_html
from rlhf_core.feedback.store import Annotator, Item, Judgement, Store

Browser = Callable[..., Person]
SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)>"
PAGES = ["/", "/rank", "/compare", "/write", "/results", "/admin"]


# ---- who may ask


def test_one_person_on_this_machine_needs_no_login(browser: Browser) -> None:
    local = browser()
    assert [local.get(path).status_code for path in PAGES] == [200] * 6
    assert "local" in local.get("/").text


@pytest.mark.parametrize(
    ("host", "client", "headers"),
    [
        ("192.0.2.7", "192.0.2.7", {}),
        ("evil.example", "127.0.0.1", {}),  # a name of theirs that leads here
        *(
            ("127.0.0.1", "127.0.0.1", {header: value})
            for header, value in (
                ("X-Forwarded-For", "192.0.2.7"),
                ("X-Forwarded-Host", "127.0.0.1"),
                ("X-Forwarded-Proto", "https"),
                ("X-Real-IP", "192.0.2.7"),
                ("Forwarded", "for=192.0.2.7"),
                ("Via", "1.1 proxy"),
            )
        ),
    ],
)
def test_nobody_else_comes_in_without_one(store: Store, host: str, client: str, headers: dict[str, str]) -> None:
    app = create_app(store, secret=SECRET)
    stranger = Person(app, base_url=f"http://{host}", client=(client, 50000), headers=headers)
    for path in PAGES:
        assert stranger.get(path).status_code == 401
        assert (
            stranger.get(path, headers={"Accept": "text/html"}, follow_redirects=False).headers["location"] == "/login"
        )


def test_this_machine_has_an_address_of_ipv6_too(store: Store) -> None:
    local = Person(create_app(store, secret=SECRET), base_url="http://[::1]:8000", client=("::1", 50000))
    assert local.get("/rank").status_code == 200
    stranger = Person(create_app(store, secret=SECRET), base_url="http://[::1]:8000", client=("2001:db8::7", 50000))
    assert stranger.get("/rank").status_code == 401


def test_with_the_first_account_everybody_has_to_log_in(browser: Browser, store: Store) -> None:
    local = browser()
    token = local.token()
    add_user(store, "kim", PASSWORD, admin=True)
    assert local.get("/rank").status_code == 401
    assert local.post("/judgements", json={}, headers={"X-CSRF-Token": token}).status_code == 401


def test_login_and_logout(browser: Browser) -> None:
    kim = browser("kim")
    assert kim.get("/rank").status_code == 200
    done = kim.post("/logout", data={"csrf": kim.token()}, follow_redirects=False)
    assert done.headers["location"] == "/login"
    assert kim.get("/rank").status_code == 401


def test_the_cookie_is_signed_and_out_of_scripts_reach(browser: Browser, store: Store) -> None:
    add_user(store, "kim", PASSWORD, admin=False)
    kim = browser()
    done = log_in(kim, "kim", PASSWORD)
    cookie = done.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    secure = Person(create_app(store, secret=SECRET, https=True), base_url="https://127.0.0.1")
    assert "; secure" in secure.get("/login").headers["set-cookie"].lower()


@pytest.mark.parametrize("key", ["t" * 64, ""])
def test_a_forged_session_is_nobodys(browser: Browser, store: Store, key: str) -> None:
    kim = browser("kim")
    signed = kim.cookies["rlhf_feedback"].strip('"')
    body = signed.split(".")[0]
    forged = TimestampSigner(key).sign(body).decode() if key else body
    stranger = browser()
    stranger.cookies.set("rlhf_feedback", forged)
    assert stranger.get("/rank").status_code == 401
    stranger.cookies.set("rlhf_feedback", signed)
    assert stranger.get("/rank").status_code == 200


def test_a_new_password_ends_the_sessions_under_the_old(browser: Browser, store: Store) -> None:
    kim = browser("kim")
    with pytest.raises(ConfigError, match="--replace"):
        add_user(store, "kim", "another one", admin=False)
    add_user(store, "kim", "another one", admin=False, replace=True)
    assert kim.get("/rank").status_code == 401
    assert log_in(kim, "kim", PASSWORD).status_code == 401
    assert log_in(kim, "kim", "another one").status_code == 303


def test_wrong_passwords_are_limited(browser: Browser, store: Store) -> None:
    kim = browser("kim")
    kim.cookies.clear()
    assert [log_in(kim, "kim", "wrong").status_code for _ in range(6)] == [401] * 5 + [429]
    assert log_in(kim, "kim", PASSWORD).status_code == 429
    assert log_in(kim, "sam", "wrong").status_code == 401  # another name


def test_right_passwords_do_not_count(browser: Browser, store: Store) -> None:
    kim = browser("kim")  # logged in once
    for _ in range(2):
        kim.cookies.clear()
        assert [log_in(kim, "kim", "wrong").status_code for _ in range(2)] == [401] * 2
        for _ in range(6):
            kim.cookies.clear()
            assert log_in(kim, "kim", PASSWORD).status_code == 303
    kim.cookies.clear()
    assert [log_in(kim, "kim", "wrong").status_code for _ in range(2)] == [401, 429]


def test_many_wrong_passwords_at_once_are_no_more_tries_than_in_a_row(browser: Browser, store: Store) -> None:
    add_user(store, "kim", PASSWORD, admin=False)
    stranger = browser()
    form = {"name": "kim", "password": "wrong", "csrf": stranger.token()}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: stranger.post("/login", data=form).status_code, range(8)))
    assert sorted(answers) == [401] * 5 + [429] * 3


def test_the_limit_counts_by_address_and_by_name_too_and_passes() -> None:
    time = [0.0]
    limit = LoginLimit(clock=lambda: time[0])

    def wrong(name: str, address: str) -> bool | None:
        return limit.fits(name, address, lambda: False)

    assert [wrong(f"name {number}", "192.0.2.7") for number in range(21)] == [False] * 20 + [None]
    assert wrong("fresh", "192.0.2.8") is False
    assert [wrong("kim", f"198.51.100.{number}") for number in range(101)] == [False] * 100 + [None]
    assert limit.fits("sam", "198.51.100.7", lambda: True) is True
    assert limit.fits("fresh", "192.0.2.7", lambda: True) is None
    time[0] = 301.0
    assert limit.fits("fresh", "192.0.2.7", lambda: True) is True


def test_a_whole_class_may_log_in_at_once_from_one_address() -> None:
    limit, at_once, most = LoginLimit(), [0], [0]

    def right() -> bool:
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        sleep(0.02)
        at_once[0] -= 1
        return True

    with ThreadPoolExecutor(40) as pool:
        assert list(pool.map(lambda n: limit.fits(f"name {n}", "192.0.2.7", right), range(60))) == [True] * 60
    assert 1 < most[0] <= LoginLimit.BY_ADDRESS


def test_a_check_that_fails_counts_as_wrong_and_holds_up_nobody() -> None:
    limit = LoginLimit()

    def broken() -> bool:
        raise OSError("no memory")

    for _ in range(5):
        with pytest.raises(OSError, match="no memory"):
            limit.fits("kim", "192.0.2.7", broken)
    assert limit.fits("kim", "192.0.2.7", lambda: True) is None


def test_passwords_are_salted_hashes(store: Store) -> None:
    assert hash_password("same") != hash_password("same")
    assert password_fits("same", hash_password("same"))
    assert not password_fits("other", hash_password("same"))
    assert not password_fits("", None)
    add_user(store, "kim", PASSWORD, admin=False)
    with store.session() as session:
        assert PASSWORD not in str(session.scalar(select(Annotator.password_hash)))
    with pytest.raises(ConfigError, match="Found a password of 5 characters, expected 8 or more"):
        add_user(store, "sam", "short", admin=False)


def test_key_and_database_are_their_owners_alone(tmp_path: Path, store: Store, database: Path) -> None:
    key = secret_key(tmp_path / "key")
    assert secret_key(tmp_path / "key") == key
    assert len(key) == 64
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    for path in database.parent.glob("feedback.db*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (tmp_path / "key").write_text("")
    with pytest.raises(ResourceError, match="holds no key"):
        secret_key(tmp_path / "key")


# ---- what may be sent


POSTS = ["/login", "/logout", "/judgements", "/judgements/1/undo", "/admin/import", "/admin/gold/1"]


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("token", [None, "", "wrong"])
def test_a_post_without_the_sessions_token_is_refused(browser: Browser, path: str, token: str | None) -> None:
    kim = browser("kim", admin=True)
    body = {"client_id": "client-1", "item": "x", "verdict": "none", "seconds": 1}
    headers = {} if token is None else {"X-CSRF-Token": token}
    assert kim.post(path, json=body, headers=headers, follow_redirects=False).status_code == 403
    assert kim.post(path, data={"csrf": token or ""}, follow_redirects=False).status_code in (403, 422)
    assert kim.get("/rank").status_code == 200  # still logged in


def test_every_post_asks_for_the_token(store: Store) -> None:
    from rlhf_core.feedback import admin, pages

    both = [*pages.router.routes, *admin.router.routes]
    routes = {route.path: route for route in both if "POST" in route.methods}
    assert set(routes) == {re.sub(r"/1\b", "/{judgement}", path) for path in POSTS}
    for path, route in routes.items():
        assert route.dependencies == pages.checked, path


def test_a_body_over_the_limit_is_refused(browser: Browser) -> None:
    local = browser()
    token = local.token()
    ten_megabytes = b"x" * 10_000_000
    for content in (
        ten_megabytes,
        b"x" * (MOST_BYTES + 1),
        iter([b"x" * MOST_BYTES, b"x"]),
    ):  # the last tells no length
        answer = local.post("/admin/import", content=content, headers={"X-CSRF-Token": token})
        assert answer.status_code == 413
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_form_of_too_many_fields_is_refused(browser: Browser) -> None:
    kim = browser("kim")
    for path in ("/login", "/logout"):
        sent = kim.post(path, data={str(number): "x" for number in range(30)}, follow_redirects=False)
        assert sent.status_code == 422
        assert sent.json() == {"detail": "More than 20 fields."}


UNREADABLE = ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, "1" * 4000, "NaN", "[" * 50 + "]" * 50]
# What is read, and is too deep to be told: where that begins depends on how deep the calls are that read it.
DEEP = ["[" * depth + "]" * depth for depth in range(800, 1000, 5)]


@pytest.mark.parametrize("field", ["row", "prompt", "responses", "ranks", "origins", "margin", "category"])
def test_what_cannot_be_read_is_a_bad_row(browser: Browser, field: str) -> None:
    local = browser()
    headers = {"X-CSRF-Token": local.token()}
    for value in UNREADABLE + DEEP:
        row = {"prompt": '"Why?"', "responses": '["a", "b"]', "ranks": "[1, 2]", field: value}
        line = value if field == "row" else "{" + ", ".join(f'"{name}": {text}' for name, text in row.items()) + "}"
        sent = local.post("/admin/import", params={"known": True}, content=line.encode(), headers=headers)
        expected = (200, 422) if field in ("origins", "margin", "category") else (422,)
        assert sent.status_code in expected, (value[:9], len(value), sent.text[:200])


def test_every_answer_forbids_foreign_scripts_and_frames(browser: Browser) -> None:
    kim = browser("kim", admin=True)
    for path in [*PAGES, "/static/judge.js", "/nowhere"]:
        headers = kim.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"


def test_no_page_holds_script_or_style_or_asks_elsewhere(browser: Browser, items: None) -> None:
    kim = browser("kim", admin=True)
    for path in PAGES:
        text = kim.get(path).text
        assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", text)
        assert all(tag.startswith('<script src="/static/') for tag in re.findall(r"<script[^>]*>", text))
        assert not re.search(r"(?:src|href|action)=\"(?:https?:)?//", text)
        assert set(re.findall(r"(?:src|href)=\"(/[^\"]*)\"", text)) >= {"/static/style.css"}
        for link in set(re.findall(r"(?:src|href)=\"(/[^\"]*)\"", text)):
            assert kim.get(link).status_code == 200, link


# ---- untrusted text


def test_scripts_in_whatever_was_written_stay_text(browser: Browser, store: Store) -> None:
    kim = browser(f"kim {SCRIPT}", admin=True)
    row = {"prompt": f"P {SCRIPT}", "responses": [f"A {SCRIPT}", f"B {SCRIPT}"], "origins": [SCRIPT, "b"]}
    row["category"] = SCRIPT
    with store.session() as session:
        for kind in ("rank", "compare"):
            found = exchange.find_items("rows", [(1, row)], kind=kind, policies=("a", "b"), how="sampled")
            exchange.add_items(session, found)
    for kind in ("rank", "compare"):
        assert kim.get(f"/{kind}").text.count("&lt;script&gt;alert(1)") >= 5
        assert kim.judge(kind, client_id=f"client-{kind}", ranks=[1, 2], comment=f"C {SCRIPT}").status_code == 200
        kim.submit(f"/judgements/{kim.last(kind)}/undo")
        assert "C &lt;script&gt;" in kim.get(f"/{kind}").text
        kim.judge(kind, client_id=f"again-{kind}", ranks=[1, 2])
    to_correct = {"prompt": f"P {SCRIPT}", "response": f"A </textarea>{SCRIPT}", "category": SCRIPT}
    with store.session() as session:
        found = exchange.find_items("rows", [(1, to_correct)], kind="write", policies=("a", "b"), how="sampled")
        exchange.add_items(session, found)
    assert kim.get("/write").text.count("&lt;script&gt;alert(1)") == 5  # name, kind, prompt, response, and the text
    written = {"verdict": "written", "ranks": None, "written": f"W </textarea>{SCRIPT}", "comment": f"C {SCRIPT}"}
    assert kim.judge("write", client_id="client-write", **written).status_code == 200
    kim.submit(f"/judgements/{kim.last('write')}/undo")
    page = kim.get("/write").text
    assert "W &lt;/textarea&gt;&lt;script&gt;" in page
    assert "C &lt;script&gt;" in page
    for path in PAGES:
        text = kim.get(path).text
        assert "<script>" not in text
        assert "<img" not in text
        assert text.count("</textarea>") == text.count("<textarea")
    assert "&lt;script&gt;" in kim.get("/results").text


def test_a_guidelines_sentences_do_not_break_where_its_files_lines_do(browser: Browser, store: Store) -> None:
    assert "<br" not in browser().get("/").text.partition('class="guideline"')[2]
    app = create_app(store, secret=SECRET, guideline="One\nsentence.")
    assert "<p>One\nsentence.</p>" in Person(app, base_url="http://127.0.0.1", client=("127.0.0.1", 1)).get("/").text


def test_tags_in_a_guideline_stay_text(store: Store) -> None:
    app = create_app(store, secret=SECRET, guideline=f"# Mine\n\n{SCRIPT}\n\n[x](javascript:alert(1))")
    page = Person(app, base_url="http://127.0.0.1", client=("127.0.0.1", 50000)).get("/").text
    assert "<h1>Mine</h1>" in page
    assert "<script>" not in page
    assert 'href="javascript' not in page


@pytest.mark.parametrize(
    "attack",
    [
        "[x](javascript:alert(1))",
        "[x](JaVaScRiPt:alert(1))",
        "[x](&#106;avascript:alert(1))",
        "[x](java\nscript:alert(1))",
        "[x](data:text/html;base64,PHNjcmlwdD4=)",
        "[x](vbscript:x)",
        "[x](file:///etc/passwd)",
        "[x](/admin/import)",
        "[x](//evil.example)",
        "<javascript:alert(1)>",
        "![x](https://evil.example/seen.png)",
        "![x](javascript:alert(1))",
        '[x](https://a.example" onmouseover="alert(1))',
        '[x](https://a.example "t\\" onmouseover=\\"alert(1)")',
        "[x]: javascript:alert(1)\n\n[x]",
        "<svg/onload=alert(1)>",
        "<a href='javascript:alert(1)'>x</a>",
        "```<img src=x onerror=alert(1)>\ncode\n```",
        "| <script>alert(1)</script> |\n|---|\n| <b onclick=alert(1)> |",
    ],
)
def test_markdown_makes_nothing_that_runs_or_loads(attack: str) -> None:
    tags = re.findall(r"<(\w+)([^>]*)>", as_html(attack))
    assert {tag for tag, _ in tags} <= {"p", "a", "pre", "code", "table", "thead", "tbody", "tr", "th", "td", "br"}
    for tag, attributes in tags:
        assert not re.search(r"\son\w+=\"|style=", re.sub(r'="[^"]*"', '=""', attributes)), attributes
        if tag == "a":
            assert re.match(r' href="(https?://|mailto:|#)', attributes)
            assert 'rel="noopener noreferrer nofollow"' in attributes


def test_markdown_is_drawn_and_what_is_very_long_is_not() -> None:
    assert as_html("**a** `b`\nc") == "<p><strong>a</strong> <code>b</code><br />\nc</p>\n"
    assert as_html("- a\n- b").count("<li>") == 2
    assert as_html("[x](https://a.example)") == (
        '<p><a href="https://a.example" rel="noopener noreferrer nofollow" target="_blank">x</a></p>\n'
    )
    assert "<em>" not in as_html("*a* <b>" * LONGEST)
    assert "<b>" not in as_html("*a* <b>" * LONGEST)
    assert len(as_html("[" * 5000 + "](x" * 5000)) < 100_000  # nested without end


SQL = "'; DROP TABLE judgements; -- \" OR 1=1"


def test_sql_in_any_field_is_text(browser: Browser, store: Store) -> None:
    kim = browser(f"kim {SQL}"[:80], admin=True)
    row = {"prompt": SQL, "responses": [SQL, "b"], "origins": [SQL, "b"], "category": SQL}
    with store.session() as session:
        found = exchange.find_items("rows", [(1, row)], kind=None, policies=("a", "b"), how=SQL)
        exchange.add_items(session, found, axes=[SQL])
    assert log_in(kim, SQL, SQL).status_code == 401
    assert log_in(kim, "' OR '1'='1", PASSWORD).status_code == 401
    assert kim.judge(client_id="client-1", item=SQL[:32], ranks=[1, 2], scores={SQL: [1, 2]}).status_code == 404
    sent = kim.judge(client_id=SQL, ranks=[1, 2], scores={SQL: [1, 2]}, comment=SQL)
    assert sent.status_code == 200, sent.text
    assert kim.submit(f"/judgements/1 OR 1=1{SQL}/undo").status_code in (404, 422)
    for field in ("kind", "overlap", "first", "second", "how", "axes", "name", "artifact", "known"):
        answer = kim.post("/admin/import", params={field: SQL}, content=b"{}\n", headers={"X-CSRF-Token": kim.token()})
        assert answer.status_code in (404, 422), field
    with store.session() as session:
        judgement = session.scalars(select(Judgement)).one()
        assert (judgement.comment, judgement.client_id, judgement.scores) == (SQL, SQL, {SQL: [1, 2]})
        assert session.scalar(select(func.count(Annotator.id))) == 1
        found = exchange.find_items(
            "rows", [(1, {"prompt": SQL, "response": SQL})], kind="write", policies=("a", "b"), how=""
        )
        exchange.add_items(session, found)
    written = {"verdict": "written", "ranks": None, "written": SQL}
    assert kim.judge("write", client_id="client-write", **written).status_code == 200
    with store.session() as session:
        assert session.scalars(select(Judgement.written).order_by(Judgement.id)).all() == [None, SQL]


@pytest.mark.parametrize(
    "name",
    ["../secret.jsonl", "evaluate/../../secret.jsonl", "/etc/passwd", "{folder}/secret.jsonl", "evaluate\\..\\x",
     "..%2fsecret.jsonl", "evaluate/answers.jsonl\0", "./evaluate/answers.jsonl", "hub:evil/rows", "evaluate", ".",
     "notes.txt"],
)  # fmt: skip
def test_no_path_that_was_sent_is_opened(browser: Browser, store: Store, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "artifacts"
    (folder / "evaluate").mkdir(parents=True)
    line = '{"prompt": "Secret?", "responses": ["a", "b"]}\n'
    for file in (tmp_path / "secret.jsonl", folder / "evaluate" / "answers.jsonl", folder / "notes.txt"):
        file.write_text(line)
    app = create_app(store, secret=SECRET, artifacts=folder)
    admin = Person(app, base_url="http://127.0.0.1", client=("127.0.0.1", 50000))
    headers = {"X-CSRF-Token": admin.token()}
    sent = admin.post("/admin/import", params={"artifact": name.replace("{folder}", str(tmp_path))}, headers=headers)
    assert sent.status_code == 404
    with store.session() as session:
        assert session.scalar(select(func.count(Item.id))) == 0
    offered = re.findall(r"<option>(\S+jsonl)</option>", admin.get("/admin").text)
    assert offered == ["evaluate/answers.jsonl"]
    sent = admin.post("/admin/import", params={"artifact": offered[0]}, headers=headers)
    assert sent.json() == {"message": "Added 1 to rank."}


# ---- nothing lost


def test_on_a_full_disk_nothing_is_lost_and_nothing_comes_twice(browser: Browser, store: Store, items: None) -> None:
    kim = browser("kim")
    ticket, token = kim.item(), kim.token()
    body = {"client_id": "client-1", "item": ticket, "verdict": "ranked", "ranks": [1, 2, 3], "seconds": 1}
    body["comment"] = "ä" * 4000  # more than is free in any page of the file
    full = [True]

    def limit(connection: object, *_: object) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0] if full[0] else 2**30  # type: ignore[attr-defined]
        connection.execute(f"PRAGMA max_page_count = {pages}")  # type: ignore[attr-defined]

    event.listen(store.engine, "checkout", limit)
    for _ in range(2):
        refused = kim.post("/judgements", json=body, headers={"X-CSRF-Token": token})
        assert refused.status_code == 503
        assert "full" in refused.json()["detail"]
    with store.session() as session:
        assert session.scalar(select(func.count(Judgement.id))) == 0
    full[0] = False
    told = [kim.post("/judgements", json=body, headers={"X-CSRF-Token": token}).json()["new"] for _ in range(2)]
    assert told == [True, False]
    with store.session() as session:
        assert session.scalar(text("PRAGMA integrity_check")) == "ok"
        assert session.scalars(select(Judgement)).one().comment == body["comment"].strip()


def test_two_who_ask_in_one_moment_do_not_take_the_same_last_place(browser: Browser, store: Store, items: None) -> None:
    with store.session() as session:
        for item in session.scalars(select(Item)):
            item.overlap = 1
    people = [browser(f"person {number}") for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        shown = list(pool.map(Person.item, people))
    assert len(set(shown)) == 6
