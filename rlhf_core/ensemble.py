"""A reward model of several members: each its own adapter and heads, all on one trunk.

The score of a response is the mean of the members' normalised scores; the spread is their standard deviation. Members
are trained on the same rankings by the same loop, from another seed for initialisation and data order and nothing else
(Coste et al. 2023, arXiv:2310.02743, section 4; as adapters: Zhai et al. 2023, arXiv:2401.00243). Rankings are not
drawn anew for each: a bootstrap costs every member a third of the data, and initialisation and order suffice
(Lakshminarayanan et al. 2017, arXiv:1612.01474). A reward model of one member is a role as any other.

On disk the first member is the reward model's folder, so that whoever knows of one member reads that one; the others
are whole roles in member-2, member-3 … inside it, and ensemble.json says how many there are.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.config import Reward
from rlhf_core.models import Normaliser, Roles, Trunk

SEED_STEP = 1_000_003  # between members' seeds: a run with the next seed must not share members with this one
ENSEMBLE = "ensemble.json"


class EnsembleScore(NamedTuple):
    """What an ensemble says of responses, in reward units."""

    score_B: Tensor  # (B,) mean over the members
    spread_B: Tensor  # (B,) population standard deviation over the members; 0 where there is but one
    members_BM: Tensor  # (B, M) each member's own score


def member_names(role: str, count: int) -> list[str]:
    """The roles that play a reward model's members; the first bears the reward model's own name."""
    return [role, *(f"{role}-{number}" for number in range(2, count + 1))]


def member_seed(seed: int, number: int) -> int:
    """The seed of a member, counted from 1; the first has the stage's own."""
    return seed + SEED_STEP * (number - 1)


def members_of(roles: Roles, role: str) -> list[str]:
    """Those of a reward model's members that the model has as roles."""
    return [name for name in member_names(role, len(roles.heads)) if name in roles.heads]


def add_members(roles: Roles, role: str, config: Reward, *, start: Path | None = None) -> None:
    """Add the members after the first, which is there already; each is drawn from a seed of its own.

    Args:
        start: the folder of a saved reward model, to continue from its members.
    """
    for number, name in enumerate(member_names(role, config.members)[1:], start=2):
        torch.manual_seed(member_seed(config.seed, number))
        if start is None:
            roles.add(name, method=config.method, head=True, axes=config.axes)
        else:
            roles.add(name, head=True, start=start / f"member-{number}")


def load_ensemble(roles: Roles, role: str, folder: str | Path) -> None:
    """Add a saved reward model with all its members, frozen.

    Raises:
        MissingArtifact: there is none, or one of the members that ensemble.json counts is missing.
    """
    folder, count = Path(folder), 1
    if (folder / ENSEMBLE).is_file():
        count = json.loads((folder / ENSEMBLE).read_text(encoding="utf-8"))["members"]
    places = [folder, *(folder / f"member-{number}" for number in range(2, count + 1))]
    for name, place in zip(member_names(role, count), places, strict=True):
        roles.add(name, head=True, start=place)
        roles.frozen(name)


def save_ensemble(roles: Roles, role: str, folder: str | Path, *, temperature: float) -> None:
    """Write a reward model with all its members.

    Args:
        temperature: of the ensemble's margins, which are in reward units; each member keeps its own, of raw margins.
    """
    folder, members = Path(folder), members_of(roles, role)
    roles.save(role, folder)
    for number, name in enumerate(members[1:], start=2):
        roles.save(name, folder / f"member-{number}")
    if len(members) > 1:
        content = {"members": len(members), "temperature": temperature}
        (folder / ENSEMBLE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def normalise(roles: Roles, members: Sequence[str], outputs_BMH: Tensor) -> Tensor:
    """(B, M, 1 + A) scores of raw outputs, each by its own member's statistics."""
    found = [
        torch.stack([of(output_B) for of, output_B in zip(_normalisers(roles, name), outputs_BH.T, strict=True)], 1)
        for name, outputs_BH in zip(members, outputs_BMH.unbind(1), strict=True)
    ]
    return torch.stack(found, 1)


def member_scores(roles: Roles, trunk: Trunk, role: str) -> Tensor:
    """(B, M, 1 + A) normalised scores of each row, by each member: overall, then on each axis."""
    members = members_of(roles, role)
    return normalise(roles, members, torch.stack([roles.outputs(trunk, name) for name in members], 1))


def combine(members_BM: Tensor) -> EnsembleScore:
    """The ensemble's score and spread from its members' scores."""
    return EnsembleScore(members_BM.mean(1), members_BM.std(1, correction=0), members_BM)


def _normalisers(roles: Roles, name: str) -> list[Normaliser]:
    return [roles.normalisers[name], *roles.axes[name].values()]
