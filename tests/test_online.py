"""Online rounds for real: stages through DVC in a flow that pauses for a person, is killed, scheduled and poisoned.

Three campaigns at once begin from one round 0 on a small random model that ends its turns: one of rounds by a rule, one
judged by a person over HTTP, and the same once more, killed in every phase. Minutes long: `make test-online`.
"""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import mean
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from person import Person
from small import write_llama
from toy import PROJECT, store

from flows.campaign import FEEDBACK, START, Campaign, begin_round
from flows.server import free_port
from rlhf_core.feedback.annotators import Item, rule
from rlhf_core.gate import pair_answers
from rlhf_core.statistics import outcome
from rlhf_core.tiny import make_tokenizer

pytestmark = [pytest.mark.online, pytest.mark.timeout(3000)]

CODE = ("flows", "tasks", "rlhf_core", "recipes", "data/starter")
FILES = ("dvc.yaml", "params.yaml", "constitution.yaml", ".dvcignore", "pyproject.toml")
# So that three rounds can be told to be better on 106 prompts: answers of about ten tokens that may become shorter,
# much judged, a reward model that mostly sees that, and a PPO that goes far in few updates.
SET = {
    "prepare.max_prompts": 0,
    "reward.members": 2,
    "reward.learning_rate": 0.002,
    "reward.epochs": 2,
    "reward.lora_layers": 3,
    "reward.lora_rank": 8,
    "reward.weights": "{rule: 3, human: 3, ai: 0.3}",
    "ppo.updates": 5,
    "ppo.rollouts": 64,
    "ppo.minibatch_size": 8,
    "ppo.micro_batch_size": 8,
    "ppo.learning_rate": 0.003,
    "ppo.kl_coef": 0.01,
    "ppo.response_tokens": 24,
    "dpo.epochs": 0,
    "evaluate.best_of_n": "[]",
    "evaluate.samples_per_prompt": 2,
    "evaluate.response_tokens": 24,
    "preferences.choose": "disagreement",
    "preferences.prompts": 96,
    "preferences.response_tokens": 24,
    "judge.kind": "rule",
    "judge.model": "short",
    "judge.bar": 0,
    "gate.max_perplexity_ratio": 100,
    "gate.min_predicted": 0.45,  # or the coin's round wins by what was judged before, which is replayed
    "gate.safety_kinds": "[]",  # the gold model, which the starter rankings taught, has no word in these
}
PATIENCE = 600.0  # seconds until a stage is at work, on a machine with other work
PHASES = ("preferences", "waiting", "reward", "ppo", "evaluate", "gate", "putting away")
AT_WORK = {  # a line of the log, by which a stage is known to compute
    "preferences": r"1 preferences +preferences +\d+/",
    "reward": r"1 reward +reward +\d+/",
    "ppo": r"1 ppo +ppo +\d+/",
    "evaluate": r"1 evaluate +evaluate +\d+/",
    "gate": r"1 gate +> python -m tasks.gate",
}
# `kill -9` by its own hand, in the middle of putting the round's folder together: it is a matter of milliseconds.
PUT_AWAY = """
import os, signal
import flows.campaign as campaign
def write(path, value, known=campaign.write_json):
    known(path, value)
    if path.name == "decision.json":
        os.kill(os.getpid(), signal.SIGKILL)
campaign.write_json = write
from flows.cli import main
main()
"""


