"""One language model in several roles: policy, reference, reward, value.

Every role is the same body with another LoRA adapter in its top layers (Hu et al. 2021), or with none; a role trained
in full has a body of its own. What lies below the lowest adapter is the same function for every role, so its hidden
states, the *trunk*, are computed once a batch and kept over the epochs (as in Hydra-RLHF, Santacroce et al. 2023).

Models stay in eval mode for good: dropout in rollouts or updates alone would move the ratio away from 1.
"""

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_core import processes, unpadding
from rlhf_core.base import set_pad
from rlhf_core.config import Training
from rlhf_core.errors import MissingArtifact
from rlhf_core.folding import Fold, alike, batches, fold_rows
from rlhf_core.head import said
from rlhf_core.matrices import quicken

REFERENCE = "reference"
# PEFT 0.21 asks transformers 5.23 by the old name; harmless, and not the user's to mend.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)

SCORED_ROWS = 8  # rows in one forward pass when responses are scored


class Packed(NamedTuple):
    """Prompts with their responses, padded on the right only, and where in them the responses stand."""

    ids_BS: Tensor  # (B, S) long
    mask_BS: Tensor  # (B, S) bool, True for tokens of prompt and response
    predicts_BS: Tensor  # (B, S) bool, True where the next token is one of the response
    ids_BT: Tensor  # (B, T) long, the responses alone
    mask_BT: Tensor  # (B, T) bool, a prefix of each row


class Trunk(NamedTuple):
    """What the roles share of a batch: hidden states below the lowest adapter, or the ids where nothing is shared."""

    states: Tensor  # (B, S, D) float, or the ids (B, S); (G, F, D) or (G, F) where rows are folded
    ids_BS: Tensor
    mask_BS: Tensor
    predicts_BS: Tensor
    fold: Fold | None = None

    def ids(self) -> list[list[int]]:
        """Token ids of each row."""
        return [ids_S[mask_S].tolist() for ids_S, mask_S in zip(self.ids_BS, self.mask_BS, strict=True)]

    def rows(self, index: Tensor | Sequence[int]) -> "Trunk":
        """The trunk of some of its rows, trimmed to their longest."""
        assert self.fold is None, "rows that lie as one cannot be told apart"
        stop = int(self.mask_BS[index].sum(1).max()) if len(index) else 0
        states, ids_BS, mask_BS, predicts_BS = (part[index, :stop] for part in self[:4])
        return Trunk(states, ids_BS, mask_BS, predicts_BS)


class TrunkCache:
    """Trunks of rows that come again: by a second epoch, the layers that all roles share need no computing.

    It holds the first rows that it sees, up to a limit. Whether a row is held changes the time it takes, and no number.
    """

    def __init__(self, limit_bytes: int = 1 << 30) -> None:
        self.room = limit_bytes
        self.states: dict[tuple[tuple[int, ...], ...], Tensor] = {}  # ids of rows that lie as one -> (F, D)

    def keep(self, ids: tuple[tuple[int, ...], ...], states_SD: Tensor) -> None:
        """Hold the states of rows that lie as one, if there is room left."""
        size = states_SD.nbytes
        if ids not in self.states and size <= self.room:
            self.states[ids] = states_SD
            self.room -= size


class Normaliser(NamedTuple):
    """Statistics stored with a reward model: score = (raw − mean) / std, probability = σ(raw margin / temperature)."""

    mean: float = 0.0
    std: float = 1.0
    temperature: float = 1.0
    # What a token more was worth in the rankings, raw score; no part of a score. None where it was not regressed out.
    length_coef: float | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        """Scores of raw outputs: standard deviations above the mean of what SFT answers."""
        return (raw - self.mean) / self.std


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, or of the base below an adapter."""
    tokenizer = AutoTokenizer.from_pretrained(_root(Path(folder)))
    set_pad(tokenizer)
    return tokenizer


def context_length(folder: str | Path) -> int:
    """How many tokens the model may see at once; the number 10⁹ where it names no limit."""
    # By the common name: transformers knows that GPT-2's config calls it n_positions.
    return int(getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", None) or 10**9)


def base_of(folder: str | Path) -> Path:
    """The model folder that a LoRA folder was trained on; any other folder itself."""
    folder = Path(folder)
    return _below(folder) if (folder / "adapter_config.json").is_file() else folder


def load_policy(folder: str | Path) -> PreTrainedModel:
    """A causal language model, in eval mode and float32, with its chain of adapters merged in.

    Args:
        folder: a Hugging Face folder, or a LoRA folder whose base is named in its adapter_config.json.

    Raises:
        MissingArtifact: the folder holds no model; names the command that makes it.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").is_file():
        model = load_policy(_below(folder))
        peft = PeftModel.from_pretrained(model, str(folder), adapter_name="merging", low_cpu_mem_usage=False)
        model = peft.merge_and_unload()
    else:
        if not (folder / "config.json").is_file():
            raise MissingArtifact(_missing(folder))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        unpadding.prepare(model)
    _no_dropout(model.config)
    quicken(model)
    return model.eval()


