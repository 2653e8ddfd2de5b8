"""tasks/lineage.py against a real DVC and git, in a toy repository of two stages."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from stores import PROJECT
from toy import dvc, init_dvc

from rlhf_core.errors import MissingArtifact
from tasks.lineage import (
    Workspace,
    dependency_hashes,
    find_revision,
    flat_metrics,
    flat_params,
    git_state,
    locked_key,
    metric_name,
    project_state,
    read_lock,
    save_experiment,
    stage_key,
)

# A stage notes the key that it computes while it runs: before dvc.lock says anything about it.
SCRIPT = f"""
import json, pathlib, sys
sys.path.insert(0, {str(PROJECT)!r})
from tasks.lineage import stage_key
stage, upstream = sys.argv[1:]
pathlib.Path(f".rlhf-{{stage}}-key").write_text(stage_key(stage))
for folder in ("metrics", "plots", f"artifacts/{{stage}}/deep"):
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
pathlib.Path(f"artifacts/{{stage}}/deep/out.txt").write_text(stage)
pathlib.Path(f"artifacts/{{stage}}/out.txt").write_text(stage + "2")
pathlib.Path(f"metrics/{{stage}}.json").write_text(json.dumps({{"score": 0.5, "name": "x", "sft": {{"reward": 1}}}}))
pathlib.Path(f"plots/{{stage}}.csv").write_text("step\\n")
"""


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two stages that have not run, nothing committed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    for name, value in {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}.items():
        monkeypatch.setenv(name, value)
    for variable in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(variable, "t@t")
    (tmp_path / "stage.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").write_text("{}\n")
    (tmp_path / "data/b.jsonl").write_text("{}\n{}\n")
    params = {
        "launcher": "python",
        "sft": {"seed": 0, "rate": 1e-4},
        "ppo": {"kl_coef": 0.05},
        "prepare": {"system": ""},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    stages = {
        stage: {
            "cmd": f"${{launcher}} stage.py {stage} {upstream}",
            "deps": ["stage.py", upstream],
            "params": [stage, "prepare.system"],
            "outs": [f"artifacts/{stage}"],
            "metrics": [{f"metrics/{stage}.json": {"cache": False}}],
            "plots": [f"plots/{stage}.csv"],
        }
        for stage, upstream in (("sft", "data"), ("ppo", "artifacts/sft"))
    }
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    (tmp_path / ".gitignore").write_text("/artifacts/\n/plots/\n/.rlhf*\n")
    subprocess.run(["git", "init", "--quiet"], check=True)
    init_dvc(tmp_path)
    (tmp_path / ".dvc/config").write_text("[core]\n    analytics = false\n")
    (tmp_path / ".dvc/.gitignore").write_text("/tmp\n/cache\n")
    return tmp_path


def commit_all() -> None:
    subprocess.run(["git", "add", "--all"], check=True)
    subprocess.run(["git", "commit", "--quiet", "--message", "all"], check=True)


def set_param(repo: Path, section: str, key: str, value: object) -> None:
    params = yaml.safe_load((repo / "params.yaml").read_text())
    params[section][key] = value
    (repo / "params.yaml").write_text(yaml.safe_dump(params))


def test_the_key_inside_the_running_stage_is_the_run_cache_folder(repo: Path) -> None:
    dvc(repo, "repro", "--quiet")
    kept = {path.name for path in (repo / ".dvc/cache/runs").glob("*/*")}
    inside = {(repo / f".rlhf-{stage}-key").read_text() for stage in ("sft", "ppo")}
    assert inside == kept == {stage_key("sft"), stage_key("ppo")} == {locked_key("sft"), locked_key("ppo")}


def test_hashes_are_those_of_dvc_lock(repo: Path) -> None:
    dvc(repo, "repro", "--quiet")
    lock = read_lock((repo / "dvc.lock").read_text())
    workspace = Workspace()
    for stage in ("sft", "ppo"):
        assert dependency_hashes(stage) == {dep["path"]: dep["md5"] for dep in lock[stage]["deps"]}
        for out in lock[stage]["outs"]:
            assert workspace.path_hash(out["path"]) == out["md5"]
    assert dependency_hashes("sft")["data"].endswith(".dir")


def test_the_key_follows_what_the_stage_reads_and_nothing_else(repo: Path) -> None:
    before = stage_key("sft")
    set_param(repo, "ppo", "kl_coef", 0.2)
    assert stage_key("sft") == before
    set_param(repo, "sft", "seed", 1)
    changed = stage_key("sft")
    assert changed != before
    (repo / "data/c.jsonl").write_text("{}\n")
    assert stage_key("sft") not in (changed, before)


def test_a_stage_whose_input_is_missing_has_no_key(repo: Path) -> None:
    with pytest.raises(FileNotFoundError, match="artifacts/sft"):
        stage_key("ppo")


def test_what_is_out_of_date_is_left_out_of_the_state(repo: Path) -> None:
    dvc(repo, "repro", "--quiet")
    assert list(Workspace().current()) == ["sft", "ppo"]
    set_param(repo, "ppo", "kl_coef", 0.2)
    state = project_state()
    assert list(state["run_keys"]) == ["sft"]
    assert state["metrics"] == {"sft/score": 0.5, "sft/reward": 1.0}
    assert state["params"]["ppo.kl_coef"] == "0.2"
    assert set(state["dependencies"]) == {"stage.py", "data"}


def test_the_state_of_a_revision_and_of_an_experiment(repo: Path) -> None:
    dvc(repo, "repro", "--quiet")
    commit_all()
    dvc(repo, "exp", "run", "--quiet", "--name", "more-kl", "--set-param", "ppo.kl_coef=0.3")
    subprocess.run(["git", "checkout", "--quiet", "--", "."], check=True)
    state = project_state(rev="HEAD")
    assert (state["params"]["ppo.kl_coef"], state["metrics"]["ppo/score"]) == ("0.05", 0.5)
    assert state["run_keys"] == {stage: locked_key(stage) for stage in ("sft", "ppo")}
    other = project_state(rev="more-kl")
    assert other["params"]["ppo.kl_coef"] == "0.3"
    assert other["run_keys"]["sft"] == state["run_keys"]["sft"]
    assert other["run_keys"]["ppo"] != state["run_keys"]["ppo"]
    with pytest.raises(MissingArtifact, match="nowhere is no git revision"):
        project_state(rev="nowhere")
    assert find_revision("nowhere") is None


def test_what_another_workspace_ran_becomes_an_experiment(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert save_experiment("early", repo, root=repo) is None  # nothing is committed
    commit_all()
    other = tmp_path_factory.mktemp("other")
    for name in ("stage.py", "dvc.yaml", "params.yaml"):
        shutil.copy(repo / name, other)
    shutil.copytree(repo / "data", other / "data")
    init_dvc(other)
    config = f"[core]\n    analytics = false\n    no_scm = True\n[cache]\n    dir = {repo / '.dvc/cache'}\n"
    (other / ".dvc/config").write_text(config)
    set_param(other, "ppo", "kl_coef", 0.3)
    dvc(other, "repro", "--quiet")
    (repo / "stage.py").write_text(SCRIPT + "# being worked on\n", encoding="utf-8")
    before = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    commit = save_experiment("point--0.3", other, root=repo)
    assert commit == find_revision("point--0.3")
    assert save_experiment("point--0.3", other, root=repo) == commit  # nothing has changed
    after = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    assert before == after == " M stage.py\n"
    shown = subprocess.run(["git", "show", f"{commit}:stage.py"], capture_output=True, text=True, check=True).stdout
    assert shown.endswith("# being worked on\n")
    state = project_state(rev="point--0.3")
    assert (state["params"]["ppo.kl_coef"], state["metrics"]["ppo/score"]) == ("0.3", 0.5)
    assert "point--0.3" in dvc(repo, "exp", "list", "--name-only").split()
    (repo / "stage.py").write_text(SCRIPT, encoding="utf-8")
    dvc(repo, "exp", "apply", "point--0.3")
    assert yaml.safe_load((repo / "params.yaml").read_text())["ppo"]["kl_coef"] == 0.3
    assert (repo / "artifacts/ppo/out.txt").read_text() == "ppo2"  # from the cache that they share


def test_results_of_a_run_do_not_make_the_code_dirty(repo: Path) -> None:
    assert git_state()[0] == ""
    dvc(repo, "repro", "--quiet")
    commit_all()
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert git_state() == (head, False)
    (repo / "metrics/sft.json").write_text("{}")
    (repo / "dvc.lock").write_text("")
    assert git_state() == (head, False)
    (repo / "stage.py").write_text("")
    assert git_state() == (head, True)


def test_no_git_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state() == ("", False)


def test_dvc_is_only_read(repo: Path) -> None:
    """A key can be asked for while another process holds DVC's locks, and it leaves none behind."""
    (repo / ".dvc/tmp/rwlock").write_text(json.dumps({str(repo / "data"): {"write": {"pid": 1, "cmd": "dvc repro"}}}))
    code = f"""
import sys, zc.lockfile
lock = zc.lockfile.LockFile({str(repo / ".dvc/tmp/lock")!r})
from tasks.lineage import stage_key
print(stage_key("sft"))
"""
    asked = subprocess.run(
        [sys.executable, "-c", code], cwd=repo, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(PROJECT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert asked.stdout.strip() == stage_key("sft"), asked.stderr


def test_names_are_flat_and_fit_every_store() -> None:
    assert flat_params({"ppo": {"kl_coef": 0.05, "on": True, "files": ["a"]}, "launcher": "python"}) == {
        "ppo.kl_coef": "0.05",
        "ppo.on": "true",
        "ppo.files": '["a"]',
        "launcher": "python",
    }
    values = {"base": {"reward": 1, "answers": "x"}, "evaluate": {"kl": 2.0}, "passed": True}
    assert flat_metrics(values, "evaluate") == {
        "evaluate/base/reward": 1.0,
        "evaluate/kl": 2.0,
        "evaluate/passed": 1.0,
    }
    assert metric_name("/ppo/reward@5 (%)/") == "ppo/reward_5____"
