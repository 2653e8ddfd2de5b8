"""Remakes constraints.txt: what pip chooses for pyproject.toml in an environment that holds nothing else.

Run it with `make lock`, look at the difference, and let `make test` judge: its flow and schedule tests are what tells
whether the new versions work together. `pip check` does not.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
OWN_TOOLS = ("pip", "setuptools", "wheel")
ELSEWHERE = ("async-timeout==5.0.1",)  # what a Python other than this one needs too: redis, below 3.11.3


def pins(frozen: str) -> list[str]:
    """Plain `name==version` lines from `pip freeze`: nothing of where a package came from or how torch was built."""
    lines = []
    for line in frozen.splitlines():
        if line.startswith(("#", "-e ")):
            continue
        if " @ " in line:
            raise SystemExit(f"{line.split(' @ ')[0]} was not installed from a package index; expected name==version.")
        name, _, version = line.partition("==")
        if name.lower() not in OWN_TOOLS:
            lines.append(f"{name}=={re.sub(r'[+].*', '', version)}")
    have = {line.partition("==")[0].lower() for line in lines}
    return sorted(lines + [pin for pin in ELSEWHERE if pin.partition("==")[0] not in have], key=str.lower)


def main(target: Path) -> None:
    """Install into a fresh environment, and write what came."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "-e", f"{PROJECT}[dev]"], check=True)
        freeze = [python, "-m", "pip", "freeze", "--exclude-editable"]
        frozen = subprocess.run(freeze, check=True, capture_output=True, text=True).stdout
    target.write_text("\n".join(pins(frozen)) + "\n", encoding="utf-8")
    print(f"{target.name}: {len(pins(frozen))} packages")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PROJECT / "constraints.txt")