class Roles(nn.Module):
    """A causal language model and the roles it plays.

    Args:
        folder: the model that roles start from and that role "reference" is.
        training: the section that gives new adapters their shape; not needed where every role is a saved one.
    """

    def __init__(self, folder: str | Path, training: Training | None = None) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.model: Any = load_policy(folder)
        self.device = processes.state().device
        self.model.requires_grad_(False).to(self.device)
        self.layers: int = self.model.config.num_hidden_layers
        self.training_section = training
        self.peft: PeftModel | None = None
        self.full = nn.ModuleDict()  # role -> a whole model of its own
        self.bodies: dict[str, str] = {}  # role that is a head alone -> the role whose hidden states it reads
        self.heads = nn.ModuleDict()  # role -> scalar head
        self.axis_heads = nn.ModuleDict()  # role -> a further output for each of its axes, where it has some
        self.normalisers: dict[str, Normaliser] = {}
        self.axes: dict[str, dict[str, Normaliser]] = {}  # role -> axis -> its normaliser, in the order of the outputs
        self._depth: int | None = None
        self._folds: bool | None = None
        self._unpads: bool | None = None
        self._views: dict[Any, nn.Module] = {}

    # ---- roles

    def add(
        self,
        role: str,
        *,
        method: str = "lora",
        head: bool = False,
        start: str | Path | None = None,
        axes: Sequence[str] | None = None,
        on: str | None = None,
    ) -> None:
        """Add a role: fresh, or as saved in folder `start` (whose method then decides).

        A fresh adapter changes nothing yet (its B is zero); a fresh scalar head is N(0, 1/√(d+1)) with bias 0.

        Args:
            axes: names of further outputs beside the scalar head's; None for those that are saved, none if fresh.
            on: the role whose hidden states the head reads; this one is then a head alone, whatever else `start` holds.
        """
        start = Path(start) if start is not None else None
        if start is not None:
            if not start.is_dir():
                raise MissingArtifact(_missing(start))
            method = "lora" if (start / "adapter_config.json").is_file() else "full"
        if on is not None:
            assert head, f"{role} would have nothing of its own"
            self.bodies[role] = on
        elif method == "full":
            source = load_policy(start) if start is not None else copy.deepcopy(self._bare())
            self.full[role] = source.requires_grad_(True).to(self.device)
        else:
            config = self._new_adapter() if start is None else LoraConfig.from_pretrained(str(start))
            config.base_model_name_or_path = None  # PEFT would warn that the merged base bears another name
            if self.peft is None:
                self.peft = get_peft_model(self.model, config, adapter_name=role, autocast_adapter_dtype=False)
            else:
                self.peft.add_adapter(role, config)
            if start is not None:
                # The prefix and the role's name are PEFT's: ...lora_A.weight on disk, ...lora_A.<role>.weight inside.
                saved = load_file(start / "adapter_model.safetensors")
                inside = {key.rpartition(".weight")[0] + f".{role}.weight": value for key, value in saved.items()}
                missing = self.peft.load_state_dict(inside, strict=False)
                assert not missing.unexpected_keys, missing.unexpected_keys
        if head:
            self._add_heads(role, start, axes)
        self.to(self.device).eval()
        quicken(self.model)
        self._depth = None
        self._views.clear()

    def add_axis(self, role: str, axis: str, weight_1D: Tensor, bias_1: Tensor) -> None:
        """Give a role that has a scalar head and no axes a further output, with the weights of a linear head."""
        assert role in self.heads, f"{role} has no scalar head"
        assert role not in self.axis_heads, f"{role} has axes already"
        self.axes[role], self.axis_heads[role] = {axis: Normaliser()}, self._new_head(1)
        with torch.no_grad():
            head: Any = self.axis_heads[role]
            head.weight.copy_(weight_1D)
            head.bias.copy_(bias_1)

    def trainable(self, role: str) -> list[nn.Parameter]:
        """The role's own parameters, head included, in a fixed order, with requires_grad set."""
        if role in self.full:
            # A body that only feeds a scalar head has no use for its language-model head, unless tied.
            parameters = list(
                _body(self.full[role]).parameters() if role in self.heads else self.full[role].parameters()
            )
        elif role in self.bodies:
            parameters = []  # but for the heads below
        else:
            assert self.peft is not None
            parameters = [value for name, value in self.peft.named_parameters() if f".{role}." in name]
        for heads in (self.heads, self.axis_heads):
            parameters += list(heads[role].parameters()) if role in heads else []
        for parameter in parameters:
            parameter.requires_grad_(True)
        return parameters

    def frozen(self, role: str) -> None:
        """Take the role out of learning."""
        for parameter in self.trainable(role):
            parameter.requires_grad_(False)

    def save(self, role: str, folder: str | Path) -> None:
        """Write the role: a standard PEFT folder that names `self.folder` as its base, or a Hugging Face folder.

        Of a role that is a head alone, the head.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if role in self.full:
            whole: Any = self.full[role]
            whole.save_pretrained(folder)
            load_tokenizer(self.folder).save_pretrained(folder)
        elif role not in self.bodies:
            assert self.peft is not None
            state = get_peft_model_state_dict(self.peft, adapter_name=role, save_embedding_layers=False)
            save_file({key: state[key].contiguous() for key in sorted(state)}, folder / "adapter_model.safetensors")
            config = copy.copy(self.peft.peft_config[role])
            config.base_model_name_or_path = self.folder.as_posix()
            config.inference_mode = True
            # PEFT keeps these as sets, whose order changes from process to process; the file must not.
            settings = json.loads(json.dumps(config.to_dict(), default=lambda value: sorted(value)))
            _write_json(folder / "adapter_config.json", settings)
        if role in self.heads:
            save_file(self.heads[role].state_dict(), folder / "score_head.safetensors")
            statistics: dict[str, Any] = _known(self.normalisers[role])
            if role in self.axis_heads:
                save_file(self.axis_heads[role].state_dict(), folder / "axis_heads.safetensors")
                statistics["axes"] = [{"name": name, **_known(of)} for name, of in self.axes[role].items()]
            _write_json(folder / "score.json", statistics)

    # ---- forward

    def trunk(
        self,
        packed: Packed,
        cache: TrunkCache | None = None,
        *,
        states: Sequence[Tensor] | None = None,
        folded: bool = False,
    ) -> Trunk:
        """What all roles share of a batch. No gradient passes it.

        Args:
            states: (S, D) of each row, where sampling has kept them: nothing needs computing then.
            cache: where rows are looked up that may have come before. It serves one `Roles`, and must be dropped when
                a role is added, since the new role may share fewer layers.
            folded: compute what neighbouring rows begin alike with once, here and in the roles' own layers.
        """
        ids_BS, mask_BS, predicts_BS = (part.to(self.device) for part in packed[:3])
        # Where nothing is shared, the ids take the states' place.
        trunk = Trunk(ids_BS, ids_BS, mask_BS, predicts_BS)
        if folded:
            trunk = self.folded(trunk)
        fold = trunk.fold
        if self.depth == 0:
            return trunk
        if states is not None:
            kept_BSD = pad_sequence(list(states), batch_first=True)
            return trunk._replace(states=kept_BSD if fold is None else fold.fold(kept_BSD))
        if cache is None:
            return trunk._replace(states=self._lower(ids_BS, mask_BS, fold))
        rows = list(map(tuple, trunk.ids()))
        found, start = [], 0
        for count, common in fold.groups if fold is not None else [(1, len(row)) for row in rows]:
            ids = tuple(rows[start : start + count])
            states_FD = cache.states.get(ids)
            if states_FD is None:
                # Alone, so that rows have the same states whatever stood beside them when they came first.
                own_BS, own_mask_BS = (part.to(self.device) for part in pad_right(ids, 0))
                alone = fold_rows(own_mask_BS, [(count, common)]) if count > 1 else None
                states_FD = self._lower(own_BS, own_mask_BS, alone)[0]
                cache.keep(ids, states_FD)
            found.append(states_FD)
            start += count
        return trunk._replace(states=pad_sequence(found, batch_first=True))

    def folded(self, trunk: Trunk) -> Trunk:
        """The same trunk with neighbouring rows that begin alike laid out as one, where the model bears it."""
        groups = alike(trunk.ids()) if self.folds else []
        if all(count == 1 for count, _ in groups):
            return trunk
        fold = fold_rows(trunk.mask_BS, groups)
        return trunk._replace(states=fold.fold(trunk.states), fold=fold)

    def hidden(self, trunk: Trunk, role: str) -> Tensor:
        """(B, S, D) last hidden states of a role, final norm included."""
        run = self._way(trunk.mask_BS, trunk.fold)
        body = self._activate(role)
        with self._recomputing(body, role):
            if trunk.states.dim() == 2:
                found = run(_body(body), trunk.mask_BS, trunk.fold, input_ids=trunk.states)
            else:
                upper = self._view(body, slice(self.depth, self.layers))
                found = run(upper, trunk.mask_BS, trunk.fold, inputs_embeds=trunk.states)
        return found if trunk.fold is None else trunk.fold.unfold(found)

    def logprobs(
        self,
        trunk: Trunk,
        role: str,
        ids_BT: Tensor,
        mask_BT: Tensor,
        *,
        temperature: float,
        entropy: bool = False,
        hidden_BSD: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Float32 log-probabilities of the responses' tokens, and the entropies where asked.

        Args:
            ids_BT, mask_BT: (B, T) the responses of the batch that made the trunk, and where they have tokens.
            hidden_BSD: what `hidden` gives for them, where it is known, here and in `values`.

        Returns:
            (B, T) log-probs in nats, (B, T) entropies in nats or None; 0 where the mask is False.
        """
        ids_BT, mask_BT = ids_BT.to(self.device), mask_BT.to(self.device)
        # Both masks name the same tokens row by row, so their True entries pair up in order.
        hidden_ND, ids_N = self._predicting(trunk, role, hidden_BSD), ids_BT[mask_BT]
        head = self._model_of(role).get_output_embeddings()
        found = said(head, hidden_ND, ids_N, temperature=temperature, entropy=entropy)
        logprobs_BT = _spread(found.logprobs_N, mask_BT)
        return logprobs_BT, None if found.entropy_N is None else _spread(found.entropy_N, mask_BT)

    def values(self, trunk: Trunk, role: str, mask_BT: Tensor, *, hidden_BSD: Tensor | None = None) -> Tensor:
        """(B, T) raw outputs of the role's scalar head before each response token is emitted; 0 under a False mask."""
        hidden_ND = self._predicting(trunk, role, hidden_BSD)
        return _spread(self.heads[role](hidden_ND).squeeze(-1).float(), mask_BT.to(self.device))

    def values_by_head(
        self, trunk: Trunk, role: str, mask_BT: Tensor, *, hidden_BSD: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """1 + A times (B, T): as `values`, of the scalar head and of each of A axes."""
        hidden_ND, mask_BT = self._predicting(trunk, role, hidden_BSD), mask_BT.to(self.device)
        found = [heads[role](hidden_ND) for heads in (self.heads, self.axis_heads) if role in heads]
        return tuple(_spread(values_N, mask_BT) for values_N in torch.cat(found, 1).float().unbind(1))

    def score_rows(
        self,
        rows: Sequence[Sequence[int]],
        role: str,
        pad_id: int,
        *,
        size: int = SCORED_ROWS,
        cache: TrunkCache | None = None,
    ) -> Tensor:
        """(N,) raw outputs of the role's scalar head at the end of each row of ids, in the order given."""
        return self.output_rows(rows, [role], pad_id, size=size, cache=cache)[:, 0, 0]

    def output_rows(
        self,
        rows: Sequence[Sequence[int]],
        roles: Sequence[str],
        pad_id: int,
        *,
        size: int = SCORED_ROWS,
        cache: TrunkCache | None = None,
    ) -> Tensor:
        """(N, M, 1 + A) what `outputs` gives for each of M roles at the end of each row of ids, in the order given.

        Rows of like length are computed together, so that little padding is; what neighbours in the order given begin
        alike with, such as their prompt, and what the roles share is computed once. Equal rows are one row, so that
        they are equal in the last digit too. Gradients flow as usual.
        """
        once: dict[tuple[int, ...], int] = {}
        of_row = [once.setdefault(tuple(row), len(once)) for row in rows]
        rows = list(once)
        order: list[int] = []
        parts = [torch.empty((0, len(roles), 1 + len(self.axes[roles[0]])), device=self.device)]
        for numbers in batches(rows, size):
            packed = pack([rows[row] for row in numbers], None, pad_id)
            trunk = self.trunk(packed, cache, folded=True)
            parts.append(torch.stack([self.outputs(trunk, role) for role in roles], 1))
            order += numbers
        place = torch.empty(len(order), dtype=torch.long)
        place[torch.tensor(order, dtype=torch.long)] = torch.arange(len(order))  # of no rows too
        return torch.cat(parts)[place[torch.tensor(of_row, dtype=torch.long)].to(self.device)]

    def scores(self, trunk: Trunk, role: str, *, axis: str | None = None) -> Tensor:
        """(B,) raw outputs at each row's last kept token: of the role's scalar head, or for one of its axes."""
        return self.outputs(trunk, role)[:, self.place_of(role, axis)]

    def place_of(self, role: str, axis: str | None) -> int:
        """Where among the role's outputs an axis stands, and None, which is the scalar head."""
        return 0 if axis is None else 1 + list(self.axes[role]).index(axis)

    def outputs(self, trunk: Trunk, role: str) -> Tensor:
        """(B, 1 + A) raw outputs at each row's last kept token: the scalar head's, then one for each of A axes."""
        hidden_BSD = self.hidden(trunk, role)
        last_B = trunk.mask_BS.sum(1) - 1
        hidden_BD = hidden_BSD[torch.arange(len(last_B)), last_B]
        found = [heads[role](hidden_BD) for heads in (self.heads, self.axis_heads) if role in heads]
        return torch.cat(found, 1).float()

    def language_model(self, role: str) -> Any:
        """The causal language model with the role's adapter on, for sampling, until another role is asked something."""
        _ = self.depth  # it is measured when first asked for, and that switches adapters
        self._activate(role)
        return self._model_of(role)

    @property
    def depth(self) -> int:
        """How many of the lowest layers every role shares; 0 where nothing may be."""
        if self._depth is None:
            self._depth = 0 if self.full else self._shared_depth()
        return self._depth

    @torch.no_grad()
    def begins_as(self, other: "Roles") -> bool:
        """Whether the layers that the roles share are those of another model: the states below serve both."""
        mine, theirs = _body(self.model), _body(other.model)
        if not self.depth or type(mine) is not type(theirs):
            return False
        shared = slice(0, self.depth)
        for ours, others in ((mine.embed_tokens, theirs.embed_tokens), (mine.layers[shared], theirs.layers[shared])):
            weights, of_other = dict(ours.named_parameters()), dict(others.named_parameters())
            if weights.keys() != of_other.keys():
                return False
            if not all(torch.equal(weight, of_other[name]) for name, weight in weights.items()):
                return False
        ids_BS = torch.arange(8, device=self.device)[None] % self.model.config.vocab_size  # settings may differ too
        found = (_run(one._view(one.model, shared), ids_BS >= 0, input_ids=ids_BS) for one in (self, other))
        return torch.equal(*found)

    @property
    def folds(self) -> bool:
        """Whether rows that begin alike may lie as one, which no model is believed to bear that has not shown it."""
        if self._folds is None:
            self._folds = self._bears_folding()
        return self._folds

    @property
    def unpads(self) -> bool:
        """Whether padding may be left out, which has to be shown as well."""
        if self._unpads is None:
            self._unpads = self._bears_unpadding()
        return self._unpads

    # ---- inside

    def _way(self, mask_BS: Tensor, fold: Fold | None) -> Callable[..., Tensor]:
        """The function that runs a body over such rows."""
        padded = not bool((mask_BS if fold is None else fold.mask_GF).all())
        return _run_unpadded if padded and self.unpads else _run

    def _predicting(self, trunk: Trunk, role: str, hidden_BSD: Tensor | None) -> Tensor:
        """(N, D) last hidden states where the next token is one of a response."""
        return (self.hidden(trunk, role) if hidden_BSD is None else hidden_BSD)[trunk.predicts_BS]

    def _add_heads(self, role: str, start: Path | None, axes: Sequence[str] | None) -> None:
        self.heads[role] = self._new_head(1)
        self.normalisers[role], saved = Normaliser(), {}
        if start is not None:
            self.heads[role].load_state_dict(load_file(start / "score_head.safetensors"))
            statistics = json.loads((start / "score.json").read_text())
            saved = {each.pop("name"): Normaliser(**each) for each in statistics.pop("axes", [])}
            self.normalisers[role] = Normaliser(**statistics)
        wanted = list(saved if axes is None else axes)
        self.axes[role] = {axis: saved.get(axis, Normaliser()) for axis in wanted}
        if wanted:
            self.axis_heads[role] = self._new_head(len(wanted))
            if start is not None:
                assert wanted == list(saved), f"{start} has the axes {list(saved)}, not {wanted}"
                self.axis_heads[role].load_state_dict(load_file(start / "axis_heads.safetensors"))

    def _new_head(self, outputs: int) -> nn.Linear:
        width = self.model.config.hidden_size
        head = nn.Linear(width, outputs).to(self.device)
        nn.init.normal_(head.weight, std=(width + 1) ** -0.5)
        nn.init.zeros_(head.bias)
        return head

    @torch.no_grad()
    def _lower(self, ids_BS: Tensor, mask_BS: Tensor, fold: Fold | None = None) -> Tensor:
        ids = ids_BS if fold is None else fold.fold(ids_BS)
        lower = self._view(self.model, slice(0, self.depth))
        return self._way(mask_BS, fold)(lower, mask_BS, fold, input_ids=ids)

    def _bears_folding(self) -> bool:
        ids_BS = torch.arange(18, device=self.device).reshape(3, 6) % self.model.config.vocab_size
        ids_BS[:, :3] = ids_BS[0, :3]
        mask_BS = torch.ones_like(ids_BS, dtype=torch.bool)
        mask_BS[1, 5:] = False
        fold = fold_rows(mask_BS, [(3, 3)])

        def folded(body: Any) -> Tensor:
            return fold.unfold(_run(body, mask_BS, fold, input_ids=fold.fold(ids_BS)))

        return self._bears(folded, ids_BS, mask_BS)

    def _bears_unpadding(self) -> bool:
        if self.model.config._attn_implementation != unpadding.ATTENTION:
            return False
        ids_BS = torch.arange(12, device=self.device).reshape(2, 6) % self.model.config.vocab_size
        mask_BS = torch.ones_like(ids_BS, dtype=torch.bool)
        mask_BS[0, 3:] = False
        return self._bears(lambda body: _run_unpadded(body, mask_BS, input_ids=ids_BS), ids_BS, mask_BS)

    @torch.no_grad()
    def _bears(self, otherwise: Callable[[Any], Tensor], ids_BS: Tensor, mask_BS: Tensor) -> bool:
        """Whether running the model otherwise, with whatever adapter is on, gives what it gives of plain rows."""
        if getattr(self.model.config, "sliding_window", None):  # a token's window would not be its row's
            return False
        body = _body(self.model)
        plain_BSD = _run(body, mask_BS, input_ids=ids_BS)
        try:
            found_BSD = otherwise(body)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):  # it takes no such mask or argument
            return False
        return torch.allclose(plain_BSD[mask_BS], found_BSD[mask_BS], rtol=1e-4, atol=1e-4)

    def _new_adapter(self) -> LoraConfig:
        training = self.training_section
        assert training is not None, "a fresh adapter needs a training section"
        first = max(self.layers - training.lora_layers, 0) if training.lora_layers else 0
        return LoraConfig(
            r=training.lora_rank,
            lora_alpha=training.lora_alpha,
            target_modules=_linear_names(_body(self.model)),
            layers_to_transform=list(range(first, self.layers)),
            bias="none",
            task_type="CAUSAL_LM",
        )

    def _shared_depth(self) -> int:
        configs: list[Any] = list(self.peft.peft_config.values()) if self.peft is not None else []
        lowest = min((min(config.layers_to_transform) for config in configs), default=self.layers)
        depth = min(lowest, self.layers - 1)
        if depth <= 0 or not _can_split(_body(self.model)):
            return 0
        # Whether this architecture may be cut is measured, not believed: some scale or add to what they embed.
        ids_BS = torch.arange(8).reshape(2, 4) % self.model.config.vocab_size
        mask_BS = torch.tensor([[False, True, True, True], [True, True, True, False]])
        ids_BS, mask_BS = ids_BS.to(self.device), mask_BS.to(self.device)
        with torch.no_grad():
            body = self._activate(REFERENCE)
            whole = _run(_body(body), mask_BS, input_ids=ids_BS)
            lower = _run(self._view(body, slice(0, depth)), mask_BS, input_ids=ids_BS)
            upper = _run(self._view(body, slice(depth, self.layers)), mask_BS, inputs_embeds=lower)
        same = torch.allclose(whole[mask_BS], upper[mask_BS], rtol=1e-4, atol=1e-4)
        return depth if same else 0

    def _model_of(self, role: str) -> Any:
        role = self.bodies.get(role, role)
        return self.full[role] if role in self.full else self.model  # noqa: SIM401  (a ModuleDict has no get)

    def _bare(self) -> Any:
        """A copy's source: the model without adapters."""
        return self.model if self.peft is None else load_policy(self.folder)

    def _activate(self, role: str) -> Any:
        """The whole model that plays the role, its adapter switched on and every other one off."""
        role = self.bodies.get(role, role)
        if role in self.full or self.peft is None:
            return self._model_of(role)
        on = role != REFERENCE
        modules: list[Any] = list(self.peft.base_model.modules())
        for module in modules:
            # As PEFT's set_adapter and disable_adapters do, but requires_grad stays as the optimisers want it.
            if hasattr(module, "_disable_adapters") and hasattr(module, "_active_adapter"):
                module._disable_adapters = not on
                if on:
                    module._active_adapter = [role]
        return self.model

    @contextmanager
    def _recomputing(self, body: Any, role: str) -> Iterator[None]:
        """Where the configuration asks for it, layers that run inside are computed again in the backward pass."""
        if not (self.training_section and self.training_section.gradient_checkpointing and torch.is_grad_enabled()):
            yield
            return

        def recomputed(forward: Any, *inputs: Any) -> Any:
            def again(*inputs: Any) -> Any:
                self._activate(role)  # by the time of the backward pass another role may be on
                forward.args[0].training = False  # the layer itself, which may have dropout of its own
                return forward(*inputs)

            return checkpoint(again, *inputs, use_reentrant=False)

        layers: list[Any] = [module for module in body.modules() if isinstance(module, GradientCheckpointingLayer)]
        for layer in layers:
            # transformers asks whether the layer is in training before it hands over to the function below.
            layer.gradient_checkpointing = layer.training = True
            layer._gradient_checkpointing_func = recomputed
        try:
            yield
        finally:  # or sampling would lose its cache of keys and values
            for layer in layers:
                layer.gradient_checkpointing = layer.training = False

    def _view(self, model: Any, layers: slice) -> nn.Module:
        """The body cut to some of its layers, sharing every weight; the final norm only with the last layer."""
        key = (id(model), layers.start, layers.stop)
        if key not in self._views:
            body = _body(model)
            view = copy.copy(body)
            view._modules = dict(body._modules)
            view._modules["layers"] = nn.ModuleList(list(body.layers)[layers])
            view.config = copy.copy(body.config)
            view.config.num_hidden_layers = layers.stop - layers.start
            if layers.stop < self.layers:
                view._modules["norm"] = nn.Identity()
            self._views[key] = view
        return self._views[key]


