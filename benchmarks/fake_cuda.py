"""CUDA tensors without a GPU: shapes, types, devices and bytes, no numbers.

Under `FakeCuda` a script's `main` runs on torch.device("cuda", 0) on any machine. Tensors on the
CPU are real, those on the device are torch's fake tensors, which know what CUDA would have said of
their devices and types. The mode notes what would make the host wait for the device, operations
that meet floats of two types, and how many bytes are alive.

Needs torch 2.9 or newer, and is tested with the newest alone: it leans on how autograd and autocast
ask a tensor for its device.
"""

import contextlib
import linecache
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import steps  # noqa: E402
from common.distributed import Group  # noqa: E402

GPU, MPS, META = torch.device("cuda", 0), torch.device("mps", 0), torch.device("meta")
# kernels that are made for two types: BN of bfloat16 with parameters in float32, and copies
MADE_FOR_TWO = {"native_batch_norm", "native_batch_norm_backward", "_to_copy", "copy_"}
# what the host has to wait for: a number, or a result whose size depends on numbers
SIZED_BY_NUMBERS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2"}


class Seen(NamedTuple):
    """One thing that the mode noted, and the line of the product that did it."""

    what: str
    where: str


class FakeCuda(TorchDispatchMode):
    """Runs what touches the device on fake tensors; see the top of the file.

    waits: where the host would wait for the device (Seen). mixed: where floats of two types meet.
    wide: where float64 comes onto the device. peak, live: bytes.
    """

    def __init__(self, device=GPU):
        super().__init__()
        self.device, self.fake = device, FakeTensorMode(allow_non_fake_inputs=True)
        self.waits, self.mixed, self.wide = [], [], []
        self.operations = Counter()
        self.live = self.peak = 0
        self.truthful = False  # what a tensor answers when C++ asks for its device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            # autograd's engine would want a stream of a real device; only Python has to see CUDA
            return self.device if self.truthful else META
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == META:  # made by C++ like a fake tensor
            kwargs["device"] = self.device
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        fakes = [x for x in tensors if isinstance(x, FakeTensor)]
        devices = [x for x in leaves if isinstance(x, torch.device)]
        if not fakes and self.device not in devices:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        self.operations[name] += 1
        self.look(func, name, args, kwargs, tensors)
        if fakes and kwargs.get("device") == torch.device("cpu"):
            (x,) = fakes
            return torch.zeros(x.shape, dtype=kwargs.get("dtype") or x.dtype)
        with self.fake:
            result = func(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, FakeTensor):
                self.count(x.untyped_storage())
                if x.dtype == torch.float64:
                    self.wide.append(Seen(name, where()))
        return result

    def look(self, func, name, args, kwargs, tensors):
        """Notes what is wrong with an operation before it runs."""
        to_cpu = name == "_to_copy" and kwargs.get("device") == torch.device("cpu")
        to_device = name == "_to_copy" and not isinstance(args[0], FakeTensor)
        if to_cpu or to_device and not kwargs.get("non_blocking"):
            self.waits.append(Seen(f"copy to {kwargs['device'].type}", where()))
        if name in SIZED_BY_NUMBERS or name in ("index", "index_put_") and boolean(args[1]):
            self.waits.append(Seen(name, where()))  # and torch's fake tensors raise
        if name not in MADE_FOR_TWO:
            self.compare(name, tensors)

    def compare(self, name, tensors):
        """Notes an operation that meets floats of two types; scalars take the type of the rest."""
        floats = {x.dtype for x in tensors if x.is_floating_point() and x.ndim}
        if len(floats) > 1:
            kinds = " and ".join(sorted(str(x).removeprefix("torch.") for x in floats))
            self.mixed.append(Seen(f"{name} of {kinds}", where()))

    def count(self, storage):
        """Adds a new storage to the bytes alive, until it is let go."""
        known = self.__dict__.setdefault("known", set())
        if storage._cdata in known:
            return
        size = -(-storage.nbytes() // 512) * 512  # the allocator's smallest block
        known.add(storage._cdata)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.forget, storage._cdata, size)

    def forget(self, which, size):
        """A storage is gone."""
        self.known.discard(which)
        self.live -= size


