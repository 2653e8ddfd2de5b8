"""Talk to a stage's policy in the terminal: `rlhf chat ppo`."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from rlhf_core.config import load_params
from rlhf_core.errors import MissingArtifact

Policy = Literal["base", "sft", "ppo", "dpo"]
FOLDERS: dict[Policy, str] = {
    "base": "artifacts/base",
    "sft": "artifacts/sft/model",
    "ppo": "artifacts/ppo/policy",
    "dpo": "artifacts/dpo/policy",
}
HELP = "/new forgets the conversation, /greedy takes the likeliest word or samples again, /quit or Ctrl-D ends."


def chat(
    stage: Policy, *, temperature: float | None = None, tokens: int | None = None, seed: int = 0,
    ask: Callable[[str], str] = input,
) -> None:  # fmt: skip
    """Read a turn, answer it, and remember both, until /quit or the end of input.

    Args:
        stage: whose policy answers.
        temperature, tokens: how it is sampled; as evaluate does it if None.
        seed: the same seed and the same turns give the same answers.
        ask: where turns come from.

    Raises:
        MissingArtifact: the stage has no policy; names the command that makes it.
    """
    import torch
    from rich.console import Console

    from rlhf_core.data import encode_prompt
    from rlhf_core.models import load_policy, load_tokenizer
    from rlhf_core.rollouts import sample
    from tasks.dpo import NO_POLICY

    params = load_params()
    temperature = temperature or params.evaluate.temperature
    tokens = tokens or params.evaluate.response_tokens
    folder = Path(FOLDERS[stage])
    if stage == "dpo" and NO_POLICY.is_file():
        raise MissingArtifact("This run has no DPO policy: dpo.epochs is 0. `rlhf run -S dpo.epochs=1` trains one.")
    console = Console()
    with console.status(f"loading {folder}"):
        model, tokenizer = load_policy(folder), load_tokenizer(folder)
    generator = torch.Generator().manual_seed(seed)
    console.print(f"{stage} answers with up to {tokens} tokens at temperature {temperature:g}. {HELP}", highlight=False)
    turns: list[tuple[str, str]] = []
    greedy = False
    while True:
        try:
            said = ask("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        match said:
            case "":
                continue
            case "/quit":
                return
            case "/new":
                turns.clear()
                continue
            case "/greedy":
                greedy = not greedy
                console.print("likeliest word" if greedy else f"sampling at {temperature:g}")
                continue
        turns.append(("user", said))
        with console.status(""):
            prompt = encode_prompt(tokenizer, turns, params.prepare.system)
            rollout = sample(
                model, [prompt], max_tokens=tokens, temperature=temperature, stop_id=int(tokenizer.eos_token_id),
                pad_id=int(tokenizer.pad_token_id), generator=generator, greedy=greedy,
            )  # fmt: skip
        kept = rollout.ids_BT[0][rollout.mask_BT[0]].tolist()
        answer = str(tokenizer.decode(kept, skip_special_tokens=True)).strip()
        turns.append(("assistant", answer))
        console.print(f"{stage}> {answer}" + ("" if rollout.stopped_B[0] else " …"), highlight=False, markup=False)
