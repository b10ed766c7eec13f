"""One recorder for all scripts: runs main and keeps what every step was given and what it did.

As a program of processes.Forked (recorder.py SCRIPT JSON) it makes recorded runs as one of several
processes: JSON is a list of what `watched` or `stopped` take beside the name. A recorded run leaves
<out>.rank<k>: the steps of process k.
"""

import copy
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import tiny
from benchmarks.runs import flat
from common import distributed, run
from processes import digest


def copied(value):
    """Returns a copy of a tensor, or of a dict of them."""
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    return value.detach().clone()


def listen(networks, heard):
    """Calls heard(entry) after each forward pass of {name: network}: what went in and came out."""
    for name, net in networks.items():

        def saw(module, inputs, out, name=name):
            modes = sorted({part.training for part in module.modules()})
            entry = dict(net=name, training=modes, grad=torch.is_grad_enabled())
            heard(entry | {"image": copied(inputs[0])} | copied(out))

        net.register_forward_hook(saw)


def assert_close(mine, theirs, rel):
    """All leaves are equal, floats up to rel of the largest of their tensor; None: any tensor."""
    mine, theirs = flat(mine), flat(theirs)
    assert mine.keys() == theirs.keys()
    for name, x in mine.items():
        other = theirs[name]
        if not torch.is_tensor(other):
            assert other is None or x == other, name
            continue
        assert (x.dtype, x.shape) == (other.dtype, other.shape), name
        scale = other.double().abs().max().item()
        distance = (x.double() - other.double()).abs().max().item()
        assert distance <= (rel * scale if x.is_floating_point() else 0), name


def watch(patch, script, argv):
    """Runs main; returns networks and state as they began, a list of steps, and what was scored.

    A step: batch {stream: tensors}, seen (an entry for each forward pass in training), grads (all
    parameters that have one), nets and state (after it), parts, spent, reduced (how often gradients
    went over all processes), random (the state), maps (of its panels).
    scored: [(digest of the network, modes of its parts while it is scored)].
    """
    found = SimpleNamespace(networks={}, state={}, steps=[], scored=[])
    live = SimpleNamespace(networks={}, state={}, scoring=False)

    def begin():
        found.steps.append(SimpleNamespace(batch={}, seen=[], grads={}, reduced=[], maps={}))

    def heard(entry):
        if live.scoring:
            found.scored[-1][1].update(entry["training"])
        else:
            found.steps[-1].seen.append(entry)

    def restore(whole, self, networks, optimizer, state):
        start = whole(self, networks, optimizer, state)
        found.networks, found.state = copy.deepcopy(networks), copied(state)
        live.networks, live.state = networks, state

        def before(*_):
            for key, p in torch.nn.ModuleDict(networks).named_parameters():
                if p.grad is not None:
                    found.steps[-1].grads[key] = p.grad.clone()

        listen(networks, heard)
        optimizer.register_step_pre_hook(before)
        return start

    def parallel(whole, net, args, group):
        made = whole(net, args, group)

        def count(state, bucket):
            found.steps[-1].reduced.append(bucket.index())
            return allreduce_hook(None, bucket)

        if isinstance(made, DistributedDataParallel):
            made.register_comm_hook(None, count)
        return made

    def open_stream(whole, name, *rest):
        for batch in whole(name, *rest):
            found.steps[-1].batch[name] = copied(batch)
            yield batch

    def evaluate(whole, net, *rest):
        found.scored.append((digest({"": net}), set()))
        live.scoring = True
        result = whole(net, *rest)
        live.scoring = False
        return result

    def log_step(whole, self, number, parts, lr, began, spent):
        step = found.steps[-1]
        step.parts = {name: x.item() for name, x in parts.items()}
        step.spent = dict(spent)
        step.state = copied(live.state)
        step.nets = {name: copied(net.state_dict()) for name, net in live.networks.items()}
        step.random = torch.get_rng_state().tolist()
        whole(self, number, parts, lr, began, spent)
        begin()

    def panels(whole, self, name, maps):
        if name.endswith("-train"):
            found.steps[-2].maps = copied(maps)
        whole(self, name, maps)

    def around(owner, function):
        whole = getattr(owner, function.__name__)
        patch.setattr(owner, function.__name__, lambda *inputs: function(whole, *inputs))

    for function in (parallel, open_stream, evaluate):
        around(script, function)
    for function in (restore, log_step, panels):
        around(run.Run, function)
    begin()
    tiny.train(script, argv)
    found.steps.pop()
    return found


def watched(name, argv, bare=False):
    """Makes a run of the tiny script; returns what `watch` saw of it."""
    script = tiny.script(name)
    with pytest.MonkeyPatch.context() as patch:
        tiny.shrink(script, patch, bare)
        return watch(patch, script, argv)


def stopped(name, argv, stop):
    """Makes a run of the tiny script that is interrupted in a step, before that is logged."""
    whole = run.Run.log_step

    def log_step(self, number, *rest):
        if number == stop:
            raise KeyboardInterrupt
        whole(self, number, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.Run, "log_step", log_step)
        tiny.run(name, argv)


def left_by(out):
    """Returns the steps of a run's two processes."""
    saved = [torch.load(f"{out}.rank{rank}", weights_only=True) for rank in (0, 1)]
    return [[SimpleNamespace(**step) for step in steps] for steps in saved]


if __name__ == "__main__":
    name, jobs = sys.argv[1:]
    script, group = tiny.script(name), distributed.setup("cpu")
    script.distributed.setup = lambda device: group  # one for all of them
    script.distributed.teardown = lambda: None
    for job in json.loads(jobs):
        if "stop" in job:
            stopped(name, **job)
            continue
        steps = [vars(step) for step in watched(name, **job).steps]
        torch.save(steps, f"{tiny.resolved(script, job['argv']).out}.rank{group.rank}")
    torch.distributed.destroy_process_group()
