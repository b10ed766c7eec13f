"""The process group: torchrun's environment if there is one, else a single process."""

import contextlib
import os
import signal
import sys
import time
from multiprocessing import queues
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ReduceOp

from common import Refusal

CPUINFO = Path("/proc/cpuinfo")  # Linux's


class Group(NamedTuple):
    """This process among all: rank in [0, world), and the device that it computes on."""

    rank: int
    world: int
    device: torch.device


def setup(device="auto"):
    """Returns the Group; joins torchrun's process group (NCCL, or gloo on CPU) if there is one.

    device: auto, cpu, cuda or mps (untested); auto takes CUDA where it is. Raises Refusal if a
    device is asked for and absent, or not of the kind of process 0's, or if torchrun's environment
    is incomplete.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # --deterministic needs it
    if device == "cuda" and not torch.cuda.is_available():
        raise Refusal("--device cuda: torch sees no CUDA device here; leave --device out")
    if device == "mps" and not torch.backends.mps.is_available():
        raise Refusal("--device mps: torch sees no MPS device here; leave --device out")
    if device == "mps" and "RANK" in os.environ:
        raise Refusal("--device mps: one process alone; leave torchrun out")
    if device == "mps":
        return Group(0, 1, torch.device("mps"))
    cuda = device != "cpu" and torch.cuda.is_available()
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
        if tasks != "1":
            line = f"one of {tasks} processes, a run of its own; as one run: torchrun, not srun"
            print(f"note: {line}", file=sys.stderr, flush=True)
        return Group(0, 1, device_of(cuda, 0))
    numbers = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"]
    wrong = [n for n in numbers if not os.environ.get(n, "").isdecimal()]
    if not os.environ.get("MASTER_ADDR"):
        wrong.append("MASTER_ADDR")
    if not wrong:
        rank, world, local, port = (int(os.environ[n]) for n in numbers)
        if rank >= world:
            wrong.append("RANK, WORLD_SIZE")
        if port > 65535:
            wrong.append("MASTER_PORT")
    if wrong:
        raise Refusal(f"{', '.join(wrong)} not set as torchrun does: start with torchrun")
    device = device_of(cuda, local)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"  # gloo: what hosts agree on
    try:
        store = fresh_store(rank, world)
    except RuntimeError as error:  # in torch 2.6 not always a DistError
        where = f"{os.environ['MASTER_ADDR']}:{port}"
        line = f"{str(error).splitlines()[0][:150]}; is another run there, or a machine missing?"
        raise Refusal(f"MASTER_ADDR:MASTER_PORT {where}: {line}") from None
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    if from_first(cuda) != cuda:
        wrong = "process 0 has another kind of device than this one"
        raise Refusal(f"--device auto: {wrong}: --device cuda, or cpu, for all")
    return Group(rank, world, device)


def device_of(cuda, local):
    """Returns the CPU, or the GPU of a process of this machine. Raises Refusal if it has none."""
    if not cuda:
        return torch.device("cpu")
    if local >= torch.cuda.device_count():
        have = f"this machine has {torch.cuda.device_count()}: fewer, or --device cpu"
        raise Refusal(f"no GPU for process {local}, {have}")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def bf16_instructions():
    """Returns the instructions for bf16 of this CPU as Linux names them; None on other systems."""
    if not CPUINFO.is_file():
        return None
    return sorted({"amx_bf16", "avx512_bf16", "bf16"}.intersection(CPUINFO.read_text().split()))


def slow_bf16(amp, device):
    """Returns a note where --amp bf16 slows a CPU down, as far as that is known; else nothing."""
    if amp == "bf16" and device.type == "cpu" and bf16_instructions() == []:
        return "--amp bf16: this CPU seems to have no instructions for it: try --amp none"
    return ""


def need_float64(group, what):
    """Raises Refusal on MPS, which has no float64. what: the part of a script that wants it."""
    if group.device.type == "mps":
        raise Refusal(f"--device mps: {what} in float64, which MPS does not have: --device cpu")


def fresh_store(rank, world):
    """Returns a store of this start alone: torchrun's keeps addresses of processes that it ended.

    Process 0 answers the word of each other process, new at every start, with its own.
    """
    store, *_ = next(dist.rendezvous("env://", rank, world))
    word = uuid4().hex
    if rank:
        store.set(f"ask {rank}", word)
        answer = store.get(f"answer {word}").decode()
        store.set(f"thanks {answer} {rank}", "")
        return dist.PrefixStore(answer, store)
    waiting = set(range(1, world))
    while waiting:  # an older word may stand in a place until its process is there
        for other in waiting:
            store.set(f"answer {store.get(f'ask {other}').decode()}", word)
        time.sleep(0.01)
        waiting -= {other for other in waiting if store.check([f"thanks {word} {other}"])}
    return dist.PrefixStore(word, store)


def unstoppable(worker):
    """For worker_init_fn: a loader process leaves signals to the process that trains.

    It ends where it cannot hand on a batch, which Python drops: that process would wait for ever.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    queues.Queue._on_queue_feeder_error = staticmethod(end_loader)


