"""What a stage was computed from: DVC's run-cache key, dependency hashes, git commit.

The key is sha256 over a stage's command, dependency hashes, parameters and output paths. It joins DVC, MLflow and
Prefect: it is known inside the running stage before that ends, follows from dvc.lock afterwards, and names the folder
in .dvc/cache/runs/. DVC is only read here, and without its locks, which the running `dvc repro` may hold.
"""

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlhf_core.config import check_params
from rlhf_core.errors import ConfigError, MissingArtifact
from tasks.environment import workspace_root

# Written by the run itself, so their changes do not make the code dirty.
_WRITTEN_BY_RUNS = (":!dvc.lock", ":!metrics", ":!plots")


@dataclass(frozen=True)
class StageEntry:
    """A stage as it stands in the workspace now; the fields agree with what dvc.lock will say."""

    stage: str
    run_key: str
    dependencies: dict[str, str]  # path → DVC hash, of code, data and upstream outputs
    outputs: tuple[str, ...] = field(default=())


def entry_key(entry: Mapping[str, Any]) -> str:
    """DVC's run-cache key of a stage's entry in dvc.lock."""

    def without_sizes(value: Any) -> Any:
        if isinstance(value, list):
            return [without_sizes(item) for item in value]
        if isinstance(value, dict):
            return {key: without_sizes(item) for key, item in value.items() if key not in ("size", "nfiles")}
        return value

    keyed = without_sizes({**entry, "outs": [out["path"] for out in entry.get("outs", [])]})
    return hashlib.sha256(json.dumps(keyed, sort_keys=True).encode()).hexdigest()


def read_lock(text: str) -> dict[str, dict[str, Any]]:
    """The stages of a dvc.lock, given its text."""
    return dict((yaml.safe_load(text) or {}).get("stages", {}))


def entry_hashes(entry: Mapping[str, Any]) -> dict[str, str]:
    """path → hash of the dependencies in a stage's entry in dvc.lock."""
    return {dep["path"]: dep.get("md5", "") for dep in entry.get("deps", [])}


class Workspace:
    """Reads the stages of dvc.yaml as they stand now. One opened repository serves several questions."""

    def __init__(self, root: Path | None = None) -> None:
        from dvc.repo import Repo  # 0.3 s to import, so only where it is used

        self.root = root or workspace_root()
        self._repo = Repo(str(self.root))

    def stages(self) -> list[str]:
        """Stage names in the order of dvc.yaml."""
        return list(yaml.safe_load((self.root / "dvc.yaml").read_text(encoding="utf-8")).get("stages", {}))

    def entry(self, stage: str) -> StageEntry:
        """The stage's key and hashes; DVC's own state makes unchanged files cost a stat.

        Raises:
            FileNotFoundError: a dependency does not exist, as before an upstream stage has run.
        """
        from dvc.dependency.base import DependencyDoesNotExistError
        from dvc.stage.serialize import to_single_stage_lockfile

        loaded = self._repo.stage.load_one("dvc.yaml", name=stage)
        try:
            for dep in loaded.deps:
                dep.save()
        except DependencyDoesNotExistError as error:
            raise FileNotFoundError(str(error)) from error
        entry = json.loads(json.dumps(to_single_stage_lockfile(loaded)))
        outputs = tuple(out["path"] for out in entry.get("outs", []))
        return StageEntry(stage, entry_key(entry), entry_hashes(entry), outputs)

    def path_hash(self, path: str | Path) -> str:
        """The hash that DVC gives a file or folder: md5, with `.dir` behind it for a folder."""
        from dvc.fs import localfs
        from dvc_data.hashfile.build import build

        absolute = str((self.root / path).absolute())
        _, _, obj = build(self._repo.cache.local, absolute, localfs, "md5", dry_run=True)
        return str(obj.hash_info.value)

    def recorded(self, run_key: str) -> bool:
        """Whether DVC has the outputs of a run with this key, or a key that begins so: it was not lost on the way."""
        return any((Path(self._repo.stage_cache.cache_dir) / run_key[:2]).glob(f"{run_key}*"))

    def current(self) -> dict[str, StageEntry]:
        """The stages that are up to date: what dvc.lock says is what would be computed from the workspace."""
        lock_file = self.root / "dvc.lock"
        lock = read_lock(lock_file.read_text(encoding="utf-8")) if lock_file.is_file() else {}
        entries = {}
        for stage in self.stages():
            try:
                entry = self.entry(stage)
            except FileNotFoundError:
                continue
            if stage in lock and entry_key(lock[stage]) == entry.run_key:
                entries[stage] = entry
        return entries


def stage_key(stage: str, root: Path | None = None) -> str:
    """DVC's run-cache key of a stage from the present dvc.yaml, params.yaml and dependency files."""
    return Workspace(root).entry(stage).run_key


def locked_key(stage: str, root: Path | None = None) -> str:
    """DVC's run-cache key of a stage from its entry in dvc.lock; KeyError where the stage never ran."""
    return entry_key(read_lock(((root or workspace_root()) / "dvc.lock").read_text(encoding="utf-8"))[stage])


def dependency_hashes(stage: str, root: Path | None = None) -> dict[str, str]:
    """path → DVC hash of everything a stage reads."""
    return Workspace(root).entry(stage).dependencies


def git(*arguments: str, root: Path | None = None, **environment: str) -> str | None:
    """What a git command prints, stripped; None where it fails or git is missing."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root or workspace_root(), env={**os.environ, **environment},
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def git_state(root: Path | None = None) -> tuple[str, bool]:
    """The commit, "" where there is none, and whether tracked files differ from it other than by a run's results."""
    commit = git("rev-parse", "--verify", "HEAD", root=root) or ""
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *_WRITTEN_BY_RUNS, root=root)
    return commit, bool(changed)