def _run(body: Any, mask_BS: Tensor, fold: Fold | None = None, **inputs: Tensor) -> Tensor:
    if fold is None:
        # Positions come from the mask, so that a row means the same with and without padding on its left.
        positions_BS = (mask_BS.long().cumsum(1) - 1).clamp(min=0)
        out = body(attention_mask=mask_BS.long(), position_ids=positions_BS, use_cache=False, **inputs)
    else:
        # Added to the scores, as every kind of attention takes it.
        hides = torch.where(fold.sees_GFF, 0.0, torch.finfo(torch.float32).min)[:, None]
        out = body(attention_mask=hides, position_ids=fold.positions_GF, use_cache=False, **inputs)
    return out.last_hidden_state


def _run_unpadded(body: Any, mask_BS: Tensor, fold: Fold | None = None, **inputs: Tensor) -> Tensor:
    if fold is not None:
        return unpadding.run(body, fold.mask_GF, fold.positions_GF, fold.sees_GFF, **inputs)
    positions_BS = (mask_BS.long().cumsum(1) - 1).clamp(min=0)
    return unpadding.run(body, mask_BS, positions_BS, unpadding.sees_causally(mask_BS), **inputs)


def _body(model: Any) -> Any:
    return getattr(model, model.base_model_prefix)


