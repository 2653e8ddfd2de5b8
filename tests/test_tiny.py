"""The tiny recipe end to end: real stages through a real `dvc repro`, what they leave, and that it can be repeated."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from html import escape
from pathlib import Path

import pytest
from mlflow import MlflowClient
from test_flow import api, poll
from toy import PROJECT, child_environment, store

from flows.recipe import make_workspace
from flows.server import free_port
from rlhf_core.config import load_params
from tasks.pipeline import STAGES, StageFailed, apply_overrides, run_stage
from tasks.stage import TIMINGS

pytestmark = pytest.mark.slow

POLICY_KEYS = {"reward", "gold_reward", "kl", "perplexity", "response_length", "eos_rate", "distinct_2"}
PAIR_KEYS = {"gold_win_rate", "gold_win_rate_low", "gold_win_rate_high", "length_controlled_win_rate", "longest_wins"}


def dvc(folder: Path, *arguments: str) -> str:
    env = child_environment(folder)
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_workspace("tiny", folder, project=PROJECT)
    dvc(folder, "repro")
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_stage_leaves_what_dvc_yaml_names(workspace: Path) -> None:
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    head = {"score.json", "score_head.safetensors"}
    expected = {
        "artifacts/sft/model": adapter,
        "artifacts/reward/model": adapter | head,
        "artifacts/reward/gold": adapter | head,
        "artifacts/ppo/policy": adapter,
        "artifacts/dpo/policy": adapter,
        "artifacts/ppo/value": head,  # on the policy's body
        "artifacts/evaluate": {"report.html", "answers.jsonl"},
        "metrics": {f"{stage}.json" for stage in STAGES},
    }
    for folder, names in expected.items():
        assert {path.name for path in (workspace / folder).iterdir()} - {".gitignore"} == names, folder
    mistakes = (workspace / "artifacts/reward/mistakes.jsonl").read_text().splitlines()
    found = json.loads((workspace / "metrics/reward.json").read_text())
    assert len(mistakes) == pytest.approx((1 - found["accuracy"]) * found["pairs"], abs=1)  # equal scores are none
    assert sum(kind["pairs"] for kind in found["accuracy_by_kind"].values()) == found["pairs"]
    kinds = ("demonstrations", "rankings", "prompts")
    splits = ("train", "validation", "test", "gold")
    prepared = {path.name for path in (workspace / "data/prepared").iterdir()}
    assert prepared == {f"{kind}_{split}.jsonl" for kind in kinds for split in splits}


def test_the_loops_take_the_steps_that_params_yaml_asks_for(workspace: Path) -> None:
    params = load_params(workspace / "params.yaml")
    train = len((workspace / "data/prepared/demonstrations_train.jsonl").read_text().splitlines())
    sft_steps = params.sft.epochs * -(-train // params.sft.batch_size)
    assert [row["step"] for row in rows(workspace / "plots/sft.csv")] == [str(step) for step in range(sft_steps + 1)]
    rankings = len((workspace / "data/prepared/rankings_train.jsonl").read_text().splitlines())
    dpo_steps = params.dpo.epochs * -(-rankings // params.dpo.batch_size)
    assert [row["step"] for row in rows(workspace / "plots/dpo.csv")] == [str(n + 1) for n in range(dpo_steps)]
    ppo = rows(workspace / "plots/ppo.csv")
    assert [row["step"] for row in ppo] == [str(update) for update in range(1, params.ppo.updates + 1)]
    assert not [name for name in ppo[0] if name.endswith("_per_second")]


def test_the_evaluation_has_its_fixed_names(workspace: Path) -> None:
    found = json.loads((workspace / "metrics/evaluate.json").read_text())
    assert all(set(found[policy]) >= POLICY_KEYS for policy in ("base", "sft", "ppo", "dpo"))
    pairs = ("ppo_vs_sft", "sft_vs_base", "dpo_vs_sft", "ppo_vs_dpo")
    assert all(set(found[pair]) >= PAIR_KEYS | {"prompts"} for pair in pairs)
    assert set(found["best_of_n"]) == {"2", "4"}
    assert found["sft"]["reward"] < found["best_of_n"]["2"]["reward"] < found["best_of_n"]["4"]["reward"]
    points = [row["point"] for row in rows(workspace / "plots/frontier.csv")]
    assert points[-6:] == ["base", "sft", "ppo", "dpo", "best of 2", "best of 4"]
    answers = (workspace / "artifacts/evaluate/answers.jsonl").read_text().splitlines()
    assert {json.loads(line)["policy"] for line in answers} == {"base", "sft", "ppo", "dpo"}
    assert found["sft"]["kl"] == 0.0
    reward = json.loads((workspace / "metrics/reward.json").read_text())
    assert set(reward) >= {"accuracy", "pairs", "ece", "ece_scaled", "longest_wins"}


def test_the_report_has_all_its_parts_and_the_prompts_asked_for(workspace: Path) -> None:
    page = (workspace / "artifacts/evaluate/report.html").read_text(encoding="utf-8")
    params = load_params(workspace / "params.yaml")
    for part in ("wins", "policies", "distance", "reward-model", "training", "answers", "method", "settings"):
        assert f'<section id="{part}"' in page
    for chart in ("Calibration", "Response lengths", "KL to SFT"):
        assert f"{chart}</h3>" in page
    assert page.count("<article") == params.evaluate.report_prompts
    told = [json.loads(line) for line in (workspace / "artifacts/evaluate/answers.jsonl").read_text().splitlines()]
    shown = [row for row in told if row["how"] == "greedy" and row["policy"] == "ppo"]
    assert sum(escape(row["prompt"]) in page for row in shown) == params.evaluate.report_prompts
    gold = [row["gold_reward"] for row in rows(workspace / "plots/frontier.csv") if row["point"].startswith("update")]
    watched = [number % params.ppo.watch_every == 0 for number in range(params.ppo.updates)]
    assert [value != "" for value in gold] == watched


def test_a_bare_repro_is_recorded_as_one_pipeline_run_with_a_nested_run_a_stage(workspace: Path) -> None:
    client = MlflowClient(store(workspace))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, filter_string="tags.`rlhf.kind` = 'stage'")
    first = {run.data.tags["rlhf.stage"]: run for run in sorted(found, key=lambda run: -run.info.start_time)}
    assert set(first) == set(STAGES)
    assert len({run.data.tags["mlflow.parentRunId"] for run in first.values()}) == 1
    for stage, run in first.items():
        assert run.info.status == "FINISHED"
        assert run.data.tags["rlhf.door"] == "dvc"
        key = run.data.tags["rlhf.run_key"]
        # DVC keeps no run-cache entry of a stage with an output that persists, which prepare has.
        assert stage == "prepare" or (workspace / ".dvc/cache/runs" / key[:2] / key).is_dir()
    assert "ppo/kl" in first["ppo"].data.metrics


def test_nothing_is_left_to_do(workspace: Path) -> None:
    assert "up to date" in dvc(workspace, "status")
    assert "Running stage" not in dvc(workspace, "repro")


@pytest.mark.thorough
def test_doing_it_again_gives_the_same_bytes(workspace: Path) -> None:
    before = (workspace / "dvc.lock").read_text()
    dvc(workspace, "repro", "--force")
    assert (workspace / "dvc.lock").read_text() == before


BAD = {
    "a malformed row": ("prepare", ["prepare.prompts=[data/starter/prompts.jsonl, data/starter/bad.jsonl]"], "line 1"),
    "an empty split": ("prepare", ["prepare.gold_fraction=0.000001"], "Split gold of rankings is empty"),
    "a prompt that is too long": ("prepare", ["prepare.max_prompt_tokens=16"], "16 at most"),
    "no base model": ("prepare", ["prepare.base=path:.rlhf/nowhere"], "nowhere"),
    "no disk": ("ppo", ["ppo.seed=5"], "a stage needs 1e.06 GB"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_and_leaves_everything_as_it_was(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    stage, overrides, message = BAD[case]

    def state() -> dict[str, bytes]:
        kept = [
            path
            for place in ("artifacts", "metrics", "plots", "data/prepared")
            for path in workspace.glob(f"{place}/**/*")
        ]
        return {str(path): path.read_bytes() for path in [workspace / "dvc.lock", *kept] if path.is_file()}

    before, params = state(), (workspace / "params.yaml").read_bytes()
    (workspace / "data/starter/bad.jsonl").write_text('{"prompt": ""}\n' if case == "a malformed row" else "")
    if case == "no disk":
        monkeypatch.setenv("RLHF_MIN_FREE_GB", "1000000")
    try:
        apply_overrides(overrides, root=workspace)
        env = {**child_environment(workspace), "RLHF_MIN_FREE_GB": os.environ.get("RLHF_MIN_FREE_GB", "0.5")}
        with pytest.raises(StageFailed, match=message) as error:
            run_stage(stage, root=workspace, env=env)
        assert "Traceback" not in str(error.value)
    finally:
        (workspace / "data/starter/bad.jsonl").unlink()
        (workspace / "params.yaml").write_bytes(params)
    assert state() == before
    assert "up to date" in dvc(workspace, "status")


def test_another_kl_coefficient_runs_ppo_and_what_hangs_on_it_only(workspace: Path) -> None:
    apply_overrides(["ppo.kl_coef=0.2"], root=workspace)
    ran = [line for line in dvc(workspace, "repro").splitlines() if line.startswith("Running stage")]
    assert ran == ["Running stage 'ppo':", "Running stage 'evaluate':", "Running stage 'people':"]


@pytest.mark.thorough
def test_without_baselines_their_stage_leaves_a_note_and_nothing_else_changes(workspace: Path) -> None:
    before = json.loads((workspace / "metrics/evaluate.json").read_text())
    apply_overrides(["dpo.epochs=0", "evaluate.best_of_n=[]"], root=workspace)
    ran = [line for line in dvc(workspace, "repro").splitlines() if line.startswith("Running stage")]
    assert ran == ["Running stage 'dpo':", "Running stage 'evaluate':", "Running stage 'people':"]
    assert "up to date" in dvc(workspace, "status")
    assert [path.name for path in (workspace / "artifacts/dpo/policy").iterdir()] == ["none.json"]
    assert (workspace / "plots/dpo.csv").read_text() == "step\n"
    after = json.loads((workspace / "metrics/evaluate.json").read_text())
    assert set(before) - set(after) == {"dpo", "dpo_vs_sft", "ppo_vs_dpo", "best_of_n"}
    for policy in ("base", "sft", "ppo"):
        assert {**after[policy], "greedy": 0} == pytest.approx({**before[policy], "greedy": 0}, rel=1e-4)
    shutil.rmtree(workspace / "artifacts/dpo")
    dvc(workspace, "checkout", "dpo")
    assert (workspace / "artifacts/dpo/policy/none.json").is_file()


def test_another_judge_runs_nothing_where_none_is_asked(workspace: Path) -> None:
    before = (workspace / "params.yaml").read_text()
    apply_overrides(["judge.kind=rule", "judge.model=reader", "judge.bar=0"], root=workspace)
    assert "ppo" not in dvc(workspace, "status")
    (workspace / "params.yaml").write_text(before)


@pytest.mark.thorough
def test_ppo_takes_the_judges_word_and_dvc_watches_the_judge_then(workspace: Path) -> None:
    judge = ["ppo.reward=judge", "judge.kind=rule", "judge.bar=0", "preferences.annotator=ai"]
    for model in ("short", "reader"):
        apply_overrides([*judge, f"judge.model={model}"], root=workspace)
        ran = [line for line in dvc(workspace, "repro").splitlines() if line.startswith("Running stage")]
        assert ran == ["Running stage 'ppo':", "Running stage 'evaluate':", "Running stage 'people':"]
        samples = (workspace / "artifacts/ppo/samples.jsonl").read_text().splitlines()
        assert {json.loads(line)["score"] for line in samples} <= {-1.0, 0.0, 1.0}
        assert "up to date" in dvc(workspace, "status")


def recorded(folder: Path) -> dict[str, tuple[set[str], set[str]]]:
    """Of the last pipeline run and each of its stages: the names of metrics and of tags, but for those of one door."""
    client = MlflowClient(store(folder))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (last,) = client.search_runs(experiments, "tags.`rlhf.kind` = 'pipeline'", max_results=1)
    stages = client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{last.info.run_id}'")
    assert {run.info.status for run in (last, *stages)} == {"FINISHED"}
    return {
        run.data.tags.get("rlhf.stage", "pipeline"): (
            {name for name in run.data.metrics if not name.endswith(TIMINGS)},
            {name for name in run.data.tags if name not in OF_A_FLOW},
        )
        for run in (last, *stages)
    }


OF_A_FLOW = {"rlhf.flow_run_id", "mlflow.source.git.commit", "rlhf.git_commit", "rlhf.git_dirty"}


@pytest.mark.thorough
@pytest.mark.timeout(900)  # three runs of seven stages, which take minutes each beside other work
def test_a_scheduled_run_and_one_by_hand_record_what_a_bare_repro_does(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    found = {}
    for door in ("dvc", "flow", "schedule"):
        folder = tmp_path_factory.mktemp(door)
        make_workspace("tiny", folder, project=PROJECT)
        env = {**child_environment(folder), "PREFECT_HOME": str(folder / "prefect"), "PYTHONPATH": str(PROJECT)}
        command = [sys.executable, "-m", "flows.cli"]
        if door == "dvc":
            dvc(folder, "repro")
        elif door == "flow":
            done = subprocess.run([*command, "run"], cwd=folder, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
        else:
            port = free_port()
            begun = [*command, "serve", "--cron", "* * * * *", "--port", str(port)]
            with (folder / "serve.log").open("w") as log:
                serving = subprocess.Popen(begun, cwd=folder, env=env, stdout=log, stderr=log)
            try:
                over = {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}}}
                run = poll(lambda port=port, over=over: api(port, "flow_runs/filter", flow_runs=over), seconds=400)[0]
                assert (run["auto_scheduled"], run["state_type"]) == (True, "COMPLETED")
            finally:
                serving.send_signal(signal.SIGINT)
                serving.wait(timeout=60)
        found[door] = recorded(folder)
    assert set(found["dvc"]) == {"pipeline", *STAGES}
    assert found["flow"] == found["dvc"]
    assert found["schedule"] == found["dvc"]
