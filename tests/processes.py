"""What each process does that `test_parallel.py` and `test_uptrain_parallel.py` launch: python processes.py PART DIRECTORY."""

import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rounds  # noqa: F401 - as few as in the tests that compare
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from tiny import stock_model, tiny_checkpoint, tiny_sample, tiny_sites, tiny_tokens
from torch import Tensor
from transformers import TrainerCallback

from headfold import calibration, cli, parallel
from headfold.core.errors import UserError
from headfold.planning import make_plan
from headfold.refine import distill, heal
from headfold.refine import refit as refitting
from headfold.refine.heal import heal as healed
from headfold.refine.refit import refit
from headfold.surgery import query_order, site_heads
from headfold.verbs.uptrain import uptrain

BATCH_TOKENS = 64
CASES: dict[str, tuple[str, Mapping[str, Tensor]]] = {
    "even": ("llama", {"input_ids": tiny_tokens(64, 16)}),
    "uneven": ("llama", {"input_ids": tiny_tokens(11, 16)}),
    "one batch to train on": ("llama", {"input_ids": tiny_tokens(8, 16)}),
    "fewer batches than processes": ("llama", {"input_ids": tiny_tokens(4, 16)}),
    "padded": ("t5", tiny_sample("t5", 13)),
}
"""By name, a model and data: 16, 3, 2, 1 and 3 batches of `BATCH_TOKENS`, the last of "uneven" and "padded" smaller."""
TOKENS = 1536


def found(name: str, batch_tokens: int = BATCH_TOKENS, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Statistics, refit and healing of a case, by `what/site/field`."""
    calibration.TOKENS_PER_BATCH, heal.BATCH_TOKENS = BATCH_TOKENS, batch_tokens
    distill.BATCH_TOKENS = batch_tokens
    family, sample = CASES[name]
    directory = tiny_checkpoint(family)
    model, sites = stock_model(directory), [site for site, _ in tiny_sites(directory)]
    read = load_file(directory / "model.safetensors").__getitem__
    stats = calibration.collect(model, sites, sample)
    plan = make_plan(sites, read, 2, source="tiny", group="contiguous", merge="absorb", stats=stats)
    how: dict[str, Any] = {"order": lambda site: query_order(site, plan)}
    given = (model, sites, lambda site: site_heads(site, plan, read, stats), sample)
    results = {
        "statistics": {site: s.tensors for site, s in stats.items()},
        "refit": {site: fitted.to_tensors() for site, fitted in refit(*given, **how).items()},
        "heal": {site: fitted.to_tensors() for site, fitted in healed(*given, tokens=tokens, **how).items()},
    }
    results["distill"] = {site: f.to_tensors() for site, f in distill.distill(*given, tokens=tokens).items()}
    counts = {f"count/{site}": torch.tensor([float(s.count)]).double() for site, s in stats.items()}
    return counts | {
        f"{what}/{site}/{field}": tensor
        for what, by_site in results.items()
        for site, fields in by_site.items()
        for field, tensor in fields.items()
    }


def measure(directory: Path) -> None:
    """Every case, found together with the other processes."""
    for family, _ in CASES.values():
        tiny_checkpoint(family)  # together, transformers lets the first process alone write
    with parallel._joined():
        rank = parallel.rank()
        assert parallel.world_size() == 2
        for number, name in enumerate(CASES):
            save_file(
                {key: t.contiguous() for key, t in found(name).items()}, directory / f"{number}-{rank}.safetensors"
            )


def call(*words: str) -> tuple[object, str, str]:
    """`headfold WORDS`: exit code, stdout, stderr."""
    sys.argv[1:] = words
    code: object = 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            cli.main()
        except SystemExit as leaving:
            code = leaving.code or 0
    return code, out.getvalue(), err.getvalue()


def work(directory: Path) -> None:
    """Everything that ends well: a start takes longer than all of it."""
    measure(directory)
    command(directory)


def command(directory: Path) -> None:
    """In several batches, the command lines that lie in the directory, one after another; the first process's folder is its own."""
    rank = os.environ["RANK"]
    place = directory / "first" if rank == "0" else directory
    place.mkdir(exist_ok=True)
    calibration.TOKENS_PER_BATCH = heal.BATCH_TOKENS = BATCH_TOKENS
    os.chdir(place)
    answers = [call(*words) for words in json.loads((directory / "commands.json").read_text())]
    (directory / f"answers-{rank}.json").write_text(json.dumps(answers))


def die(directory: Path) -> None:
    """One command line, in which the second process is killed in the middle of the refit of the second site."""
    fit, sites = refitting.refit_values, []

    def until_killed(trial: Any, *arguments: Any) -> Any:
        sites.append(trial.site.name)
        if len(sites) == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return fit(trial, *arguments)

    refitting.refit_values, calibration.TOKENS_PER_BATCH = until_killed, BATCH_TOKENS
    sys.argv[1:] = json.loads((directory / "command.json").read_text())
    cli.main()


class Stopped(TrainerCallback):
    """A kill at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def train(directory: Path) -> None:
    """Command lines as in `command`; a run that is stopped; and one with sharded weights."""
    command(directory)
    how = json.loads((directory / "how.json").read_text())
    with contextlib.suppress(KeyboardInterrupt):
        uptrain(out=directory / "stopped", **how, callbacks=[Stopped(3)])
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    }  # fmt: skip
    AcceleratorState._reset_state()
    with contextlib.suppress(UserError):  # accelerate shards over accelerators alone
        uptrain(out=directory / "unsharded", **how)
    AcceleratorState.__init__ = _sharding_here
    AcceleratorState._reset_state()
    uptrain(out=directory / "sharded", **{**how, "train": "lora"})
    with contextlib.suppress(KeyboardInterrupt):
        uptrain(out=directory / "shards", **how, callbacks=[Stopped(3)])
    uptrain(out=directory / "shards", **how, resume=True)


def _sharding_here(self: Any, *given: Any, fsdp_plugin: Any = None, **more: Any) -> None:
    """As accelerate does it on accelerators; torch itself shards over gloo as well."""
    MADE(self, *given, fsdp_plugin=fsdp_plugin, **more)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


MADE = AcceleratorState.__init__


if __name__ == "__main__":
    torch.set_num_threads(1)
    part, place = sys.argv[1:]
    {"work": work, "die": die, "train": train}[part](Path(place))
