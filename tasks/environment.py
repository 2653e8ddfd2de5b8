"""Where the project lies, and every switch that keeps its tools quiet and offline: the one place for both.

Reads no parameter file and imports none of the tools, so it can run first and costs nothing.
"""

import os
import sys
from pathlib import Path

PUTS_BACK = "RLHF_PUTS_BACK"  # set for a stage where whoever started DVC brings back what DVC takes away
# A stage that has to stop waits for its step to end, where steps that are done would be lost.
STOP_PATIENCE_SECONDS = 15.0

# Set whatever the caller's shell says: nothing calls home. MLflow heeds "true" but not "1".
_NO_TELEMETRY = {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
}

# Defaults that a person may override in the shell.
_DEFAULTS = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what deterministic matrix products on a GPU ask for
    "GIT_PYTHON_REFRESH": "quiet",  # MLflow warns where git is missing
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",  # a `hub:` source that is not in the local cache needs HF_HUB_OFFLINE=0
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the tracker retries by itself, without holding a request open
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # 2 processes and 0.5 GB in place of 10 and 2.4 GB
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MPLBACKEND": "Agg",
    "TOKENIZERS_PARALLELISM": "false",
}


def prepare_environment() -> None:
    """Set the switches in this process and for its children; repeating it changes nothing."""
    os.environ.update(_NO_TELEMETRY)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    scripts = str(Path(sys.executable).parent)  # not resolved: in a virtual environment python is a link
    entries = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if entries[0] != scripts:
        os.environ["PATH"] = os.pathsep.join([scripts, *(entry for entry in entries if entry != scripts)])


def workspace_root() -> Path:
    """The folder whose dvc.yaml, params.yaml and outputs a stage works on: the nearest one upwards with a dvc.yaml."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "dvc.yaml").is_file()), here)


def project_root() -> Path:
    """The folder that keeps `.rlhf/`: DVC_ROOT, which names the repository in temporary workspaces too."""
    named = os.environ.get("DVC_ROOT")
    return Path(named).resolve() if named else workspace_root()


def state_folder() -> Path:
    """`.rlhf/` of the project, made if missing: all state that is neither git's nor DVC's."""
    folder = project_root() / ".rlhf"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def recipe_workspace(root: Path | None = None) -> tuple[Path, str] | None:
    """The project and the recipe's name, where root (this project if None) is a recipe's workspace, .rlhf/<recipe>."""
    root = root or project_root()
    return (root.parents[1], root.name) if root.parent.name == ".rlhf" else None


def project_of(root: Path) -> Path:
    """The project whose workspace this is; the folder itself where it is none."""
    workspace = recipe_workspace(root)
    return workspace[0] if workspace else root


def record_folder(root: Path | None = None) -> Path:
    """Where the databases of MLflow and Prefect lie; a recipe's runs stand beside the project's, whoever began them."""
    return project_of(root or project_root()) / ".rlhf"


def how_to_set(section: str, key: str, value: str) -> str:
    """What gives a key of params.yaml another value in the workspace at hand, for messages."""
    root = workspace_root()
    recipe = recipe_workspace(root)
    if (root / "campaign.yaml").is_file():  # of rounds or a constitution, which go on with what they began with
        return f"set `{key}: {value}` in section {section} of params.yaml and campaign.yaml in .rlhf/{root.name}"
    return f"`rlhf run{f' --recipe {recipe[1]}' if recipe else ''} -S {section}.{key}={value}`"