class Place:
    """A project with its campaigns, and the `rlhf` that runs there."""

    def __init__(self, folder: Path, server: int, overrides: dict[str, Any]) -> None:
        self.folder, self.server, self.overrides = folder, server, overrides
        self.log = folder / "rlhf.log"
        self.ports: list[int] = []  # of the pages, by which its flow runs are told from those of other places

    def start(self, *words: str, code: str = "from flows.cli import main; main()") -> subprocess.Popen[bytes]:
        env = {**os.environ, "PYTHONPATH": str(self.folder), "MLFLOW_TRACKING_URI": store(self.folder)}
        env |= {"RLHF_MIN_FREE_GB": "0.5", "PREFECT_RUNNER_POLL_FREQUENCY": "1"}
        env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
        for name in ("DVC_ROOT", "PREFECT_API_URL"):
            env.pop(name, None)
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", code, *words], cwd=self.folder, env=env, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def online(self, *words: str, name: str, judge: str, **options: Any) -> subprocess.Popen[bytes]:
        overrides = [part for key, value in self.overrides.items() for part in ("-S", f"{key}={value}")]
        begun = ["--recipe", "tiny", *overrides, "-S", f"gate.judge={judge}"]
        return self.start("online", "run", name, *begun, *words, **options)

    def read(self, start: int = 0) -> str:
        return self.log.read_bytes()[start:].decode(errors="replace")

    def size(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def wait(self, process: subprocess.Popen[bytes], seconds: float = 3 * PATIENCE) -> None:
        assert process.wait(timeout=seconds) == 0, self.read()[-4000:]

    def until(self, pattern: str, process: subprocess.Popen[bytes], *, since: int, seconds: float = PATIENCE) -> None:
        """Return once the log has a line like that, while the process works."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.read(since)):
            assert process.poll() is None, f"ended without {pattern!r}: {self.read(since)[-4000:]}"
            assert time.monotonic() < deadline, f"no {pattern!r} in time: {self.read(since)[-4000:]}"
            time.sleep(0.01)

    def campaign(self, name: str) -> Campaign:
        return Campaign(name, self.folder / ".rlhf" / name)

    def api(self, path: str, **body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(f"http://127.0.0.1:{self.server}/api/{path}", data, headers)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)

    def flow_runs(self) -> list[dict[str, Any]]:
        """Those in which a person judged here, in the order in which they began."""
        found = self.api("flow_runs/filter", flows={"name": {"any_": ["online"]}}, sort="START_TIME_ASC")
        return [run for run in found if run["parameters"]["waiting"]["port"] in self.ports]

    def copy(self, folder: Path) -> "Place":
        """All that was computed here, in another place."""
        shutil.copytree(self.folder, folder)
        for config in folder.glob(".rlhf/*/.dvc/config"):  # a cache of its own too: what one computes the other has not
            config.write_text(config.read_text().replace(str(self.folder), str(folder)))
        (folder / "rlhf.log").unlink()
        return Place(folder, self.server, self.overrides)


def judge(port: int, page: str, most: int = 1000) -> int:
    """Judge as somebody who likes an answer the better the fewer words it has, until the page shows nothing more."""
    person = Person(port)
    for number in range(most):
        item, texts = person.look(page)
        if not item:
            return number
        lengths = [len(text.split()) for text in texts]
        person.say(item, [1 + sum(other < length for other in lengths) for length in lengths])
    return most


def kill(process: subprocess.Popen[bytes], *, alone: bool = False) -> None:
    """-9 to the command and all below it, or to the command alone, as `kill -9` by hand does."""
    with suppress(psutil.NoSuchProcess):
        tree = [psutil.Process(process.pid)]
        tree += [] if alone else tree[0].children(recursive=True)
        for each in tree:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(tree, timeout=30)
    process.wait()


# ---- what is run, once


def rounds_by_a_rule(place: Place) -> dict[str, Any]:
    """Two rounds by the rule, a third by a judge on a schedule, and a fourth by a coin."""
    place.wait(place.online("--annotator", "rule:short", "--until", "2", name="short", judge="rule:short"))
    scheduled = serve_a_round(place)
    place.wait(place.online("--annotator", "rule:random", "--until", "4", name="short", judge="rule:short"))
    return {"scheduled": scheduled}


def serve_a_round(place: Place) -> dict[str, Any]:
    """`rlhf online serve`: wait until the schedule has runs, and let one begin now."""
    serving = place.start("online", "serve", "short", "--annotator", "judge", "--cron", "0 18 * * 5")
    try:

        def runs(kind: str) -> list[dict[str, Any]]:
            asked = {
                "flow_runs": {"state": {"type": {"any_": [kind]}}},
                "deployments": {"name": {"any_": ["short-served"]}},
            }
            return list(place.api("flow_runs/filter", **asked))

        waiting = poll(lambda: runs("SCHEDULED"))
        begun = place.api(f"deployments/{waiting[0]['deployment_id']}/create_flow_run", state={"type": "SCHEDULED"})
        ended = poll(lambda: [run for run in runs("COMPLETED") + runs("FAILED") if run["id"] == begun["id"]], PATIENCE)
        return {"times": [run["expected_start_time"] for run in waiting], "state": ended[0]["state"]}
    finally:
        serving.terminate()
        serving.wait(timeout=60)


def poll(ask: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        with suppress(OSError):
            if answer := ask():
                return answer
        assert time.monotonic() < deadline, "no answer in time"
        time.sleep(0.5)


def judged_by_a_person(place: Place) -> dict[str, Any]:
    """A round that nothing disturbs: ranked, and its policy compared with the one before."""
    port, since = free_port(), place.size()
    process = by_a_person(place, port)
    place.until("round 1 of people waits for people", process, since=since)
    paused = poll(lambda: [run for run in place.flow_runs() if run["state_type"] == "PAUSED"])[0]
    ranked = judge(port, "rank")
    place.until("the comparison of round 1 of people waits for people", process, since=since)
    compared = judge(port, "compare")
    place.wait(process)
    return {"paused": paused, "ranked": ranked, "compared": compared}


def killed_in_every_phase(place: Place) -> None:
    """The same round, killed with -9 in each phase; the same command goes on."""
    for phase in PHASES:
        port, since = free_port(), place.size()
        process = by_a_person(place, port, **({"code": PUT_AWAY} if phase == "putting away" else {}))
        if phase == "waiting":
            place.until("round 1 of people waits for people: 0 of", process, since=since)
            judge(port, "rank", most=5)
        elif phase == "reward":
            place.until("round 1 of people waits for people: 5 of", process, since=since)
            judge(port, "rank")
        elif phase == "gate":
            place.until("the comparison of round 1 of people waits for people", process, since=since)
            judge(port, "compare")
        if phase in AT_WORK:
            place.until(AT_WORK[phase], process, since=since)
        if phase == "putting away":
            assert process.wait(timeout=PATIENCE) == -signal.SIGKILL, place.read(since)[-4000:]
        else:
            kill(process, alone=phase == "ppo")
    place.wait(by_a_person(place, free_port()))


def by_a_person(place: Place, port: int, **options: Any) -> subprocess.Popen[bytes]:
    place.ports.append(port)
    return place.online("--port", str(port), "--until", "1", name="people", judge="people", **options)


@contextmanager
def prefects_server(folder: Path) -> Iterator[int]:
    """One for all, as `rlhf prefect-ui` serves it; those who look into its home find it."""
    port, place = free_port(), Place(folder, 0, {})
    server = place.start("prefect-ui", "--port", str(port))
    try:
        poll(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5).read())
        yield port
    finally:
        server.terminate()
        server.wait(timeout=60)


Ran = dict[str, tuple[Place, "Future[Any]"]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """What each of the three gave; who asks for one waits until it is over."""
    folder = tmp_path_factory.mktemp("online")
    for name in CODE:
        shutil.copytree(PROJECT / name, folder / "rule" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(PROJECT / name, folder / "rule")
    starter = [json.loads(line) for line in (PROJECT / "data/starter/demonstrations.jsonl").read_text().splitlines()]
    write_llama(
        folder / "base",
        make_tokenizer([text for row in starter for text in (row["prompt"], row["response"])]),
        ends=0.03,
    )
    os.environ["PREFECT_HOME"] = str(folder / "prefect")
    try:
        with prefects_server(folder / "rule") as server:
            place = Place(folder / "rule", server, {**SET, "prepare.base": f"path:{folder / 'base'}"})
            for name, judge in (("short", "rule:short"), ("people", "people")):  # what people judge tells whose it is:
                place.wait(place.online("--rounds", "0", name=name, judge=judge))  # the copies go on with one campaign
            works = {"rule": rounds_by_a_rule, "person": judged_by_a_person, "killed": killed_in_every_phase}
            places = {name: place if name == "rule" else place.copy(folder / name) for name in works}
            with ThreadPoolExecutor(len(works)) as pool:
                yield {name: (places[name], pool.submit(work, places[name])) for name, work in works.items()}
    finally:
        del os.environ["PREFECT_HOME"]


# ---- what came of it


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def locked(campaign: Campaign, number: int, stage: str, kind: str, path: str) -> str:
    """The hash that a round's dvc.lock has of what a stage read or wrote."""
    stages = yaml.safe_load((campaign.round_folder(number) / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    return str(next(one["md5"] for one in stages[stage][kind] if one["path"] == path))


def test_three_rounds_are_each_better_than_the_last_and_begin_from_it(ran: Ran) -> None:
    place, work = ran["rule"]
    work.result()
    campaign = place.campaign("short")
    decisions = campaign.decisions()[:4]
    assert [one["promoted"] for one in decisions] == [True] * 4
    assert [one["start"] for one in decisions] == [None, 0, 1, 2]
    found = [read(campaign.round_folder(number) / "metrics/gate.json") for number in (1, 2, 3)]
    assert all(0.5 < one["win_rate_low"] < one["win_rate"] for one in found)
    over_sft = [beats_sft(campaign, number) for number in range(4)]  # one opponent throughout
    assert over_sft == sorted(set(over_sft))
    lengths = [
        read(campaign.round_folder(number) / "metrics/evaluate.json")["ppo"]["response_length"] for number in range(4)
    ]
    assert lengths == sorted(lengths, reverse=True)
    for number in (1, 2, 3):  # by what DVC says the policy was that answered, and PPO went on from
        answered = locked(campaign, number, "preferences", "deps", "artifacts/start/ppo/policy")
        assert answered == locked(campaign, number - 1, "ppo", "outs", "artifacts/ppo/policy")
    gold = {(campaign.round_folder(n) / "reward/gold/adapter_model.safetensors").read_bytes() for n in range(4)}
    assert len(gold) == 1


def beats_sft(campaign: Campaign, number: int) -> float:
    """How often a round's policy beats the SFT policy, by the rule that taught it."""
    answers = rows(campaign.round_folder(number) / "answers.jsonl")
    pairs = pair_answers(answers, [{**row, "policy": "ppo"} for row in answers if row["policy"] == "sft"], "ppo")
    said = rule("short").judge([Item(pair.prompt, (pair.new, pair.current)) for pair in pairs])
    return mean(outcome(-new, -sft) for new, sft in (one.ranks for one in said))


def test_the_ensemble_chose_what_was_judged_and_learned_from_it(ran: Ran) -> None:
    place, work = ran["rule"]
    work.result()
    campaign = place.campaign("short")
    for number in (1, 2, 3):
        judged = rows(campaign.round_folder(number) / "feedback.jsonl")
        assert 40 < len(judged) <= 96
        assert {(row["source"], row["annotator"]) for row in judged} == {("rule", "short")}
        sources = read(campaign.round_folder(number) / "metrics/reward.json")["sources"]
        version = yaml.safe_load((campaign.round_folder(number) / "feedback.yaml").read_text())["outs"][0]["md5"]
        assert version == locked(campaign, number, "reward", "deps", FEEDBACK)
        assert sources["rule"] > (3 * 3 * 10 * number) / 2  # thrice, of those whose prompts are to train on
    assert (campaign.round_folder(3) / "reward/model").is_dir()


def test_a_scheduled_round_runs_under_serve_by_the_judge_of_the_parameters(ran: Ran) -> None:
    _, work = ran["rule"]
    scheduled = work.result()["scheduled"]
    assert all(time[10:16] == "T18:00" for time in scheduled["times"])
    assert scheduled["state"]["type"] == "COMPLETED"
    assert scheduled["state"]["message"] == "Round 3 is over; the current policy is that of round 3."


def test_a_round_of_poisoned_judgements_is_stopped_and_they_are_set_aside(ran: Ran) -> None:
    place, work = ran["rule"]
    work.result()
    campaign = place.campaign("short")
    decision = campaign.decisions()[4]
    assert (decision["promoted"], decision["start"]) == (False, 3)
    assert read(campaign.round_folder(4) / "metrics/gate.json")["predicted_low"] <= 0.45
    assert {row["annotator"] for row in rows(campaign.round_folder(4) / "feedback.jsonl")} == {"random-4"}
    assert "Round 4 is rejected, round 3's policy stays" in place.read()
    assert campaign.promoted() == 3
    assert begin_round(campaign) == 5
    assert [path.name for path in sorted((campaign.folder / FEEDBACK).iterdir())] == [f"00{n}.jsonl" for n in (1, 2, 3)]
    weights = "ppo/policy/adapter_model.safetensors"
    assert (campaign.folder / START / weights).read_bytes() == (campaign.round_folder(3) / weights).read_bytes()


def test_rounds_are_a_column_in_mlflow(ran: Ran) -> None:
    place, work = ran["rule"]
    work.result()
    client = MlflowClient(store(place.folder))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, "tags.`rlhf.campaign` = 'short'")
    assert {run.data.params["preferences.round"]: run.data.metrics["gate/win_rate"] > 0.5 for run in found if
            run.data.params["preferences.round"] != "0"} == {"1": True, "2": True, "3": True, "4": False}  # fmt: skip


def test_the_flow_is_paused_while_a_person_ranks_and_while_they_compare(ran: Ran) -> None:
    place, work = ran["person"]
    said = work.result()
    assert re.match(
        r"0 of \d+ judged for round 1 of people. Judge at http://127.0.0.1:", said["paused"]["state"]["message"]
    )
    [run] = place.flow_runs()
    states = place.api(f"flow_run_states/?flow_run_id={run['id']}")
    names = [state["name"] for state in sorted(states, key=lambda state: state["timestamp"])]
    assert [name for name, _ in itertools.groupby(names)][-5:] == [
        "Waiting for people", "Running", "Waiting for people", "Running", "Completed",
    ]  # fmt: skip
    campaign = place.campaign("people")
    judged = rows(campaign.round_folder(1) / "feedback.jsonl")
    assert said["ranked"] >= len(judged) > 10
    assert {(row["source"], row["annotator"], len(row["guideline"])) for row in judged} == {("human", "local", 12)}
    assert said["compared"] == len(read(campaign.round_folder(1) / "comparisons.json")) > 50


def test_the_gate_goes_by_what_people_said_where_it_is_told_to(ran: Ran) -> None:
    place, work = ran["person"]
    work.result()
    campaign = place.campaign("people")
    decision, gate = campaign.decisions()[1], read(campaign.round_folder(1) / "metrics/gate.json")
    assert gate["people"]["win_rate"] == gate["win_rate"]
    assert decision["promoted"] == (gate["win_rate_low"] > 0.5)
    assert decision["checks"][0]["words"].startswith("people prefers the new policy in")
    assert "1 person made " in (campaign.round_folder(1) / "gate.md").read_text()
    assert 0.2 < gate["people"]["new_first"] < 0.8
    assert "<h2>What people said</h2>" in (campaign.round_folder(1) / "report.html").read_text()


def test_killed_in_every_phase_a_round_ends_with_the_same_bytes(ran: Ran) -> None:
    for name in ("person", "killed"):
        ran[name][1].result()
    people, killed = ran["person"][0].campaign("people"), ran["killed"][0].campaign("people")
    assert left(killed) == left(people)
    assert "Going on after step" in ran["killed"][0].read()
    assert not list((killed.folder / "rounds").glob(".*"))


def left(campaign: Campaign) -> dict[str, Any]:
    """What a round left, by path: bytes, but for the times at which people judged and the round ended."""
    folder = campaign.round_folder(1)
    found: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    feedback = locked(campaign, 1, "reward", "deps", FEEDBACK)
    for name in ("dvc.lock", "feedback.yaml"):
        found[name] = found[name].replace(feedback.encode(), b"")
    found["decision.json"] = {key: value for key, value in read(folder / "decision.json").items() if key != "ended"}
    judged = rows(folder / "feedback.jsonl")
    found["feedback.jsonl"] = [{key: value for key, value in row.items() if key != "judged"} for row in judged]
    return found


def test_flow_runs_that_were_killed_are_told_from_those_alive(ran: Ran) -> None:
    place, work = ran["killed"]
    work.result()
    *lost, last = place.flow_runs()
    assert [run["state_type"] for run in lost] == ["CRASHED"] * len(PHASES)
    assert all("goes on where it was" in run["state"]["message"] for run in lost)
    assert last["state_type"] == "COMPLETED"
