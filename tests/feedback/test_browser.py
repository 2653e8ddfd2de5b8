"""The pages in Chromium, as a person at a keyboard, with a mouse or with a phone has them: `make test-browser`."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from people import PASSWORD
from sqlalchemy import select

from rlhf_core.feedback import exchange
from rlhf_core.feedback.accounts import add_user
from rlhf_core.feedback.store import Item, Judgement, Store, open_store

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import feedback_load
import feedback_pages
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]
SETTLED = 0.5  # seconds after which a new page takes answers, and a little more
SCRIPT = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
RESPONSES = [f"**One.** {SCRIPT}", "Two. [here](javascript:document.title='taken')", "Three.", "Four."]
RANKINGS = [{"prompt": f"Prompt {number} {SCRIPT}", "responses": RESPONSES} for number in range(11)]
ANSWERS = [
    {"policy": policy, "how": "sampled", "prompt": f"Question {number}?", "text": f"{policy} says."}
    for policy in ("sft", "ppo")
    for number in range(10)
]


class Site:
    """A server that can be killed and started again, and the person at its pages."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, feedback_load.free_port()
        self.database = folder / "feedback.db"
        self.server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.server = feedback_load.start(self.folder, self.port, "--database", str(self.database))

    def kill(self) -> None:
        assert self.server
        self.server.send_signal(signal.SIGKILL)
        self.server.wait()

    def add(self, rows: list[Any], *, kind: Any = None, **options: Any) -> None:
        store = open_store(self.database)
        with store.session() as session:
            lines = list(enumerate(rows))
            found = exchange.find_items("rows", lines, kind=kind, policies=("ppo", "sft"), how="sampled")
            exchange.add_items(session, found, **options)
        store.close()

    def add_people(self, *names: str) -> None:
        store = open_store(self.database)
        for name in names:
            add_user(store, name, PASSWORD, admin=True)
        store.close()

    def judgements(self) -> list[Judgement]:
        store: Store = open_store(self.database)
        with store.session() as session:
            session.expire_on_commit = False
            found = list(session.scalars(select(Judgement).order_by(Judgement.id)))
        store.close()
        return found


# What the driver says of an element whose page has just been replaced.
REPLACED = ("stale", "no such element", "javascript", "does not belong to the document")


