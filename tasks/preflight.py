"""Says early what this machine lacks: Python, disk, memory.

The Makefile runs this file with whatever Python it finds, before anything is installed: the standard library only, and
no syntax that an old Python could not read.
"""

import contextlib
import os
import shutil
import sys

PYTHON = (3, 11)
GB, GIB = 1000**3, 1024**3
PACKAGES_DISK_GB = 4  # packages 3 (with torch for CPU), pip's cache of them 1
RUN_DISK_GB = 3  # a run's weights, again in DVC's cache, and its checkpoints; RLHF_MIN_FREE_GB overrides
MEMORY_GIB = 6  # the largest stage, PPO, on the default model


def problems(folder=".", install=False, light=False, python=None, disk=None, memory=None):
    """What is missing, one sentence each; nothing if all is well.

    Args:
        folder: where the project lies; its disk is looked at.
        install: what the installation needs, and a run after it. Memory is left to `rlhf run`, which knows the model.
        light: what recipes and tests need, whose models are small: memory is not looked at.
        python, disk, memory: the version, the free bytes and the free bytes to judge; this machine's if None.
    """
    python = tuple(python or sys.version_info)[:2]
    disk = shutil.disk_usage(folder).free if disk is None else disk
    memory = available_memory() if memory is None else memory
    need = run_disk_gb() + (PACKAGES_DISK_GB if install else 0)
    found = []
    if python < PYTHON:
        found.append(
            "Found Python {}.{}, expected {}.{} or newer. Install it, or name one: "
            "make PYTHON=/path/to/python3.11".format(*(python + PYTHON))
        )
    if disk < need * GB:
        hint = "" if install else "; `make clean` and `dvc gc -w` help"  # DVC is not there yet
        found.append("Found {:.1f} GB of free disk, expected {:g} GB. Free some{}.".format(disk / GB, need, hint))
    if not (install or light) and memory is not None and memory < MEMORY_GIB * GIB:
        found.append(
            "Found {:.1f} GiB of free memory, expected {} GiB. Close other programs, or run the tiny recipe: "
            "make tiny".format(memory / GIB, MEMORY_GIB)
        )
    return found


def run_disk_gb():
    """Free disk without which no run, and none of its stages, begins."""
    return float(os.environ.get("RLHF_MIN_FREE_GB") or RUN_DISK_GB)


# Control groups of version 2, and of version 1: the folder, the limit, what counts as used, and the prefix of the lines
# of memory.stat that count whatever lies below, too.
CGROUPS = (
    ("sys/fs/cgroup", "memory.max", "memory.current", ""),
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)


def available_memory(root="/"):
    """Free bytes, or None where the system does not say. A container's limit counts too."""
    known = []
    try:
        with open(os.path.join(root, "proc/meminfo")) as file:
            known += [int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable")]
    except OSError:
        pass
    for folder, limit, used, prefix in CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # not on Linux, or no limit ("max")
            known.append(_left(os.path.join(root, folder), limit, used, prefix))
    if not known and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        known.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(known) if known else None


def _left(folder, limit, used, prefix):
    """What a control group may still take. Files that are cached count as used, and make way for whoever needs room."""
    with open(os.path.join(folder, limit)) as file:
        most = int(file.read())
    with open(os.path.join(folder, used)) as file:
        taken = int(file.read())
    with open(os.path.join(folder, "memory.stat")) as file:
        counts = dict(line.split() for line in file)
    return most - taken + sum(int(counts.get(prefix + name, 0)) for name in ("inactive_file", "active_file"))


if __name__ == "__main__":
    missing = problems(install="--install" in sys.argv, light="--light" in sys.argv)
    for sentence in missing:
        sys.stderr.write(sentence + "\n")
    sys.exit(1 if missing else 0)
