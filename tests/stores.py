"""MLflow stores for tests: a new database takes seconds to make, so one is made and copied."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.tracking import ensure_database

PROJECT = Path(__file__).resolve().parents[1]


def make_by_two_processes(database: Path) -> list[subprocess.CompletedProcess[str]]:
    """Let two processes open the same new database at the same moment."""
    code = f"from tasks.tracking import connect; connect('sqlite:///{database}').search_experiments()"
    children = [
        subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, text=True, stderr=subprocess.PIPE) for _ in range(2)
    ]
    return [subprocess.CompletedProcess("", child.wait(), "", child.communicate()[1]) for child in children]


def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database that all tests of a session copy; the first one makes it."""
    return tmp_path_factory.getbasetemp() / "mlflow-template" / "mlflow.db"


def sqlite_store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of an empty store of a test's own."""
    database = template(tmp_path_factory)
    ensure_database(f"sqlite:///{database}")
    shutil.copytree(database.parent, folder, dirs_exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"
