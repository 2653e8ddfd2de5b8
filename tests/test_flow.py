"""flows/rlhf.py: the real flow, Prefect's server, DVC and MLflow around a workspace of five scripts."""

import datetime
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from stores import sqlite_store
from test_pipeline import is_gone, wait_for
from toy import PROJECT, dvc, make_toy

from flows.results import alarms, markdown, table_rows
from flows.server import free_port
from rlhf_core.errors import ConfigError
from tasks.pipeline import STAGES, serving_lock
from tasks.stage import write_text


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_toy(tmp_path / "toy")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_store(folder / ".rlhf", tmp_path_factory))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    # Every test's servers share a database that stands already: making one takes four seconds.
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path_factory.getbasetemp() / "prefect"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return folder


def rlhf(folder: Path, *arguments: str, **kwargs: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "flows.cli", *arguments]
    env = {**os.environ, "PYTHONPATH": str(PROJECT), "COLUMNS": "200"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=env, text=True, stdout=pipe, stderr=pipe, **kwargs)


def recorded(folder: Path) -> list[dict[str, str]]:
    """Status and tags of the pipeline runs in MLflow, newest first."""
    code = """
        import json
        from tasks.tracking import connect, experiment_id
        client = connect()
        runs = client.search_runs([experiment_id(client)], "tags.`rlhf.kind` = 'pipeline'")
        print(json.dumps([{"status": run.info.status, **run.data.tags} for run in runs]))
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_a_flow_run_and_dvc_are_two_doors_to_one_pipeline(toy: Path) -> None:
    (toy / "behaviour/sft").write_text("crash")  # once; the retry goes through
    evaluate = {policy: {"reward": 0.5} for policy in ("base", "sft", "ppo")}
    (toy / "metrics").mkdir()
    (toy / "metrics/evaluate.json").write_text(json.dumps(evaluate))

    first = rlhf(toy, "run", "-S", "ppo.kl_coef=0.1", "--name", "low")
    out, log = first.communicate(timeout=120)
    assert first.returncode == 0, log
    for stage in STAGES:
        assert f"{stage:<8}  {stage} 1/1 steps  100 %" in log
        assert f"Completed('{stage} ran')" in log
    assert "ended by signal SIGKILL" in log
    assert "artifacts/evaluate/report.html" in out
    assert "0.50" in out
    assert "kl_coef: 0.1" in (toy / "params.yaml").read_text()
    assert "up to date" in dvc(toy, "status")
    [run] = recorded(toy)
    assert (run["status"], run["mlflow.runName"], run["rlhf.door"]) == ("FINISHED", "low", "flow")
    assert run["rlhf.flow_run_id"]

    again = rlhf(toy, "run")
    _, log = again.communicate(timeout=120)
    assert again.returncode == 0, log
    assert len([line for line in log.splitlines() if "Cached(" in line and "had nothing to do" in line]) == len(STAGES)


@pytest.mark.slow
def test_a_failing_stage_fails_the_flow_with_one_message(toy: Path) -> None:
    (toy / "behaviour/prepare").write_text("fail")
    failed = rlhf(toy, "run")
    out, log = failed.communicate(timeout=120)
    assert failed.returncode == 1
    assert log.splitlines()[-1] == (
        "Error: Stage prepare failed: Found 0 rows in train.jsonl, expected some. Run `rlhf stage prepare`."
    )
    assert "Traceback" not in out + log
    assert [run["status"] for run in recorded(toy)] == ["FAILED"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_flow_leaves_no_process_and_a_killed_run(toy: Path, number: signal.Signals) -> None:
    (toy / "behaviour/prepare").write_text("hang")
    running = rlhf(toy, "run")
    wait_for(toy / "hanging", seconds=60)
    second = rlhf(toy, "stage", "prepare")
    assert second.communicate(timeout=30)[1].startswith("Error: Another pipeline run works in")
    assert second.returncode == 1
    running.send_signal(number)
    began = time.monotonic()
    _, log = running.communicate(timeout=60)
    assert running.returncode != 0, log
    assert time.monotonic() - began < 20
    assert is_gone(int((toy / "hanging").read_text()))
    assert [run["status"] for run in recorded(toy)] == ["KILLED"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["serve", "-S", "ppo.kl_coeff=1"], "params.yaml: unknown key ppo.kl_coeff; did you mean ppo.kl_coef?"),
        (["serve", "--cron", "every night"], "Found --cron 'every night', expected minute, hour, day, month and week"),
        (["online", "serve", "--cron", "0 25 * * *"], "Found --cron '0 25 * * *', expected minute, hour, day, month"),
        (
            ["online", "serve", "--annotator", "robot"],
            "Found annotator 'robot', expected people, judge, ai or rule:NAME.",
        ),
        (["serve"], "rlhf/served is served already (process PID). Stop it with Ctrl-C there, or serve"),
        (["online", "serve", "weekly"], "online/weekly-served is served already (process PID). Stop it"),
    ],
)
def test_what_would_fail_every_night_is_told_at_once(toy: Path, command: list[str], message: str) -> None:
    before = (toy / "params.yaml").read_bytes()
    option = "--server-port" if "online" in command else "--port"
    port = free_port()
    with serving_lock(toy, "rlhf/served" if command == ["serve"] else "online/weekly-served"):
        told = refusal(toy, *command, option, str(port))
        assert told.startswith("Error: " + message.replace("PID", str(os.getpid())))
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5)  # no server is left behind
    assert (toy / "params.yaml").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(("command", "option"), [(["serve"], "--port"), (["online", "serve"], "--server-port")])
def test_another_projects_server_is_not_taken_for_ones_own(toy: Path, command: list[str], option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = refusal(toy, *command, option, str(port))
    assert said.startswith(f"Error: Cannot listen on 127.0.0.1:{port}")
    assert said.endswith(f"Choose another: `rlhf {' '.join(command)} {option} {port + 1}`")


def refusal(folder: Path, *arguments: str) -> str:
    """The one message that a command ends with."""
    refused = rlhf(folder, *arguments)
    try:
        out, log = refused.communicate(timeout=120)
    finally:
        refused.send_signal(signal.SIGINT)  # one that was not refused would serve on, and its server too
        refused.wait(timeout=60)
    assert refused.returncode == 1, log
    assert "Traceback" not in out + log
    return log.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_served_deployment_is_scheduled_runs_and_can_be_cancelled(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What breaks without a sound where fastapi or SQLAlchemy are newer than Prefect knows."""
    monkeypatch.setenv("PREFECT_RUNNER_POLL_FREQUENCY", "1")
    port = free_port()
    serving = rlhf(toy, "serve", "--cron", "0 3 * * *", "--port", str(port), start_new_session=True)
    try:
        scheduled = poll(lambda: api(port, "flow_runs/filter", flow_runs={"state": {"type": {"any_": ["SCHEDULED"]}}}))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ui-settings", timeout=20) as reply:
            assert json.load(reply)["api_url"] == "/api"  # its pages ask this server, and not one on port 4200
        times = [datetime.datetime.fromisoformat(run["expected_start_time"]) for run in scheduled]
        assert {(time.hour, time.minute) for time in times} == {(3, 0)}
        assert all(run["auto_scheduled"] for run in scheduled)
        deployment = scheduled[0]["deployment_id"]
        run = api(port, f"deployments/{deployment}/create_flow_run", parameters={"until": "sft"})
        done = poll(lambda: api(port, "flow_runs/filter", flow_runs={"id": {"any_": [run["id"]]}, "state": FINAL}))
        assert done[0]["state_type"] == "COMPLETED"
        assert [run["rlhf.flow_run_id"] for run in recorded(toy)] == [run["id"]]

        (toy / "behaviour/reward").write_text("hang")
        run = api(port, f"deployments/{deployment}/create_flow_run", parameters={})
        wait_for(toy / "hanging", seconds=60)
        api(port, f"flow_runs/{run['id']}/set_state", state={"type": "CANCELLING"})
        done = poll(lambda: api(port, "flow_runs/filter", flow_runs={"id": {"any_": [run["id"]]}, "state": FINAL}))
        assert done[0]["state_type"] == "CANCELLED"
        poll(lambda: is_gone(int((toy / "hanging").read_text())))
        poll(lambda: [each["status"] for each in recorded(toy)] == ["KILLED", "FINISHED"])
    finally:
        serving.send_signal(signal.SIGINT)
        serving.communicate(timeout=30)


