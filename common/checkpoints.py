"""Checkpoint files: written whole or not at all, checked when read, and what fits what."""

import contextlib
import os
import zipfile
from pathlib import Path

import torch

from common import Refusal

NEVER = 2**62  # later than any step
# what an optimizer keeps of a parameter
MOMENTA = {"SGD": ("momentum_buffer",), "AdamW": ("exp_avg", "exp_avg_sq", "step")}


def load_checkpoint(path, script=None):
    """Returns a checkpoint's dict, on the CPU (weights_only: no code is run).

    Raises Refusal if it is absent, damaged or, with script (a path), written by another script.
    """
    if os.path.isdir(path):  # of any path, where Path's raises for one too long
        raise Refusal(f"{path}: a folder; give its best.pt or last.pt")
    try:
        with zipfile.ZipFile(path) as file:
            if bad := file.testzip():  # torch.load does not check the sums
                raise ValueError(f"checksum of {bad}")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        writer = saved["script"]
        dict(saved["args"])
        dict(next(iter(saved["networks"].values())), step=saved["step"])
        dict((number, name) for number, name, _ in saved.get("classes", ()))
    except FileNotFoundError:
        raise Refusal(f"{path}: no such checkpoint") from None
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        line = f"damaged, or no checkpoint of these scripts ({line}); give another"
        raise Refusal(f"{path}: {line} (of a released code: results/released.py)") from None
    if script and writer != Path(script).name:
        wrong = f"written by {writer}, not by {Path(script).name}"
        raise Refusal(f"{path}: {wrong}; --init starts from it")
    return saved | {"path": str(path)}


def check_form(saved):
    """Raises Refusal, naming the part, if a checkpoint's dict cannot be one to go on from."""
    path = saved["path"]
    if "optimizer" not in saved:
        raise Refusal(f"{path}: a best.pt, which holds no optimizer; --init starts from it")
    forms = {
        "step": int,
        "optimizer": dict,
        "state": dict,
        "meter": torch.Tensor,
        "best": {"miou": float, "step": int},
        "time": {"elapsed_s": float},
        "lists": dict,
        "log": {"bytes": int, "sha256": str},
    }
    for name, form in forms.items():
        value = saved.get(name)
        if isinstance(form, dict):  # with these names
            fits = isinstance(value, dict)
            fits = fits and all(isinstance(value.get(key), kind) for key, kind in form.items())
        else:
            fits = isinstance(value, form)
        if not fits:
            raise Refusal(f"{path}: its {name} is not valid for resuming; --init starts from it")
    best = saved["best"]
    none = best == {"miou": -1.0, "step": 0}
    if not (none or 0 <= best["miou"] <= 1 and 0 < best["step"] <= saved["step"]):
        raise Refusal(f"{path}: its best is not that of a run ({best}); --init starts from it")
    if saved["meter"].ndim != 1 or not saved["meter"].is_floating_point():
        raise Refusal(f"{path}: its meter is not valid for resuming; --init starts from it")


def check_classes(saved, data):
    """Raises Refusal, naming the first, if a class of a checkpoint has another name in data.

    A class without a name ("class 0") may be any, and checkpoints that name none pass.
    """
    for (number, there, _), here in zip(saved.get("classes", ()), data.classes, strict=False):
        if there != here and f"class {number}" not in (there, here):
            raise Refusal(
                f"{saved['path']}: class {number} is {there} there and {here} here: give the "
                "classes that it was trained with"
            )


def load_networks(saved, networks, data=None):
    """Fills {name: network} from a checkpoint's dict; returns its step. Raises Refusal.

    data: the Data whose classes have to be those of the checkpoint.
    """
    if data is not None:
        check_classes(saved, data)
    try:
        for name, net in networks.items():
            weights = saved["networks"][name]
            for key, own in net.state_dict().items():
                if key in weights and weights[key].dtype != own.dtype:  # it would be cast
                    raise TypeError(f"{key} of {name} is {weights[key].dtype}")
            net.load_state_dict(weights)
    except KeyError as error:
        raise Refusal(f"{saved['path']}: it holds no network {error}") from None
    except (RuntimeError, TypeError, AttributeError) as error:
        line = f"does not fit these flags ({' '.join(str(error).split())[:150]})"
        raise Refusal(f"{saved['path']}: {line}; give those that it was trained with") from None
    return saved["step"]