class Autocast(TorchFunctionMode):
    """Casts as autocast on CUDA does: torch is asked with shapes alone, and its answer followed.

    Autocast wants tensors that say they are on CUDA, autograd's engine wants that they don't: so a
    call is tried first without a graph by tensors that do, then made with its floats in the type
    that came out.
    """

    def __init__(self, mode, enabled=True):
        super().__init__()
        self.mode, self.enabled = mode, enabled

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.enabled:  # nor is the one around it
            with torch._C.DisableTorchFunction():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)]
        if not leaves or name in KEPT or name.endswith("_"):
            return func(*args, **kwargs)
        maps = [x for x in leaves if not isinstance(x, torch.nn.Parameter)]
        self.mode.compare(name, maps)
        wanted = self.tried(func, args, kwargs)

        def cast(x):
            fake = isinstance(x, FakeTensor) and x.is_floating_point() and x.ndim
            return x.to(wanted) if fake and wanted else x

        return func(*tree_map(cast, args), **tree_map(cast, kwargs))

    def tried(self, func, args, kwargs):
        """Returns the float type of a call's result under autocast, or None if it has none."""
        mode = self.mode
        before = mode.waits[:], mode.mixed[:], mode.wide[:], mode.operations.copy(), mode.peak
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        mode.truthful = True
        try:
            with torch.no_grad():
                result = func(*args, **kwargs)
        finally:
            mode.truthful = False
            torch.set_autocast_enabled("cuda", False)
            mode.waits, mode.mixed, mode.wide, mode.operations, mode.peak = before
        floats = [x for x in tree_leaves(result) if isinstance(x, FakeTensor)]
        kinds = {x.dtype for x in floats if x.is_floating_point()}
        return kinds.pop() if len(kinds) == 1 else None


def boolean(indices):
    """Returns whether a mask is among the indices of x[...]."""
    return any(x is not None and x.dtype == torch.bool for x in indices)


# what autocast leaves alone and cannot be tried: BN's parameters stay float32, casts are the point
KEPT = {"batch_norm", "to", "float", "double", "backward", "__get__", "__set__", "__setitem__"}


def where():
    """Returns the lines of the product that are at work, the innermost first."""
    frame, lines = sys._getframe(1), []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        installed = "site-packages" in path.parts  # an environment may lie in the checkout
        tool = path.parent.name in ("benchmarks", "tests")
        if path.is_relative_to(ROOT) and not installed and not tool:
            line = linecache.getline(str(path), frame.f_lineno).strip()
            words = f"{path.name}: {line}"
            if words not in lines[-1:]:  # a comprehension has a frame of its own
                lines.append(words)
        frame = frame.f_back
    return " < ".join(lines)


@contextlib.contextmanager
def fake_cuda(device=GPU):
    """A context that holds a FakeCuda in which a script's `main` can run; device: GPU or MPS."""
    mode = FakeCuda(device)

    @contextlib.contextmanager
    def autocast(device, dtype=None, enabled=True):
        """In place of torch.autocast, which refuses a device that is not there."""
        with Autocast(mode, enabled):
            yield

    tensor = torch.tensor

    def through_the_host(data, device=None, **more):
        """In place of torch.tensor, which asks the driver: what it does, and waits for."""
        made = tensor(data, **more)
        return made if device is None else made.to(device)

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(torch.cuda, "_lazy_init", lambda: None))
        stack.enter_context(patch.object(torch, "tensor", through_the_host))
        stack.enter_context(patch.object(torch.Tensor, "pin_memory", lambda x: x))
        stack.enter_context(patch.object(torch, "autocast", autocast))
        torch.set_autocast_cache_enabled(False)  # it would cast weights with a graph
        stack.callback(torch.set_autocast_cache_enabled, True)
        stack.enter_context(mode)
        yield mode


def fake_steps(name, flags, count=2, device=GPU, **more):
    """Takes steps of a script on fake tensors of a device; returns the mode, which has seen them.

    What stands before the first step (weights, banks, K-means of esl.py) may wait and is not noted.
    """
    with fake_cuda(device) as mode:

        def begin(watch):
            mode.waits.clear()

        steps.take(name, flags, Group(0, 1, device), count, before=begin, **more)
    return mode