# Names: the same in nested runs, in their parents and in comparisons


def metric_name(name: str) -> str:
    """A name that every MLflow store accepts: letters, digits and _ . / - only."""
    return re.sub(r"[^A-Za-z0-9_./\-]", "_", name).strip("/")[:250]


def flatten(values: Mapping[str, Any], prefix: str = "", *, separator: str = "/") -> dict[str, Any]:
    """Nested dicts as one: {"ppo": {"reward": 1}} → {"ppo/reward": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{separator}{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            flat.update(flatten(value, name, separator=separator))
        else:
            flat[name] = value
    return flat


def flat_params(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Parameters named `ppo.kl_coef`, as the strings that MLflow keeps."""
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in flatten(params, prefix, separator=".").items()
    }


def flat_metrics(values: Mapping[str, Any], stage: str) -> dict[str, float]:
    """Final metrics named `stage/…`; what is no number is left out."""
    numbers = {}
    for name, value in flatten(values).items():
        if isinstance(value, int | float):
            numbers[metric_name(name if name.startswith(f"{stage}/") else f"{stage}/{name}")] = float(value)
    return numbers


# The whole project at one moment


def project_state(workspace: Workspace | None = None, *, rev: str | None = None) -> dict[str, dict[str, Any]]:
    """All parameters, and final metrics, run keys and dependency hashes of the stages that are up to date.

    Args:
        workspace: where to read; the one around the current folder by default. What is out of date there is left out.
        rev: read this git revision or DVC experiment instead, and trust its dvc.lock.

    Raises:
        MissingArtifact: rev names no revision, or it holds no params.yaml.
    """
    state: dict[str, dict[str, Any]] = {"params": {}, "metrics": {}, "run_keys": {}, "dependencies": {}}
    if rev is None:
        workspace = workspace or Workspace()
        root = workspace.root
        for stage, entry in workspace.current().items():
            state["run_keys"][stage] = entry.run_key
            state["dependencies"].update(entry.dependencies)

        def read(path: str) -> str | None:
            return (root / path).read_text(encoding="utf-8") if (root / path).is_file() else None
    else:
        commit = find_revision(rev)
        if commit is None:
            raise MissingArtifact(f"{rev} is no git revision and no DVC experiment. `dvc exp show` lists them.")
        prefix = git("rev-parse", "--show-prefix") or ""

        def read(path: str) -> str | None:
            return git("show", f"{commit}:{prefix}{path}")

        for stage, locked in read_lock(read("dvc.lock") or "").items():
            state["run_keys"][stage] = entry_key(locked)
            state["dependencies"].update(entry_hashes(locked))
    params = yaml.safe_load(read("params.yaml") or "")
    if not isinstance(params, dict):
        raise MissingArtifact(f"{rev or 'The current folder'} holds no params.yaml.")
    with suppress(ConfigError):  # an older revision may have other keys; its values are shown as they stand
        params = check_params(params).model_dump(mode="json")
    state["params"] = flat_params(params)
    for stage in state["run_keys"]:
        if text := read(f"metrics/{stage}.json"):
            state["metrics"].update(flat_metrics(json.loads(text), stage))
    return state


def find_revision(name: str) -> str | None:
    """The commit that a git revision or the name of a DVC experiment stands for."""
    commit = git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    if commit:
        return commit
    refs = (git("for-each-ref", "--format=%(objectname) %(refname)", "refs/exps") or "").splitlines()
    return next((ref.split()[0] for ref in refs if ref.rsplit("/", 1)[-1] == name), None)


def save_experiment(name: str, results: Path, *, root: Path) -> str | None:
    """Make a DVC experiment of what another workspace ran with the same DVC cache; nothing is checked out.

    It is what `dvc exp save` would leave: a commit on HEAD under refs/exps, with the tracked files as they are now, and
    in their place the parameters, dvc.lock and metrics of the other workspace.

    Returns:
        Its commit; the one there is where nothing has changed; None where the project is no git repository.
    """
    head, prefix = git("rev-parse", "--verify", "HEAD", root=root), git("rev-parse", "--show-prefix", root=root)
    if not head or prefix is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder, "index"))}
        git("read-tree", "HEAD", root=root, **index)
        git("add", "--update", ".", root=root, **index)
        files = [results / "params.yaml", results / "dvc.lock", *sorted((results / "metrics").glob("*.json"))]
        for file in files:
            blob = git("hash-object", "-w", str(file.resolve()), root=root)
            place = f"{prefix}{file.relative_to(results).as_posix()}"
            git("update-index", "--add", "--cacheinfo", f"100644,{blob},{place}", root=root, **index)
        tree = git("write-tree", root=root, **index)
    ref = f"refs/exps/{head[:2]}/{head[2:]}/{name}"
    if not tree or git("rev-parse", "--verify", "--quiet", f"{ref}^{{tree}}", root=root) == tree:
        return git("rev-parse", "--verify", "--quiet", ref, root=root)
    who = {f"GIT_{role}_{field}": value for role in ("AUTHOR", "COMMITTER")
           for field, value in (("NAME", "rlhf"), ("EMAIL", "rlhf@localhost"))}  # fmt: skip
    commit = git("commit-tree", tree, "-p", head, "-m", f"dvc: commit experiment {name}", root=root, **who)
    if commit:
        git("update-ref", ref, commit, root=root)
    return commit
