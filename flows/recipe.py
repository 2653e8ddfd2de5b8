"""Runs a recipe (recipes/<name>.yaml over params.yaml) in a workspace of its own, so that the project stays as it is.

The workspace, .rlhf/<name>, holds copies of the code, the data and the parameters, and its own DVC cache. A
recipe is a small, complete run: for a first look, and for the tests.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from rlhf_core.config import Params
from rlhf_core.errors import MissingArtifact, RLHFError
from tasks.pipeline import LOCK, apply_overrides, apply_recipe, workspace_lock
from tasks.stage import write_text

CODE = ("rlhf_core", "tasks", "data/starter", "data/red_team", "recipes")
FILES = ("dvc.yaml", ".dvcignore", "constitution.yaml")
# What stages and rounds write in a workspace, and so is never brought from the project.
OUTPUTS = ("artifacts", "data/prepared", "data/feedback", "data/comparisons.json", "data/people", "metrics", "plots",
           ".rlhf")  # fmt: skip
STATES = ("campaign.json", "sweep.json")  # written last; a recipe's workspace has none
MAKING = ".rlhf/making"  # stands while a workspace of these is made


def make_workspace(recipe: str, folder: Path, *, project: Path) -> Params:
    """Bring the recipe's workspace up to date with the project; what it computed before stays and is reused.

    Raises:
        MissingArtifact: there is no such recipe; names those that there are.
        ResourceError: a run works in it, and would find other code under its feet.
    """
    find_recipe(recipe, project)
    with workspace_lock(folder):
        discard_unfinished(folder)
        copy_code(folder, project)
        init_dvc(folder)
        params = first_params(recipe, (), folder, project=project)
        copy_named(params, folder, project)
        make_base(params, folder)
    return params


def first_params(recipe: str | None, overrides: Sequence[str], folder: Path, *, project: Path) -> Params:
    """Put the project's params.yaml into a folder, with a recipe's values and overrides on top; returns the whole.

    Raises:
        MissingArtifact: there is no such recipe.
        ConfigError: a value is impossible.
    """
    source = find_recipe(recipe, project) if recipe else None
    shutil.copy(project / "params.yaml", folder)
    if source:
        apply_recipe(source, root=folder)
    return apply_overrides(overrides, root=folder)


def take_new_keys(params: Path, project: Path) -> None:
    """Give a workspace's parameters the keys that the code has come to ask for since, with the project's values.

    All other values stay. Without this a campaign that began before a key was could not go on.
    """
    ours = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
    try:
        values = yaml.safe_load(params.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return  # whoever loads it says what is wrong
    if not isinstance(values, dict):
        return
    new = []
    for name, section in ours.items():
        have = values.setdefault(name, {}) if isinstance(section, dict) else None
        if isinstance(have, dict):
            missing = {key: value for key, value in section.items() if key not in have}
            have |= missing
            new += [f"{name}.{key} = {value!r}" for key, value in missing.items()]
    if new:
        write_text(params, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        print(f"{params} is older than {', '.join(new)}; it has that now, as the project's params.yaml.", flush=True)


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """Make a campaign's or a sweep's workspace, which ends with its state; one that is cut off is made anew next time.

    Whoever makes it holds its lock.
    """
    discard_unfinished(folder)
    (folder / MAKING).touch()
    yield
    (folder / MAKING).unlink()


def is_unfinished(folder: Path) -> bool:
    """Whether the making of a campaign's or a sweep's workspace was cut off here: what lies in it is nobody's work."""
    return (folder / MAKING).is_file() and not any((folder / state).is_file() for state in STATES)


def discard_unfinished(folder: Path) -> None:
    """Remove what was left by a making that was cut off; the mark goes last, the lock stays."""
    if not is_unfinished(folder):
        return
    for path in (*folder.iterdir(), *(folder / ".rlhf").iterdir()):
        if path in (folder / ".rlhf", folder / MAKING, folder / LOCK):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    (folder / MAKING).unlink()


