"""One recorder for all scripts: runs main and keeps what every step was given and what it did.

As a program (python tests/recorder.py SCRIPT JSON) it makes recorded runs as one of several
processes: JSON is a list of {"argv", and as they are needed "bare", "stop", "calls"}. Each run
leaves <out>.rank<k>: the steps of process k, and how its networks were wrapped.
"""

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

for folder in (Path(__file__).resolve().parents[1], Path(__file__).resolve().parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import pytest  # noqa: E402
import torch  # noqa: E402
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import tiny  # noqa: E402
from common import run  # noqa: E402
from processes import digest, in_one_group  # noqa: E402


def copied(value):
    """Returns a copy of tensors and plain values, of lists and dicts of them; None of the rest."""
    if torch.is_tensor(value):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [copied(part) for part in value]
    return value if isinstance(value, (int, float, str)) else None


def listen(networks, passes, active=lambda entry: True):
    """Appends an entry to `passes` for each forward pass of {name: network}, while it is active."""
    for name, net in networks.items():

        def saw(module, inputs, out, name=name):
            modes = sorted({part.training for part in module.modules()})
            entry = dict(net=name, training=modes, grad=torch.is_grad_enabled())
            entry["image"] = copied(inputs[0])
            if active(entry):
                passes().append(entry | copied(out))

        net.register_forward_hook(saw)


def watch(patch, script, argv, calls=()):
    """Runs main; returns networks and state as they began, a list of steps, and what was scored.

    A step: batch {stream: tensors}, seen (an entry for each forward pass in training), grads (all
    parameters that have one), attached (names of parameters with a gradient that no optimizer
    has), nets and state (after it), parts, spent, reduced (how often gradients went over all
    processes), maps (of its panels), calls {name of the script's function: [(inputs, result)]}.
    scored: [(digest of the network, modes of its parts while it is scored)].
    """
    found = SimpleNamespace(networks={}, state={}, start=None, wrapped=[], steps=[], scored=[])
    live = SimpleNamespace(networks={}, state={}, scoring=False, done=None)
    whole = {name: getattr(script, name) for name in ("parallel", "open_stream", "evaluate")}
    whole |= {name: getattr(run.Run, name) for name in ("restore", "step", "panels")}

    def begin():
        empty = dict(batch={}, seen=[], grads={}, attached=[], reduced=[], maps={}, calls={})
        found.steps.append(SimpleNamespace(**empty))

    def restore(self, networks, optimizer, state):
        found.start = whole["restore"](self, networks, optimizer, state)
        found.networks = copy.deepcopy(networks)
        found.state = copied(state)
        live.networks = networks
        live.state = state
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}

        def active(entry):
            if live.scoring:
                found.scored[-1][1].update(entry["training"])
            return not live.scoring

        def before(*_):
            step = found.steps[-1]
            for name, net in networks.items():
                for key, p in net.named_parameters():
                    if p.grad is not None:
                        step.grads[f"{name}.{key}"] = p.grad.clone()
                    if id(p) not in trained and (p.requires_grad or p.grad is not None):
                        step.attached.append(f"{name}.{key}")

        listen(networks, lambda: found.steps[-1].seen, active)
        optimizer.register_step_pre_hook(before)
        return found.start

    def parallel(net, args, group):
        made = whole["parallel"](net, args, group)
        found.wrapped.append(type(made).__name__)
        if isinstance(made, DistributedDataParallel):

            def count(state, bucket):
                found.steps[-1].reduced.append(bucket.index())
                return allreduce_hook(None, bucket)

            made.register_comm_hook(None, count)
        return made

    def open_stream(name, *rest):
        for batch in whole["open_stream"](name, *rest):
            found.steps[-1].batch[name] = copied(batch)
            yield batch

    def evaluate(net, *rest):
        found.scored.append((digest({"": net}), set()))
        live.scoring = True
        result = whole["evaluate"](net, *rest)
        live.scoring = False
        return result

    def step(self, number, parts, lr, began, spent):
        live.done = found.steps[-1]
        live.done.parts = {name: x.item() for name, x in parts.items()}
        live.done.spent = dict(spent)
        live.done.state = copied(live.state)
        live.done.nets = {k: copied(net.state_dict()) for k, net in live.networks.items()}
        live.done.random = torch.rand(1).item()
        whole["step"](self, number, parts, lr, began, spent)
        begin()

    def panels(self, name, maps):
        if name.endswith("-train"):
            live.done.maps = copied(maps)
        whole["panels"](self, name, maps)

    def noting(name, function):
        def noted(*inputs):
            given = copied(inputs)
            result = function(*inputs)
            seen = found.steps[-1].calls.setdefault(name, [])
            seen.append((given, copied(result)))
            return result

        return noted

    for name in calls:
        patch.setattr(script, name, noting(name, getattr(script, name)))
    for function in (parallel, open_stream, evaluate):
        patch.setattr(script, function.__name__, function)
    for function in (restore, step, panels):
        patch.setattr(run.Run, function.__name__, function)
    begin()
    tiny.train(script, argv)
    found.steps.pop()
    return found


def stop_in(patch, stop):
    """Lets a run be interrupted in a step, before anything of it is logged."""
    whole = run.Run.step

    def step(self, number, *rest):
        if number == stop:
            raise KeyboardInterrupt
        whole(self, number, *rest)

    patch.setattr(run.Run, "step", step)


def make(script, argv, bare=False, stop=0, calls=()):
    """Makes one run of a process group, recorded, or interrupted in step `stop`."""
    with pytest.MonkeyPatch.context() as patch:
        tiny.shrink(script, patch, bare)
        if stop:
            stop_in(patch, stop)
            with pytest.raises(KeyboardInterrupt):
                tiny.train(script, argv)
            return
        found = watch(patch, script, argv, calls)
    steps = [vars(step) for step in found.steps]
    out = argv[argv.index("--out") + 1]
    rank = torch.distributed.get_rank()
    torch.save({"wrapped": found.wrapped, "steps": steps}, f"{out}.rank{rank}")


def left_by(out, ranks=(0, 1)):
    """Returns how the networks of a run were wrapped, and the steps of each of its processes."""
    saved = [torch.load(f"{out}.rank{rank}", weights_only=True) for rank in ranks]
    steps = [[SimpleNamespace(**step) for step in one["steps"]] for one in saved]
    return [one["wrapped"] for one in saved], steps


if __name__ == "__main__":
    name, jobs = sys.argv[1:]
    script = tiny.script(name)
    in_one_group(script, [lambda job=job: make(script, **job) for job in json.loads(jobs)])
