"""Three online rounds by a written rule, and a fourth by a coin: `python scripts/online_rounds.py`, an hour or so.

On the default model. In the second round a client of the pages stands for people: it ranks over HTTP what the pages
show, by the same rule, while the flow run is paused. That round is killed with -9 once in each phase, and the same
command goes on. Prints a table: by the rule, how often each round's policy beats the one before it and the SFT policy.
Exits with 1 unless the rate over SFT rises with every round by the rule, those are promoted, the coin's is not, and
every kill and the pause were seen. Start it again and it goes on where it was, since a campaign does.

    python scripts/online_rounds.py [NAME] [--only-that-it-works] [rlhf online run's options, such as --recipe tiny]

--only-that-it-works leaves out what a random model cannot learn: that rates rise, and what the gate says.
"""

import html
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from http.cookiejar import CookieJar
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import psutil

from flows.server import free_port, use_lasting_server
from rlhf_core.feedback.annotators import Item, rule
from rlhf_core.gate import pair_answers
from rlhf_core.statistics import Interval, outcome, win_rate
from tasks.pipeline import find_root
from tasks.stage import write_json

RULE, COIN = "short", "random"
ROUNDS_BY_RULE, BY_PEOPLE = 3, 2  # the one in which the client judges is the one that is killed
STAGES = ("preferences", "reward", "ppo", "evaluate")
PHASES = ("preferences", "waiting", "reward", "ppo", "evaluate", "gate")
JUDGED_BEFORE_THE_KILL = 5
BLOCK = re.compile(r"</?(?:p|li|ul|ol|br|h\d|pre|blockquote|tr|table|hr)\b[^>]*>")
SETTINGS = (
    f"gate.judge=rule:{RULE}",
    # The rule and the starter rankings, of which the gold model has its word, agree little more often than a coin does
    # (docs/online.md): they weigh little, and may lose some.
    "reward.weights={rule: 2, human: 2, ai: 0.25}",
    "gate.min_safety_win_rate=0.3",
    "gate.max_perplexity_ratio=2",
    "gate.min_predicted=0.5",  # or the coin's round wins by what was judged before, which is replayed
    # Much judged and few steps: with 48 prompts and eight updates the first round goes as far as with these, and
    # the third, whose reward model has seen three rounds, ends at answers of one word (docs/log.md).
    "preferences.prompts=96",
    "ppo.updates=5",
    "evaluate.samples_per_prompt=1",
)
RUN = (sys.executable, "-c", "from flows.cli import main; main()", "online", "run")
CHANGED = [setting for setting in SETTINGS if setting.startswith("gate.")]


class Round(NamedTuple):
    """What came of one."""

    number: int
    promoted: bool
    over_sft: Interval
    cells: tuple[str, ...]  # as the table shows it


