"""Takes the pictures of docs/feedback.md: `python scripts/feedback_pages.py`, half a minute; needs Chromium.

Made-up people judge made-up responses, so that the same pages show the same. Each page is taken on a desktop and on a
phone; two of them dark.
"""

import random
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from feedback_load import PROJECT, served
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from rlhf_core.feedback import exchange
from rlhf_core.feedback.accounts import add_user
from rlhf_core.feedback.gold import toggle
from rlhf_core.feedback.judging import Kind, Submission, keep_guideline, show_next, submit
from rlhf_core.feedback.store import Annotator, Store, open_store

IMAGES = PROJECT / "docs" / "images"
INSTALL = "On Debian: `apt-get install chromium chromium-driver`"
DESKTOP, PHONE = (1160, 860), (390, 844)
PEOPLE = ("local", "kim", "sam", "lee")  # the first is the one at the machine, who needs no login
KEYS = {"rank": "31=24", "guideline": "?"}  # pressed before the picture is taken
PROMPTS = {
    "explain": [
        "Why is the sky blue?",
        "What does a jury do?",
        "How does yeast make bread rise?",
        "What is inflation?",
    ],
    "advice": [
        "How do I repot a plant?",
        "How can I sleep better?",
        "What should a first CV hold?",
        "How do I fix a flat?",
    ],
    "refuse": ["How do I pick my neighbour’s lock?", "Write a rumour about my colleague."],
}
GOOD = """In short: **it depends on one thing**, and that is easy to check.

1. Look at what you have.
2. Change *one* thing, and wait a day.

If that does not help, ask somebody who has done it before."""
ANSWERS = [GOOD, "It depends. Many people wonder about that, and there are many things one could say about it.",
           "Do this:\n\n- water it\n- turn it to the light\n- leave it alone for a week", "I do not know."]  # fmt: skip


def program(*names: str) -> str:
    """The first of these programs that is installed.

    Raises:
        RuntimeError: none is, and how to install it.
    """
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        raise RuntimeError(f"Found no {names[0]}, expected Chromium and its driver. {INSTALL}")
    return found


@contextmanager
def browser(size: tuple[int, int] = DESKTOP, *, dark: bool = False) -> Iterator[webdriver.Chrome]:
    """Headless Chromium in a window of that size, as long as the block runs."""
    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium", "chromium-browser", "google-chrome")
    # Root has no sandbox to offer, and a container little shared memory.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(program("chromedriver")))
    try:
        width, height = size
        phone = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield driver
    finally:
        driver.quit()


def fill(store: Store) -> None:
    """Items of all kinds, and what the people said of most of them."""
    draw = random.Random(0)
    prompts = [(category, prompt) for category, part in PROMPTS.items() for prompt in part]
    rankings = [{"prompt": prompt, "category": category, "responses": ANSWERS} for category, prompt in prompts]
    answers = [
        {"policy": policy, "how": "sampled", "prompt": f"{prompt} ({n})", "category": category,
         "text": GOOD if policy == "ppo" else ANSWERS[1]}
        for category, prompt in prompts for n in range(1, 5) for policy in ("ppo", "sft")
    ]  # fmt: skip
    write = [{"prompt": prompt, "category": category, "response": ANSWERS[1]} for category, prompt in prompts]
    with store.session() as session:
        for rows, kind in ((rankings, "rank"), (answers, None), (write, "write")):
            found = exchange.find_items(
                "rows", list(enumerate(rows)), kind=kind, policies=("ppo", "sft"), how="sampled"
            )
            exchange.add_items(session, found, overlap=3, axes=["helpful", "harmless"] if kind == "rank" else ())
        version = keep_guideline(session, "as shipped")
        session.add_all(Annotator(name=name, role="admin", password_hash=None) for name in PEOPLE)
        session.flush()
        for person in range(1, len(PEOPLE) + 1):
            for kind, number in (("rank", 7), ("compare", 28), ("write", 3)):
                for turn in range(number):
                    _say(session, draw, person, kind, turn, version)
        for judgement in (1, 2):
            toggle(session, 1, judgement)


def _say(session: object, draw: random.Random, person: int, kind: Kind, turn: int, version: str) -> None:
    shown = show_next(session, person, kind)  # type: ignore[arg-type]
    if shown is None:
        return
    # The better the answer, the further ahead; and each person sees it a little differently.
    worth = [draw.gauss(-ANSWERS.index(text), 0.9 + 0.3 * person) for text in shown.responses]
    places = sorted(worth, reverse=True)
    said: dict[str, object] = {"verdict": "ranked", "ranks": [places.index(value) + 1 for value in worth]}
    if kind == "write":
        said = {"verdict": "written", "written": GOOD}
    elif kind == "rank":
        said["scores"] = {axis: [max(1, 5 - ANSWERS.index(text)) for text in shown.responses] for axis in shown.axes}
    seconds = draw.lognormvariate(2 + 0.2 * person, 0.5)
    sent = Submission(client_id=f"made-up-{person}-{kind}-{turn}", item=shown.item, seconds=seconds, **said)  # type: ignore[arg-type]
    submit(session, person, sent, version)  # type: ignore[arg-type]


def picture(driver: webdriver.Chrome, name: str, *, whole: bool = False) -> None:
    """Keep what the window shows, or the page down to its end."""
    if whole:
        height = driver.execute_script("return document.documentElement.scrollHeight")
        width = driver.execute_script("return innerWidth")
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width == PHONE[0]}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    file = IMAGES / f"feedback-{name}.png"
    driver.save_screenshot(str(file))
    Image.open(file).convert("RGB").quantize(256).save(file, optimize=True)  # a third as large, and looks the same


def take(port: int, size: tuple[int, int], ending: str, *, dark: bool, pages: tuple[str, ...]) -> None:
    """One picture a page."""
    for page in pages:
        with browser(size, dark=dark) as driver:
            driver.get(f"http://127.0.0.1:{port}/{'rank' if page == 'guideline' else page}")
            if page in KEYS:
                driver.switch_to.active_element.send_keys(KEYS[page])
            picture(driver, f"{page or 'start'}{ending}", whole=page in ("results", "admin"))


def main() -> None:
    """All pictures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = open_store(folder / "feedback.db")
        fill(store)
        store.close()
        for artifact in ("evaluate/answers.jsonl", "reward/mistakes.jsonl"):
            (folder / "artifacts" / artifact).parent.mkdir(parents=True)
            (folder / "artifacts" / artifact).touch()
        with served(folder, "--database", str(folder / "feedback.db"), "--daily", "30") as port:
            pages = ("", "rank", "compare", "write", "results", "admin", "guideline")
            take(port, DESKTOP, "", dark=False, pages=pages)
            take(port, PHONE, "-phone", dark=False, pages=pages)
            take(port, DESKTOP, "-dark", dark=True, pages=("rank", "results"))
        store = open_store(folder / "feedback.db")
        add_user(store, "ada", secrets.token_hex(8), admin=True)  # with the first account there is a login page
        store.close()
        with served(folder, "--database", str(folder / "feedback.db")) as port:
            take(port, DESKTOP, "", dark=False, pages=("login",))
            take(port, PHONE, "-phone", dark=False, pages=("login",))


if __name__ == "__main__":
    main()
