"""What PPO looks at beside the reward that it climbs, and the policy that it may go back to.

The metrics are of an update's own responses, before it learns from them. The rule that reads them is in alarm.py, which
knows nothing of tensors.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from rlhf_core import processes
from rlhf_core.alarm import GOLD as GOLD_SCORE
from rlhf_core.alarm import REPETITION, Alarm, repetition
from rlhf_core.folding import batches
from rlhf_core.models import Roles, Trunk
from rlhf_core.optimisation import copy_into
from rlhf_core.records import Sampled

GOLD = "gold"  # the role that judges, and is never climbed
SMOOTHED = 3  # watched updates whose mean gold score says which policy is best; one alone is noisy
MEASURED = (GOLD_SCORE, REPETITION, "ppo/alarm")  # not a mean over the last updates, as other final metrics are
Score = Callable[[Sampled], Tensor]


@torch.no_grad()
def measure_watched(
    roles: Roles, sampled: Sampled, trunk: Trunk, *, micro_batch_size: int, gold: Score | None = None
) -> dict[str, float]:
    """How far an update's responses repeat themselves, and what a judge says of them that nobody climbs.

    Args:
        trunk: of this process's rows, as `measure_rollouts` made it; the gold model costs its own top layers only.
        gold: the judge, in place of role "gold"; without either there is no gold score.
    """
    responses = sampled.responses()
    found = {"ppo/repetition": mean(repetition(response) for response in responses)}
    if gold is not None:
        found["ppo/gold_score"] = float(gold(sampled).double().mean())
    elif GOLD in roles.heads:
        own = processes.own(range(len(responses)))
        scores_B = torch.zeros(len(own), device=roles.device)
        for rows in batches(trunk.ids(), micro_batch_size):
            scores_B[rows] = roles.normalisers[GOLD](roles.scores(roles.folded(trunk.rows(rows)), GOLD))
        found["ppo/gold_score"] = float(processes.place(scores_B, own, len(responses)).mean())
    return found


def final_watched(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The final metrics of what was watched: means over the last tenth of the updates that were, and the alarms."""
    watched = [row for row in history if REPETITION in row]
    if not watched:
        return {}
    last = watched[-max(len(watched) // 10, 1) :]
    alarms = [update for update, row in enumerate(history, start=1) if row.get("ppo/alarm")]
    found = {"repetition": mean(row[REPETITION] for row in last), "alarms": len(alarms)}
    if GOLD_SCORE in last[-1]:
        found |= {"gold_score": mean(row[GOLD_SCORE] for row in last)}
    if alarms:
        found |= {"alarm_update": alarms[0]}
    return found


class Kept:
    """Copies of all that is trained, from before an alarm; kept in memory, since checkpoints come when time allows.

    With a gold score it is the policy whose mean over the last three watched updates is best. Without one there is no
    telling which is best: the reward is what cannot be believed, and it is highest just before the alarm. So it is the
    newest one from before the alarm's window, for which two copies are enough: one is made every window.

    Args:
        parameters: what an update changes.
        gold: whether there is a gold score.
        window: of the alarm, in watched updates.
    """

    def __init__(self, parameters: Sequence[Tensor], *, gold: bool, window: int) -> None:
        self.parameters, self.gold, self.window = parameters, gold, window
        self.newest = [value.detach().clone() for value in parameters]
        self.older = [] if gold else [value.detach().clone() for value in parameters]
        self.values: dict[str, Any] = {"newest": 1, "older": 1, "best": None}

    def offer(self, history: Sequence[Mapping[str, float]]) -> None:
        """Take a copy if this is the time: history ends with the watched update whose responses the policy gave."""
        watched = [row for row in history if REPETITION in row]
        if self.gold:
            level = mean(row[GOLD_SCORE] for row in watched[-SMOOTHED:])
            if self.values["best"] is None or level > self.values["best"]:
                self.values |= {"newest": len(history), "best": level}
                copy_into(self.newest, self.parameters)
        elif len(watched) % self.window == 1:
            self.values |= {"newest": len(history), "older": self.values["newest"]}
            copy_into(self.older, self.newest)
            copy_into(self.newest, self.parameters)

    def go_back(self, alarm: Alarm) -> int:
        """Bring the parameters back; returns the update whose responses they gave."""
        newest = self.gold or self.values["newest"] <= alarm.since
        copy_into(self.parameters, self.newest if newest else self.older)
        return int(self.values["newest" if newest else "older"])