class Hands:
    """What a person does at a browser."""

    def __init__(self, driver: Any, port: int) -> None:
        self.driver, self.port = driver, port

    def open(self, path: str) -> None:
        self.driver.get(f"http://127.0.0.1:{self.port}{path}")

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def press(self, *keys: str) -> None:
        """Keys alone, wherever the focus is."""
        for key in keys:
            if key[0] == Keys.CONTROL and len(key) > 1:
                chain = ActionChains(self.driver).key_down(Keys.CONTROL).send_keys(key[1:]).key_up(Keys.CONTROL)
            else:
                chain = ActionChains(self.driver).send_keys(key)
            chain.perform()

    def shown(self) -> str:
        return self.driver.execute_script("return document.getElementById('judge')?.dataset.item ?? null")

    def close_and_open_another(self) -> None:
        """Close the window; another one is open, on no page."""
        old = self.driver.current_window_handle
        self.driver.switch_to.new_window("window")
        new = self.driver.current_window_handle
        self.driver.switch_to.window(old)
        self.driver.close()
        self.driver.switch_to.window(new)

    def log_in(self, name: str) -> None:
        self.open("/login")
        self.press_and_go_on(name, Keys.TAB, PASSWORD, Keys.ENTER)

    def until(self, check: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                if found := check():
                    return found
            except Exception as error:  # the page is being replaced
                if not any(words in str(error) for words in REPLACED):
                    raise
            time.sleep(0.02)
        pytest.fail(f"waited for {what}; the page says: {self.find('body').text}")

    def press_and_go_on(self, *keys: str) -> None:
        """Press, once the page takes answers, and wait for the page that follows."""
        time.sleep(SETTLED)
        self.driver.execute_script("window.old = true")
        self.press(*keys)
        ready = "return !window.old && document.readyState === 'complete'"
        self.until(lambda: self.driver.execute_script(ready), "the next page")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    found = Site(tmp_path)
    yield found
    if found.server and found.server.poll() is None:
        found.kill()


@pytest.fixture
def hands(site: Site) -> Iterator[Hands]:
    with feedback_pages.browser() as driver:
        yield Hands(driver, site.port)


def test_a_person_judges_by_keys_alone_while_the_server_is_killed(site: Site, hands: Hands) -> None:
    site.add(RANKINGS)
    site.add(ANSWERS)
    site.add_people("kim")
    site.start()

    hands.open("/rank")
    assert hands.find("h1").text == "Log in"
    hands.log_in("kim")
    hands.open("/rank")

    for number in range(4):
        assert hands.find("#line").text.replace("\n", "") == "1234"  # nothing is placed yet
        hands.press("3", "1", "=", "2")
        assert hands.find("#said").get_property("textContent") == "3, then 1 and 2 tied; 1 more to place"
        hands.press_and_go_on("4", Keys.ENTER)
        assert len(site.judgements()) == number + 1

    site.kill()
    time.sleep(SETTLED)
    hands.press("2", "1", "3", "4", Keys.ENTER)
    hands.until(lambda: "waits on this device" in hands.find("#notice").text, "the page to say that it waits")
    hands.close_and_open_another()
    site.start()
    assert len(site.judgements()) == 4
    hands.open("/rank")  # it waited in the browser, and not in the page
    hands.until(lambda: len(site.judgements()) == 5, "the fifth judgement")
    hands.until(lambda: "yours 5" in hands.find(".progress").text, "the page after it")

    hands.press_and_go_on("u")  # undo: it comes back as it was answered
    assert hands.find("#said").get_property("textContent") == "2, then 1, then 3, then 4"
    hands.press_and_go_on(Keys.ENTER)
    for _ in range(3):
        hands.press_and_go_on("4", "3", "2", "1", Keys.ENTER)
    hands.press_and_go_on("n")  # none is acceptable
    hands.press("c", "all the same", Keys.ESCAPE)
    hands.press_and_go_on("1", "=", "2", "=", "3", "=", "4", Keys.ENTER)

    hands.open("/compare")
    for key in ("1", "2", "0", "-", "1", "1", Keys.ARROW_LEFT, Keys.ARROW_RIGHT, "2", "1"):
        hands.press_and_go_on(key)
    assert "Nothing is left for you" in hands.find("h1").text

    hands.open("/results")
    hands.until(lambda: "ppo against sft" in hands.find("main").text, "the results")
    assert "Win rate of ppo" in hands.find("main").text
    assert hands.driver.title == "Results · RLHF"  # and not taken

    judged = site.judgements()
    live = [one for one in judged if one.withdrawn_at is None]
    assert len(judged) == 21
    assert len({one.client_id for one in judged}) == 21
    assert len({one.item_id for one in live}) == len(live) == 20
    assert [one.verdict for one in live].count("none") == 2
    assert [one.comment for one in live if one.comment] == ["all the same"]


# As if the connection were cut behind a judgement: the server gets it, and its answer never arrives.
CUT = """
const whole = window.fetch;
window.fetch = async (...asked) => {
  await whole(...asked);
  window.fetch = whole;
  throw new TypeError("cut");
};
"""


def test_a_judgement_whose_answer_is_lost_is_sent_again_and_stored_once(site: Site, hands: Hands) -> None:
    site.add(ANSWERS)
    site.start()
    hands.open("/compare")
    time.sleep(SETTLED)
    hands.driver.execute_script(CUT)
    hands.press("1")
    hands.until(lambda: "waits on this device" in hands.find("#notice").text, "the page to say that it waits")
    assert len(site.judgements()) == 1  # it is stored, which the page does not know
    hands.until(lambda: "yours 1" in hands.find(".progress").text, "the page after it")
    time.sleep(SETTLED)
    hands.press_and_go_on("2")
    assert len(site.judgements()) == 2


def test_a_judgement_waits_on_the_page_where_the_browser_stores_nothing(site: Site, hands: Hands) -> None:
    site.add(ANSWERS)
    site.start()
    hands.open("/compare")
    hands.press_and_go_on("1")  # the box has held something before
    hands.driver.execute_script("Storage.prototype.setItem = () => { throw new DOMException('full'); }")
    site.kill()
    time.sleep(SETTLED)
    hands.press("2")
    hands.until(lambda: "leave the page open" in hands.find("#notice").text, "the page to say that it waits")
    site.start()
    hands.until(lambda: "yours 2" in hands.find(".progress").text, "the page after it")
    assert len(site.judgements()) == 2


class Stranger(BaseHTTPRequestHandler):
    """Says of everything that it is not here, as a proxy does while what is behind it is away."""

    def do_POST(self) -> None:
        self.send_response(404)
        self.end_headers()
        self.wfile.write(b'{"detail": "Not found."}')

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def test_a_refusal_by_another_server_loses_nothing(site: Site, hands: Hands) -> None:
    site.add(ANSWERS)
    site.start()
    hands.open("/compare")
    site.kill()
    with ThreadingHTTPServer(("127.0.0.1", site.port), Stranger) as stranger:
        threading.Thread(target=stranger.serve_forever, daemon=True).start()
        time.sleep(SETTLED)
        hands.press("1")
        hands.until(lambda: "waits on this device" in hands.find("#notice").text, "the page to say that it waits")
        stranger.shutdown()
    site.start()
    hands.until(lambda: "yours 1" in hands.find(".progress").text, "the page after it")
    assert len(site.judgements()) == 1


def test_the_guideline_and_skip_have_keys(site: Site, hands: Hands) -> None:
    site.add(RANKINGS[:2])
    site.add(ANSWERS[:1] + ANSWERS[10:11])
    site.add([{"prompt": "What is a key?"}], kind="write")
    site.start()
    for kind in ("rank", "compare", "write"):
        hands.open(f"/{kind}")
        time.sleep(SETTLED)  # or a key comes before the script that it is for
        hands.press(*([Keys.ESCAPE] if kind == "write" else []))  # out of the text
        for key in ("?", "g", "G"):
            hands.press(key)
            hands.until(lambda: hands.find("#guideline").get_property("open"), f"the guideline, by {key} on {kind}")
            hands.press("s", "1", "u", Keys.ESCAPE)  # while it is read nothing else is done
            assert not hands.find("#guideline").get_property("open")
        hands.press_and_go_on("s" if kind == "rank" else "S")
    assert [one.verdict for one in site.judgements()] == ["skipped"] * 3


def test_a_double_click_and_a_key_held_twice_answer_one_item(site: Site, hands: Hands) -> None:
    site.add(ANSWERS)
    site.start()
    hands.open("/compare")
    time.sleep(SETTLED)
    ActionChains(hands.driver).double_click(hands.find(".keys [data-key='1']")).perform()
    hands.until(lambda: "yours 1" in hands.find(".progress").text, "the first judgement")
    time.sleep(1)
    assert len(site.judgements()) == 1
    ActionChains(hands.driver).send_keys("22").perform()
    hands.until(lambda: "yours 2" in hands.find(".progress").text, "the second judgement")
    time.sleep(1)
    assert len(site.judgements()) == 2


def test_numbers_are_dragged_onto_the_line_and_onto_one_another(site: Site, hands: Hands) -> None:
    site.add(RANKINGS[:1])
    site.start()
    hands.open("/rank")

    def drag(what: str, onto: str, share: float) -> None:
        """Onto a place of an element: 0 is its left edge, 1 its right one."""
        target = hands.find(onto)
        across = int((share - 0.5) * target.rect["width"])
        chain = ActionChains(hands.driver, duration=20).click_and_hold(hands.find(what)).move_by_offset(12, 0)
        chain.move_to_element_with_offset(target, across, 0).release().perform()

    def said() -> str:
        return hands.find("#said").get_property("textContent")

    drag(".response[data-place='2'] kbd", "#line", 0.3)
    assert said() == "3; 3 more to place"
    drag(".loose [data-drag='0']", ".group", 0.05)
    assert said() == "1, then 3; 2 more to place"
    drag(".loose [data-drag='3']", ".group:has([data-drag='2'])", 0.5)
    drag(".loose [data-drag='1']", ".group:has([data-drag='0'])", 0.95)
    assert said() == "1, then 2, then 3 and 4 tied"
    drag(".group [data-drag='1']", ".group", 0.05)  # what is placed is moved
    drag(".group [data-drag='2']", ".prompt", 0.5)  # away from the line: nothing
    assert said() == "2, then 1, then 3 and 4 tied"
    hands.press_and_go_on(Keys.ENTER)
    [judgement] = site.judgements()
    assert [judgement.ranks[index] for index in judgement.presented] == [2, 1, 3, 3]


def test_scores_are_given_by_keys_after_the_ranks(site: Site, hands: Hands) -> None:
    site.add(RANKINGS[:1], axes=["helpful", "harmless"])
    site.start()
    hands.open("/rank")
    hands.press("1", "2", "3", "4", Keys.ENTER)
    assert "8 more to score" in hands.find("#notice").text
    hands.press(*"5544", "3", Keys.BACKSPACE, "2", *"321")
    hands.press_and_go_on(Keys.ENTER)
    [judgement] = site.judgements()
    by_page = {axis: [values[index] for index in judgement.presented] for axis, values in judgement.scores.items()}
    assert by_page == {"helpful": [5, 4, 2, 2], "harmless": [5, 4, 3, 1]}


def test_what_is_written_survives_a_closed_page_and_is_sent_by_keys(site: Site, hands: Hands) -> None:
    site.add([{"prompt": "What is a key?", "response": "A lok."}], kind="write")
    site.start()
    hands.open("/write")
    hands.press(Keys.BACKSPACE, Keys.BACKSPACE, "ck.")
    hands.open("/")
    hands.open("/write")
    assert hands.find("#written").get_property("value") == "A lock."
    hands.press_and_go_on(Keys.CONTROL + Keys.ENTER)
    assert [one.written for one in site.judgements()] == ["A lock."]
    hands.press_and_go_on("u")
    assert hands.find("#written").get_property("value") == "A lock."


def test_an_unfinished_text_is_its_writers_alone(site: Site, hands: Hands) -> None:
    site.add([{"prompt": "What is a key?", "response": "A lok."}], kind="write", overlap=2)
    site.add_people("kim", "sam")
    site.start()
    for name, expected in (("kim", "A lok."), ("sam", "A lok."), ("kim", "A lok. By kim.")):
        hands.log_in(name)
        hands.open("/write")
        assert hands.find("#written").get_property("value") == expected
        hands.press(f" By {name}.")
        hands.find(".who button").click()
        hands.until(lambda: hands.find("h1").text == "Log in", "the login page")


def test_results_move_while_people_judge(site: Site, hands: Hands) -> None:
    site.add(ANSWERS)
    site.start()
    hands.open("/results")
    assert "Nobody has judged" in hands.find("#live").text
    with feedback_pages.browser() as other:
        colleague = Hands(other, site.port)
        colleague.open("/compare")
        colleague.press_and_go_on("1")
    hands.until(lambda: "ppo against sft" in hands.find("#live").text, "the new judgement to be shown")


def test_an_admin_imports_an_artifact_and_marks_a_known_answer(site: Site, hands: Hands) -> None:
    (site.folder / "artifacts" / "evaluate").mkdir(parents=True)
    answers = "".join(json.dumps(row) + "\n" for row in ANSWERS)
    (site.folder / "artifacts" / "evaluate" / "answers.jsonl").write_text(answers)
    site.start()
    hands.open("/admin")
    hands.find("select[name=artifact]").send_keys("evaluate")
    hands.find("#import button").click()
    hands.until(lambda: "Added 10 to compare" in hands.find("#notice").text, "the import")
    hands.open("/compare")
    hands.press_and_go_on("1")
    hands.open("/admin")
    hands.find("[data-gold]").click()
    hands.until(lambda: hands.find("[data-gold]").text == "Known answer", "the mark")
    store = open_store(site.database)
    with store.session() as session:
        assert [item.gold for item in session.scalars(select(Item)) if item.gold_from] == [site.judgements()[0].ranks]
    store.close()


@pytest.mark.parametrize("size", [feedback_pages.DESKTOP, feedback_pages.PHONE], ids=["desktop", "phone"])
def test_every_control_has_a_name_and_no_page_is_wider_than_the_window(site: Site, size: tuple[int, int]) -> None:
    site.add(RANKINGS[:2], axes=["helpful"])
    site.add(ANSWERS)
    site.add([{"prompt": "What is a key?", "response": "A lok."}], kind="write")
    site.start()
    with feedback_pages.browser(size) as driver:
        hands = Hands(driver, site.port)
        for path in ("/", "/rank", "/compare", "/write", "/results", "/admin"):
            hands.open(path)
            for control in hands.all("a, button, input, select, textarea, progress"):
                if not control.rect["height"]:
                    continue  # in the guideline's dialog, which is closed
                assert control.accessible_name.strip(), f"{path}: {control.get_property('outerHTML')}"
            assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth"), path
            assert driver.title != "taken"