def load_optimizer(saved, optimizer):
    """Fills an optimizer, SGD or AdamW, from a checkpoint's dict: its momenta alone are taken.

    Raises Refusal if a parameter has none, or if a group is another, but for its rate and for what
    it lacks.
    """
    content = saved["optimizer"]
    own = optimizer.state_dict()["param_groups"]
    try:
        for number, (group, wanted) in enumerate(zip(content["param_groups"], own, strict=True)):
            for name, value in wanted.items():
                if name != "lr" and group.get(name, value) != value:  # newer torch: more names
                    raise ValueError(f"{name} of its group {number} is {group.get(name)}")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for number, p in enumerate(parameters):  # all of them have had a gradient
            for name in MOMENTA[type(optimizer).__name__]:
                momentum = content["state"][number][name]
                shape = torch.Size() if name == "step" else p.shape
                if (momentum.shape, momentum.dtype) != (shape, p.dtype):
                    shape = tuple(momentum.shape)
                    raise ValueError(f"a momentum of shape {shape}, {momentum.dtype}")
        optimizer.load_state_dict({"state": content["state"], "param_groups": own})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        wrong = " ".join(str(error).split()) or "no dict"
        raise Refusal(f"{saved['path']}: its optimizer is not that of this run ({wrong})") from None


def load_state(saved, state):
    """Fills a method's state, {name: tensor}, in place. Raises Refusal."""
    values = saved["state"]
    if not isinstance(values, dict) or set(values) != set(state):
        raise Refusal(f"{saved['path']}: its state is not that of this run ({', '.join(state)})")
    for name, value in values.items():
        own = state[name]
        if not torch.is_tensor(value) or (value.shape, value.dtype) != (own.shape, own.dtype):
            raise Refusal(f"{saved['path']}: its state {name} is not that of this run")
        state[name] = value.to(own.device)


def load_init(path, networks, data):
    """Starts networks from a checkpoint of any of these scripts; returns in words what was taken.

    data: the Data to learn. Each takes the network of its name, or else the first. A head that does
    not fit, or of classes of other names, stays random; so does that of a second network which
    trains and would equal the first: such a pair never disagrees.
    """
    saved = load_checkpoint(path)
    names = [name for _, name, _ in saved.get("classes", data.named())]  # older ones name none
    sentences = []
    used = set()
    for name, net in networks.items():
        source = name
        if name not in saved["networks"]:
            source = next(iter(saved["networks"]))
        trains = any(p.requires_grad for p in net.parameters())
        equal = source in used and trains
        used.add(source)
        weights = saved["networks"][source]
        own_head = head_of(net.state_dict())
        why = ""  # the head stays random
        if names != data.classes:
            why = ", head random (other classes)"
        elif shapes(head_of(weights)) != shapes(own_head):
            why = ", head random (another head)"
        elif equal:
            why = ", head random (or both would be equal)"
        if why:
            weights = {k: v for k, v in weights.items() if not k.startswith("head.")} | own_head
        load_networks(saved | {"networks": {name: weights}}, {name: net})
        sentences.append(f"{name} from its {source}{why}")
    return f"{path}, step {saved['step']}: {'; '.join(sentences)}"


def head_of(weights):
    """Returns the part of a network's state dict that is its head."""
    return {name: value for name, value in weights.items() if name.startswith("head.")}


def shapes(weights):
    """Returns {name: shape} of a state dict."""
    return {name: value.shape for name, value in weights.items()}


def write_checkpoint(path, content, previous=None):
    """Writes beside the file, then renames: a kill leaves the old one, the new one, or both.

    previous: where the file that stands there goes, if it is to be kept. Raises Refusal.
    """
    new = path.with_suffix(".tmp")
    with writing(path, new):
        with open(new, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(new, path)


@contextlib.contextmanager
def writing(path, new=None):
    """What cannot be written becomes a Refusal that names it; the file `new` is removed."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save's
        if not isinstance(cause, OSError):
            raise
        with contextlib.suppress(OSError):
            if new:
                new.unlink()
        why = f"cannot be written ({cause.strerror or cause})"
        raise Refusal(f"{path}: {why}; what was saved before is whole") from None


def check_finite(bad_step):
    """Raises Refusal if bad_step, the first with a number that is not finite, is not NEVER."""
    if bad_step < NEVER:
        wrong = f"loss or weights not finite at step {bad_step}: nothing saved since"
        raise Refusal(f"{wrong}; a lower --lr, or --resume")


def check_tensors(step, networks, state=()):
    """Raises Refusal, naming step, if a network or a tensor of state is not finite."""
    tensors = [v for net in networks.values() for v in net.state_dict().values()]
    tensors += [v for v in dict(state).values() if torch.is_tensor(v)]
    device = tensors[0].device
    fine = torch.stack([v.isfinite().all().to(device, non_blocking=True) for v in tensors])
    if not fine.all():
        check_finite(step)