FINAL = {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]}}


def api(port: int, path: str, **body: Any) -> Any:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/{path}", json.dumps(body).encode(), headers)
    for patience in (1, 2, 4, 8, 0):
        try:
            with urllib.request.urlopen(request, timeout=20) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:  # its database was busy
            if error.code != 503 or not patience:
                raise
            time.sleep(patience)


def poll(ask: Any, seconds: float = 60) -> Any:
    """The first non-empty answer; a server that does not answer yet is asked again."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if answer := ask():
                return answer
        except OSError:
            pass
        assert time.monotonic() < deadline, "no answer in time"
        time.sleep(0.3)


def test_the_flows_order_is_dvcs_graph() -> None:
    stages = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]
    assert tuple(stages) == STAGES
    written: set[str] = set()
    for name, stage in stages.items():
        assert stage["cmd"] == f"${{launcher}} -m tasks.{name}"
        parts = [part for kind in ("outs", "metrics", "plots") for part in stage.get(kind, [])]
        outs = {next(iter(part)) if isinstance(part, dict) else part for part in parts}
        for dep in stage["deps"]:
            if dep.startswith(("artifacts/", "metrics/", "plots/", "data/prepared")):
                of_it = (out for out in written if f"{out}/".startswith(f"{dep}/") or dep.startswith(f"{out}/"))
                assert any(of_it), f"{name}: {dep} comes later"
            else:
                assert (PROJECT / dep).exists(), f"{name} depends on {dep}, which is not there"
        written |= outs


def test_a_run_that_the_disk_refuses_leaves_params_as_they_are(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.rlhf import rlhf as flow

    before = (toy / "params.yaml").read_bytes()
    monkeypatch.chdir(toy)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setenv("RLHF_MIN_FREE_GB", "1e9")
    state = flow.fn(overrides=["ppo.kl_coef=0.1"])
    assert state.is_failed()
    assert "a stage needs 1e+09 GB" in state.message
    assert (toy / "params.yaml").read_bytes() == before


def test_the_form_shows_types_and_descriptions() -> None:
    from flows.rlhf import Stage
    from flows.rlhf import rlhf as flow

    assert get_args(Stage) == STAGES
    properties = flow.parameters.properties
    assert set(properties) == {"overrides", "until", "force", "fresh", "run_name", "retries", "stage_minutes", "people"}
    assert all(field["description"] and field["title"] for field in properties.values())
    assert flow.parameters.required == []


def test_prefect_yaml_schedules_flows_with_parameters_that_they_have() -> None:
    config = yaml.safe_load((PROJECT / "prefect.yaml").read_text())
    for deployment in config["deployments"]:
        path, name = deployment["entrypoint"].split(":")
        flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
        flow.validate_parameters(deployment["parameters"])
        assert set(deployment["parameters"]) <= set(flow.parameters.properties)
        assert deployment["work_pool"]["name"] == "training"
    crons = {one["name"]: [schedule["cron"] for schedule in one["schedules"]] for one in config["deployments"]}
    assert crons == {"nightly": ["0 3 * * *"], "rounds": ["0 18 * * 5"], "principles": []}
    text = (PROJECT / "prefect.yaml").read_text()
    (by_hand,) = (one for one in config["deployments"] if not one["schedules"])
    module = importlib.import_module("flows.constitution")
    assert f"prefect deployment run {module.constitution.name}/{by_hand['name']}" in text
    assert by_hand["parameters"]["until"] == module.STAGES[-1]


def test_the_form_of_online_rounds_shows_types_and_descriptions() -> None:
    from flows.online import Waiting, online

    properties = online.parameters.properties
    assert all(field["description"] and field["title"] for field in properties.values())
    assert online.parameters.required == []
    assert all(field.description and field.title for field in Waiting.model_fields.values())


def test_the_table_shows_what_is_there() -> None:
    evaluate = {
        "base": {"reward": 1.234},
        "sft": {"reward": 2.0},
        "ppo": {"reward": -3.0, "kl": 4.44, "perplexity": -0.04},
    }
    rows = {row[0]: row[1:] for row in table_rows(evaluate)}
    assert rows["reward"] == ("1.23", "2.00", "-3.00")
    assert rows["KL to SFT, nats a response"] == ("–", "–", "4.4")
    assert rows["perplexity of demonstrations"][2] == "0.0"  # and not -0.0
    assert "| reward | 1.23 | 2.00 | -3.00 |" in markdown(evaluate)
    assert [line for line in markdown(evaluate).splitlines() if line.startswith("| |")] == ["| | base | SFT | PPO |"]


def test_the_table_has_a_place_for_baselines_where_there_are_some() -> None:
    rates = dict.fromkeys(
        ("gold_win_rate", "gold_win_rate_low", "gold_win_rate_high", "length_controlled_win_rate", "longest_wins"), 0.5
    )
    evaluate = {
        "base": {"reward": 1.0},
        "sft": {"reward": 2.0},
        "ppo": {"reward": 4.0},
        "dpo": {"reward": 3.0},
        "ppo_vs_dpo": rates,
        "best_of_n": {"4": {"reward": 1.5, "gold_reward": 0.75, "kl": 0.636}},
    }
    assert table_rows(evaluate)[0] == ("reward", "1.00", "2.00", "3.00", "4.00")
    text = markdown(evaluate)
    assert "| | base | SFT | DPO | PPO |\n|---|---:|---:|---:|---:|\n| reward | 1.00 | 2.00 | 3.00 | 4.00 |" in text
    assert "- PPO against DPO: 50% of comparisons won" in text
    assert "- Best of 4 SFT answers by the reward model: reward 1.50, gold reward 0.75, KL to SFT at most 0.6" in text


def test_what_was_not_measured_is_a_dash_in_the_table_and_in_words() -> None:
    evaluate = {"ppo": {"reward": float("nan")}, "ppo_vs_sft": {"gold_win_rate": 0.5, "longest_wins": float("nan")}}
    evaluate["best_of_n"] = {"2": {"reward": 1.0}}
    text = markdown(evaluate)
    assert "| reward | – | – | – |" in text
    assert "- PPO against SFT: 50% of comparisons won (95 % interval – to –), length-controlled –; the longest" in text
    assert "reward 1.00, gold reward –, KL to SFT at most –" in text
    assert "nan" not in text


def test_what_a_judge_says_is_a_ranking_that_tells_who_and_how_sure() -> None:
    from rlhf_core.data import parse_ranking
    from rlhf_core.feedback.annotators import Item, Judgement, as_ranking
    from rlhf_core.feedback.pairs import Opinion, PairwiseJudge

    class Comparer:
        name = "ai-judge"

        def compare(self, looks):
            return [Opinion(0.9 if look.first == "good" else 0.2) for look in looks]

        def costs(self):
            return {}

    judge = PairwiseJudge(Comparer())
    [said] = judge.judge([Item((("user", "Q?"),), ("bad", "good"))])
    row = {"prompt": "Q?", "responses": ["bad", "good"], **as_ranking(said, judge)}
    assert (row["ranks"], row["source"], row["annotator"]) == ([2, 1], "ai", "ai-judge")
    assert row["confidence"] == pytest.approx(0.7)  # p = (0.2 + 1 - 0.9) / 2 = 0.15
    assert parse_ranking(row).source == "ai"
    assert "scores" not in row
    scored = as_ranking(Judgement((1, 2), {"reward": [0.5, 0.1]}), judge)
    assert parse_ranking({"prompt": "Q?", "responses": ["a", "b"], **scored}).scores == {"reward": [0.5, 0.1]}


@pytest.fixture
def campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A round under way whose gate asks people, with the answers of both policies; outside of a flow run."""
    import logging

    from flows import online
    from flows.campaign import ANSWERS, ITEMS, START, Campaign

    monkeypatch.setattr(online, "get_run_logger", lambda: logging.getLogger("online"))
    values = yaml.safe_load((PROJECT / "params.yaml").read_text())
    values["gate"]["judge"] = "people"
    write_text(tmp_path / "params.yaml", yaml.safe_dump(values))
    write_text(tmp_path / ITEMS, "")
    write_text(tmp_path / "campaign.json", json.dumps({"id": "0123456789"}))
    write_text(tmp_path / "rounds/000/decision.json", json.dumps({"round": 0, "promoted": True}))

    def begin(new: str, current: str) -> Campaign:
        for path, text in ((ANSWERS, new), (f"{START}/answers.jsonl", current)):
            row = {"policy": "ppo", "how": "sampled", "prompt": "Q?", "text": text, "tokens": 2, "stopped": True}
            write_text(tmp_path / path, json.dumps({**row, "gold_reward": 0.0}) + "\n")
        return Campaign("try", tmp_path)

    return begin


