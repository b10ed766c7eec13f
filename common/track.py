"""What a run logs, shown elsewhere too: TensorBoard, trackio, Weights & Biases.

log.jsonl has it all. One face for the three; each is imported only when its flag asks for it.
"""

import importlib.util
import secrets

import numpy as np
from PIL import Image

from common import Refusal
from common.flags import acting


def require(args):
    """Raises Refusal if what --tensorboard or --track names is not installed."""
    wanted = {}
    if args.tensorboard:
        wanted["--tensorboard"] = "tensorboard"
    if args.track != "none":
        wanted[f"--track {args.track}"] = args.track
    for flag, module in wanted.items():
        found = importlib.util.find_spec(module)
        if not found or not found.origin:  # a mere folder of this name, as wandb makes one
            raise Refusal(f"{flag}: not installed; pip install {module}")


class Tracker:
    """Writes a run's numbers and panels to what --tensorboard and --track name, if they do."""

    def __init__(self, args, folder, begin, classes):
        """folder: the run's. begin: the step it goes on from. classes: names. Raises Refusal."""
        self.classes = classes
        self.board = None
        self.tracking = None  # the module, trackio or wandb: what is used of them has one form
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder), purge_step=begin + 1)
        if args.track != "none":
            self.tracking = importlib.import_module(args.track)
            self._begin(args, folder, begin)

    def _begin(self, args, folder, begin):
        """Begins a run of the folder's name in a project of the data set's, or goes on with it."""
        facts = {"project": args.dataset, "name": folder.name, "config": acting(args)}
        if args.track == "trackio":
            facts["resume"] = "allow" if begin else "never"
        else:
            path = folder / "wandb-id"
            if not path.exists():
                path.write_text(secrets.token_hex(8))
            facts.update(id=path.read_text(), resume="allow", dir=str(folder))
        try:
            self.tracking.init(**facts)
        except Exception as error:  # no login, no network
            line = " ".join(str(error).split())[:200] or type(error).__name__
            raise Refusal(f"--track {args.track}: {line}; left out, log.jsonl has all") from None

    def numbers(self, kind, values, step):
        """Takes what a line of the log has, {name: number, list of IoU, or scores}."""
        found = named(kind, values, self.classes)
        if self.board:
            for name, value in found.items():
                self.board.add_scalar(name, value, step)
        if self.tracking:
            self.tracking.log(found, step=step)

    def picture(self, path):
        """Takes panels/STEP-WHAT.png of the run folder."""
        step, _, what = path.stem.partition("-")
        name = f"panels/{what}"
        if self.board:
            with Image.open(path) as picture:
                self.board.add_image(name, np.array(picture), int(step), dataformats="HWC")
        if self.tracking:
            self.tracking.log({name: self.tracking.Image(str(path))}, step=int(step))

    def close(self):
        """Writes what is left."""
        if self.board:
            self.board.close()
        if self.tracking:
            self.tracking.finish()


def named(prefix, values, classes):
    """Returns {prefix/name: number}: floats, and IoU of each class that is there."""
    found = {}
    for name, value in values.items():
        if isinstance(value, float):
            found[f"{prefix}/{name}"] = value
        elif name == "iou":
            for label, iou in zip(classes, value, strict=True):
                if iou is not None:
                    found[f"{prefix}/iou/{label}"] = iou
        elif name in ("last", "best"):
            found.update(named(f"{prefix}/{name}", value, classes))
    return found