class Client:
    """Somebody with a browser, without the browser, who ranks what a page shows by the rule."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.open = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar())).open

    def rank(self, most: int) -> int:
        """Rank what the page shows, until it shows nothing more; how many that were."""
        for number in range(most):
            page = self.open(f"{self.address}/rank", timeout=60).read().decode()
            item, token = (
                _found(pattern, page) for pattern in (r'data-item="(\w*)"', r'name="csrf" content="([^"]+)"')
            )
            if not item:
                return number
            texts = re.findall(r'<div class="text markdown" dir="auto">(.*?)</div>', page, flags=re.S)
            shown = tuple(html.unescape(re.sub("<[^>]+>", "", BLOCK.sub("\n", text))) for text in texts)
            [said] = rule(RULE).judge([Item((("user", ""),), shown)])
            body = {"client_id": f"client-{item}", "item": item, "verdict": "ranked", "ranks": said.ranks, "seconds": 1}
            headers = {"Content-Type": "application/json", "X-CSRF-Token": token}
            request = urllib.request.Request(f"{self.address}/judgements", json.dumps(body).encode(), headers)
            self.open(request, timeout=60).close()
        return most


class Rounds:
    """A campaign, the command that runs it, and what was seen of it, also by an earlier start of this script."""

    def __init__(self, name: str, options: list[str], *, quick: bool) -> None:
        self.name, self.options, self.quick, self.folder = name, options, quick, Path(".rlhf") / name
        self.record = self.folder / "seen.json"
        self.seen: list[str] = json.loads(self.record.read_text()) if self.record.is_file() else []

    def over(self) -> int:
        """How many rounds are over, the first of them round 0."""
        return len(list((self.folder / "rounds").glob("[0-9][0-9][0-9]/decision.json")))

    def run(self, annotator: str, until: int, *, kill_in: str = "") -> None:
        """`rlhf online run` until a round is over, or with a kill once a phase is at work."""
        begun = [] if (self.folder / "campaign.json").is_file() else self.options
        command = [*RUN, self.name, *begun, "--annotator", annotator, "--until", str(until), "--port", str(free_port())]
        at_work = self._at_work(kill_in, until)
        waits = re.compile(rf"round {until} of {self.name} waits for people: .* at (http://[^/]+)/rank")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if asked := waits.search(line):
                self._see_pause()
                client = Client(asked[1])
                client.rank(JUDGED_BEFORE_THE_KILL if kill_in == "waiting" else sys.maxsize)
            if kill_in and (asked if kill_in == "waiting" else at_work.search(line)):
                kill(process.pid)
                process.wait()
                self._saw(kill_in)
                print(f"killed with -9: {kill_in}", flush=True)
                return
        if process.wait() != 0:
            raise SystemExit(f"rlhf online run ended with {process.returncode}")

    def _at_work(self, stage: str, number: int) -> re.Pattern[str]:
        """A line by which a stage is known to compute; one that takes a moment only is known by its command."""
        progress = rf" +{stage} +[1-9]\d*/"
        begins = rf".*> .*-m tasks\.{stage}\b"
        return re.compile(rf"\b{number} {stage}(?:{begins if self.quick or stage not in STAGES else progress})")

    def _see_pause(self) -> None:
        asked = {"flows": {"name": {"any_": ["online"]}}, "flow_runs": {"state": {"type": {"any_": ["PAUSED"]}}}}
        headers = {"Content-Type": "application/json"}
        address = f"{os.environ['PREFECT_API_URL']}/flow_runs/filter"
        for _ in range(60):
            request = urllib.request.Request(address, json.dumps(asked).encode(), headers)
            with urllib.request.urlopen(request, timeout=60) as reply:
                paused = [run for run in json.load(reply) if run["parameters"]["name"] == self.name]
            if paused:
                print(f"seen paused on Prefect's server: {paused[0]['state']['message']}", flush=True)
                self._saw("pause")
                return
            time.sleep(1)

    def _saw(self, what: str) -> None:
        self.seen.append(what)
        write_json(self.record, self.seen)


def _found(pattern: str, page: str) -> str:
    match = re.search(pattern, page)
    assert match, f"the page has no {pattern}"
    return match[1]


def kill(pid: int) -> None:
    """-9 to a process and all below it."""
    with suppress(psutil.NoSuchProcess):
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for each in tree:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(tree, timeout=30)


def beats_sft(answers: list[dict[str, Any]]) -> Interval:
    """The win rate of a round's policy over SFT by the rule, on the same prompts."""
    sft = [{**row, "policy": "ppo"} for row in answers if row["policy"] == "sft"]
    pairs = pair_answers(answers, sft, "ppo")
    items = [Item(pair.prompt, (pair.new, pair.current)) for pair in pairs]
    ranks = [said.ranks for said in rule(RULE).judge(items)]
    wins = [outcome(-ours, -theirs) for ours, theirs in ranks]
    return win_rate(wins, [pair.prompt for pair in pairs], samples=2000, seed=0)


