"""Runs a recipe (recipes/<name>.yaml over params.yaml) in a workspace of its own, so that the project stays as it is.

The workspace, .rlhf/<name>, holds copies of the code, the starter data and the parameters, and its own DVC cache. A
recipe is a small, complete run: for a first look, and for the tests.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from rlhf_core.config import Params
from rlhf_core.errors import MissingArtifact, RLHFError
from tasks.pipeline import apply_recipe

CODE = ("rlhf_core", "tasks", "data/starter", "data/red_team", "recipes")
FILES = ("dvc.yaml", ".dvcignore", "constitution.yaml")


def make_workspace(recipe: str, folder: Path, *, project: Path) -> Params:
    """Bring the recipe's workspace up to date with the project; what it computed before stays and is reused.

    Raises:
        MissingArtifact: there is no such recipe; names those that there are.
    """
    source = find_recipe(recipe, project)
    copy_code(folder, project)
    shutil.copy(project / "params.yaml", folder)
    init_dvc(folder)
    params = apply_recipe(source, root=folder)
    make_base(params, folder)
    return params


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