def end_loader(error, batch):
    """Ends a loader process in one line."""
    print(
        f"a loader cannot hand on a batch: {error}" + ": a shorter TMPDIR" * ("UNIX" in str(error)),
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def teardown():
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def share(batch, group, name):
    """Returns this process's share of a global batch; raises Refusal if there is a remainder."""
    if batch < 1 or batch % group.world:
        wrong = f"{batch} {name} images do not divide over {group.world} processes"
        raise Refusal(f"{wrong}: change the batch size or their number")
    return batch // group.world


def layout(device):
    """Returns the memory format for images and weights on a device: channels last.

    But on MPS, where BN's gradients of channels last may be wrong (pytorch's issue 175189).
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def sync_bn(net):
    """Returns a Network with SyncBN for BN; its weights, keys and modes stay.

    timm's BN may hold the activation that follows it, which torch's conversion would drop.
    """
    if hasattr(net.backbone, "feature_info"):  # timm's
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(net)
    return nn.SyncBatchNorm.convert_sync_batchnorm(net)


def check_bn(nets, name, batch, group):
    """Raises Refusal where plain BN would see one image; on CUDA SyncBN sees all processes'."""
    images = share(batch, group, name)
    synced = group.world > 1 and group.device.type == "cuda"
    modules = (module for net in nets for module in net.modules())
    norms = [module for module in modules if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if norms and images < 2 and not synced:
        raise Refusal(f"{images} {name} image per process: plain BN needs two, enlarge the batch")


def reduced(tensor, op=ReduceOp.SUM):
    """Returns the tensor summed (or op) over all processes, in place; never a loss with a graph."""
    assert not tensor.requires_grad, "a loss is never reduced over processes before backward"
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def gathered(tensor):
    """Returns the tensors of all processes, of one shape, in the order of ranks: (world, ...)."""
    assert not tensor.requires_grad, "other processes' tensors bring no gradient back"
    if not dist.is_initialized():
        return tensor[None]
    every = tensor.new_empty(dist.get_world_size(), *tensor.shape)
    dist.all_gather(list(every.unbind()), tensor.contiguous())
    return every


def to_host(*tensors):
    """Returns tensors on the CPU, moved as one copy of their bytes: one wait for the device.

    Wider types come first: a view as such a type needs aligned bytes.
    """
    packed = torch.cat([x.contiguous().flatten().view(torch.uint8) for x in tensors]).cpu()
    parts = packed.split([x.nbytes for x in tensors])
    return [part.view(x.dtype).view(x.shape) for part, x in zip(parts, tensors, strict=True)]


def to_device(array, group):
    """Returns an array or tensor of the CPU on the device, without waiting for the device."""
    tensor = torch.as_tensor(array)
    if group.device.type == "cuda":  # on MPS a copy that nobody waits for may read what is freed
        return tensor.pin_memory().to(group.device, non_blocking=True)
    return tensor.to(group.device)


def no_sync(net):
    """Returns a context in which backward leaves a DDP network's gradients to a later backward."""
    if hasattr(net, "no_sync"):
        return net.no_sync()
    return contextlib.nullcontext()


def from_first(value):
    """Returns process 0's value (any small Python object) on every process."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def copy_buffers(*modules):
    """Copies the buffers of process 0 (running statistics of plain BN) to all processes."""
    for buffer in (buffer for module in modules for buffer in module.buffers()):
        dist.broadcast(buffer, src=0)