def find_recipe(recipe: str, project: Path) -> Path:
    """The recipe's file; MissingArtifact names those that there are."""
    source = project / "recipes" / f"{recipe}.yaml"
    if not source.is_file():
        known = ", ".join(sorted(path.stem for path in (project / "recipes").glob("*.yaml"))) or "none"
        raise MissingArtifact(f"Found no recipes/{recipe}.yaml. Recipes here: {known}.")
    return source


def workspace_of(recipe: str | None, project: Path) -> Path:
    """The folder that a recipe has run in; the project's own without one.

    Raises:
        MissingArtifact: it has not run yet, or there is no such recipe.
    """
    if not recipe:
        return project
    folder = project / ".rlhf" / recipe
    if not (folder / "params.yaml").is_file():
        find_recipe(recipe, project)
        raise MissingArtifact(f"Found no workspace .rlhf/{recipe}. Run `rlhf run --recipe {recipe}` first.")
    return folder


def copy_code(folder: Path, project: Path) -> None:
    """The code that stages run and the data that ships, as the project has them now."""
    for name in CODE:
        shutil.rmtree(folder / name, ignore_errors=True)
        if (project / name).is_dir():
            shutil.copytree(project / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(project / name, folder / name)
    # What people said of the project's answers is of no use here. The folder has to be there, and DVC warns of an empty
    # one.
    (folder / "data/people").mkdir(exist_ok=True)
    (folder / "data/people/README.md").write_text("What people said of held-out answers.\n", encoding="utf-8")


def copy_named(params: Params, folder: Path, project: Path) -> None:
    """A user's own files and folders, as the project has them now: those that params.yaml names or dvc.yaml watches."""
    prepare, judge = params.prepare, params.judge
    named = [*prepare.demonstrations, *prepare.rankings, *prepare.prompts, prepare.base.removeprefix("path:")]
    named += [params.sft.feedback, params.reward.feedback, params.constitution.principles]
    named += [judge.model] if judge.kind in ("local", "reward") else []
    stages = yaml.safe_load((project / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    named += [dep for stage in stages.values() for dep in stage.get("deps", [])]
    for name in sorted({name for name in named if name}):
        path = Path(name)  # hub: and wheel: are no files here
        if not is_own(path):
            continue
        if (project / path).is_dir():
            shutil.rmtree(folder / path, ignore_errors=True)
            shutil.copytree(project / path, folder / path)
        elif (project / path).is_file():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(project / path, folder / path)


def is_own(path: Path) -> bool:
    """Whether a path, as params.yaml names it, is of the user's making alone, and lies in the project."""
    here = not path.is_absolute() and ".." not in path.parts
    others = [Path(other) for other in (*CODE, *OUTPUTS)]
    return here and not any(path.is_relative_to(other) or other.is_relative_to(path) for other in others)


def init_dvc(folder: Path, *, cache: Path | None = None) -> None:
    """Make the folder a DVC repository, without git; with a cache of its own if none is given."""
    (folder / ".dvc" / "tmp").mkdir(parents=True, exist_ok=True)
    config = "[core]\n    analytics = false\n    check_update = false\n    no_scm = True\n"
    config += f"[cache]\n    dir = {cache}\n" if cache else ""
    (folder / ".dvc" / "config").write_text(config, encoding="utf-8")


def make_base(params: Params, folder: Path) -> None:
    """The random model that a recipe with base `path:` under .rlhf starts from."""
    kind, _, base = params.prepare.base.partition(":")
    if kind != "path" or not base.startswith(".rlhf/") or (folder / base / "config.json").is_file():
        return
    command = [sys.executable, "-m", "rlhf_core.tiny", base]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RLHFError(f"`python -m rlhf_core.tiny {base}` failed: {done.stderr.strip().splitlines()[-1:]}")