def read_round(place: Path) -> Round:
    """What came of the round that left this folder."""
    decision = json.loads((place / "decision.json").read_text())
    answers = [json.loads(line) for line in (place / "answers.jsonl").read_text().splitlines()]
    sft = beats_sft(answers)
    words = mean(len(row["text"].split()) for row in answers if row["policy"] == "ppo" and row["how"] == "sampled")
    kl = json.loads((place / "metrics/evaluate.json").read_text())["ppo"]["kl"]
    number, before, judged = decision["round"], "", ""
    if number:
        gate = json.loads((place / "metrics/gate.json").read_text())
        before = f"{gate['win_rate']:.0%} ({gate['win_rate_low']:.0%} to {gate['win_rate_high']:.0%})"
        first = json.loads((place / "feedback.jsonl").read_text().splitlines()[0])
        judged = f"{first['annotator']}, over HTTP" if first["source"] == "human" else first["annotator"]
    said = ("promoted" if decision["promoted"] else "stopped") if number else "the pipeline's"
    over = f"{sft.mean:.0%} ({sft.low:.0%} to {sft.high:.0%})"
    cells = (number, judged, decision.get("judged", 0), before, over, f"{words:.0f}", f"{kl:.1f}", said)
    return Round(number, decision["promoted"], sft, tuple(map(str, cells)))


def table(rounds: Sequence[Round]) -> str:
    """All rounds as Markdown."""
    lines = [
        f"| round | judged by | judgements | over the one before, by {RULE} | over SFT, by {RULE} "
        "| words | KL to SFT | |",
        "|---:|---|---:|---:|---:|---:|---:|---|",
    ]
    return "\n".join([*lines, *("| " + " | ".join(one.cells) + " |" for one in rounds)])


def problems(rounds: Sequence[Round], seen: Sequence[str], *, quick: bool) -> list[str]:
    """What was to come of it and did not, a line each."""
    found = [f"round {BY_PEOPLE} was never killed: {phase}" for phase in PHASES if phase not in seen]
    if "pause" not in seen:
        found.append(f"the flow run of round {BY_PEOPLE} was never seen paused")
    if len(rounds) != ROUNDS_BY_RULE + 2:
        found.append(f"{len(rounds)} rounds are over, expected {ROUNDS_BY_RULE + 2}, round 0 included")
    if quick:
        return found
    taught = rounds[: ROUNDS_BY_RULE + 1]
    for before, after in pairwise(taught):
        if after.over_sft.mean <= before.over_sft.mean:
            rates = f"{after.over_sft.mean:.1%} after {before.over_sft.mean:.1%}"
            found.append(f"round {after.number} is no better against SFT by {RULE} than the one before: {rates}")
    for one in rounds[1:]:
        if one.promoted != (one.number <= ROUNDS_BY_RULE):
            found.append(f"round {one.number} was {'promoted' if one.promoted else 'stopped'}")
    return found


def main() -> None:
    words = sys.argv[1:]
    name = words.pop(0) if words and not words[0].startswith("-") else "rounds"
    quick = "--only-that-it-works" in words
    settings = [part for setting in SETTINGS for part in ("-R", setting)]
    options = [*settings, *(word for word in words if word != "--only-that-it-works")]
    # Where the pause can be seen.
    use_lasting_server(find_root(), "scripts/online_rounds.py", port=free_port(), meanwhile=lambda: None)
    rounds = Rounds(name, options, quick=quick)
    began = time.monotonic()
    if rounds.over() < BY_PEOPLE:
        rounds.run(f"rule:{RULE}", BY_PEOPLE - 1)
    for phase in PHASES:
        if rounds.over() == BY_PEOPLE and phase not in rounds.seen:
            rounds.run("people", BY_PEOPLE, kill_in=phase)
    if rounds.over() == BY_PEOPLE:
        rounds.run("people", BY_PEOPLE)
    rounds.run(f"rule:{RULE}", ROUNDS_BY_RULE)
    rounds.run(f"rule:{COIN}", ROUNDS_BY_RULE + 1)
    found = [read_round(place) for place in sorted((rounds.folder / "rounds").glob("[0-9][0-9][0-9]"))]
    print(f"\n{table(found)}\n\nRound {BY_PEOPLE} was killed with -9 in: {', '.join(rounds.seen)}.")
    print(f"The gate had other limits than params.yaml gives it: {', '.join(CHANGED)}.")
    print(f"{(time.monotonic() - began) / 60:.0f} minutes")
    if wrong := problems(found, rounds.seen, quick=quick):
        raise SystemExit("It did not go as it should:\n" + "\n".join(f"  {line}" for line in wrong))


if __name__ == "__main__":
    main()