def test_people_are_not_asked_where_there_is_nothing_to_ask(campaign: Any) -> None:
    from flows.campaign import COMPARISONS
    from flows.online import Waiting, _compare, _judge

    round_1 = campaign("The same.", "The same.")
    with pytest.raises(ConfigError, match="No judgement of round 1 ranks anything"):
        _judge(round_1, 1, "people", Waiting(), "")
    _compare(round_1, 1, Waiting())
    assert json.loads((round_1.folder / COMPARISONS).read_text()) == []


def test_what_people_compared_stands_by_the_texts_that_the_gate_knows(
    campaign: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import online
    from flows.campaign import COMPARISONS
    from rlhf_core.feedback.accounts import local_admin
    from rlhf_core.feedback.exchange import add_items
    from rlhf_core.feedback.judging import keep_guideline
    from rlhf_core.feedback.store import Item, Judgement, open_store

    round_1 = campaign("Ne\0w.", "Old.")
    store = open_store(round_1.folder / "feedback.db")

    def judged(_: Any, items: list[Any], *__: Any, **___: Any) -> Any:
        with store.session() as session:
            add_items(session, items)
            version = keep_guideline(session, "Be kind.")
        who = local_admin(store)
        with store.session() as session:
            [item] = session.query(Item).all()
            said = {"verdict": "ranked", "ranks": [1, 2], "presented": [1, 0], "seconds": 1.0, "guideline": version}
            session.add(Judgement(client_id="client-1", annotator_id=who, item_id=item.id, **said))
        return online.Asked(store, [item.key() for item in items], round_1.folder / "mark")

    monkeypatch.setattr(online, "_wait", judged)
    online._compare(round_1, 1, online.Waiting())
    [row] = json.loads((round_1.folder / COMPARISONS).read_text())
    assert (row["prompt"], row["responses"], row["ranks"], row["first"]) == ("Q?", ["Ne\0w.", "Old."], [1, 2], 1)
    store.close()


def test_judgements_are_kept_where_the_pages_of_the_project_keep_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.people import Waiting, settle

    monkeypatch.setenv("RLHF_FEEDBACK_DATABASE", "judge.db")
    assert settle(Waiting(), tmp_path).database == str(tmp_path / "judge.db")
    other = Waiting(database="sqlite:///other.db")
    assert settle(other, tmp_path).database == f"sqlite:///{tmp_path / 'other.db'}"
    monkeypatch.delenv("RLHF_FEEDBACK_DATABASE")
    assert settle(Waiting(), tmp_path).database == str(tmp_path / ".rlhf/feedback.db")


def test_an_alarm_of_ppo_is_told_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "params.yaml").write_bytes((PROJECT / "params.yaml").read_bytes())
    assert alarms(tmp_path) == []  # there are no curves yet
    curves = tmp_path / "plots" / "ppo.csv"
    plain = [f"{update},{0.1 * update}" for update in range(1, 21)]
    curves.write_text("\n".join(["step,ppo/score", *plain]) + "\n")
    assert alarms(tmp_path) == []  # nothing was watched
    watched = [f"{line},{1 - 0.1 * update},0.0,0.0" for update, line in enumerate(plain)]
    curves.write_text("\n".join(["step,ppo/score,ppo/gold_score,ppo/repetition,ppo/alarm", *watched]) + "\n")
    first, second = alarms(tmp_path)
    assert first.startswith("Alarm for reward hacking at update 10: the reward rose from ")
    assert "since update 1 the gold score falls (1 → 0.1)" in first
    assert "update 20" in second