def _can_split(body: Any) -> bool:
    return all(hasattr(body, name) for name in ("layers", "norm", "rotary_emb", "embed_tokens"))


def _linear_names(body: nn.Module) -> list[str]:
    kinds = ("Linear", "Conv1D")
    return sorted({name.rpartition(".")[2] for name, module in body.named_modules() if type(module).__name__ in kinds})


def _no_dropout(config: Any) -> None:
    for name, value in config.to_dict().items():
        if ("drop" in name or "dropout" in name) and isinstance(value, float):
            setattr(config, name, 0.0)


def _below(folder: Path) -> Path:
    return Path(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])


def _root(folder: Path) -> Path:
    while (folder / "adapter_config.json").is_file():
        folder = _below(folder)
    if not (folder / "tokenizer.json").is_file():
        raise MissingArtifact(_missing(folder))
    return folder


def _missing(folder: Path) -> str:
    stage = next((name for name in ("base", "sft", "reward", "ppo", "dpo") if name in folder.parts), None)
    command = "prepare" if stage in (None, "base") else stage
    return f"{folder.as_posix()} holds no model. Run `dvc repro {command}`."


def _known(normaliser: Normaliser) -> dict[str, float]:
    return {name: value for name, value in normaliser._asdict().items() if value is not None}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _spread(values_N: Tensor, mask_BT: Tensor) -> Tensor:
    """Values in row-major order put where the mask is True, 0 elsewhere; gradients pass."""
    return values_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, values_N)


def pack(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]] | None, pad_id: int) -> Packed:
    """Prompts and responses as one right-padded batch; without responses, every row is a prompt alone.

    Right-padded, so that rows of like length can share a batch without carrying another row's prompt as padding.
    """
    answers = responses if responses is not None else [[] for _ in prompts]
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    ids_BS, mask_BS = pad_right(rows, pad_id)
    ids_BT, mask_BT = pad_right(answers, pad_id)
    positions_S = torch.arange(ids_BS.shape[1])
    first_B1 = torch.tensor([[len(prompt) - 1] for prompt in prompts])
    last_B1 = torch.tensor([[len(row) - 2] for row in rows])
    predicts_BS = (positions_S >= first_B1) & (positions_S <= last_B1)
    return Packed(ids_BS, mask_BS, predicts_BS, ids_BT, mask_BT)


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(B, S) ids and their mask from rows of uneven length, padding on the right."""
    width = max(len(row) for row in rows)
    ids_BS = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows], dtype=torch.long)
    lengths_B = torch.tensor([len(row) for row in rows])
    return ids_BS.reshape(len(rows), width), torch.arange(width) < lengths_B[:, None]
