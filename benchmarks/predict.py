"""predict.py against a plain loop over the script's predict: images per second and peak memory.

python benchmarks/predict.py                          # 24 photographs of noise, 480x360
python benchmarks/predict.py --elsewhere 15           # the network on another device, 15 ms
python benchmarks/predict.py --width 8000 --height 6000 --images 1 --repeats 1 --classes 21

Both read the same JPEG files with the same network of random weights (ResNet-18, stride 16) and
write the same classes and overlays. The plain loop reads, predicts and writes one image after the
other; predict.py reads ahead and writes behind. Every run is a process of its own, the two in
turns; the median of the repeats is printed, with the largest resident memory of a process.

On a CPU the network takes nearly all of the time and there is little to overlap. --elsewhere puts a
wait in its place, as long as an accelerator would compute, during which both cores are free.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # before this folder, which has a predict.py too

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import predict  # noqa: E402
import supervised  # noqa: E402
from common import outputs  # noqa: E402
from common.checkpoints import write_checkpoint  # noqa: E402
from common.flags import acting, cli, merge  # noqa: E402
from common.run import refusals  # noqa: E402


@dataclass
class Options:
    """What is predicted, and how often."""

    images: int = 24
    width: int = 480  # pixels
    height: int = 360
    classes: int = 11
    repeats: int = 3
    threads: int = torch.get_num_threads()  # of the network
    maps: bool = False  # confidence and entropy too
    elsewhere: float = 0  # milliseconds that a stand-in for the network waits; 0: the network
    # run once in folder, print seconds and bytes
    child: Literal["", "plain", "overlapped"] = ""
    folder: str = ""


def draw(options, folder):
    """Writes the photographs, smooth noise, and a checkpoint."""
    (folder / "images").mkdir()
    for number in range(options.images):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 256, (options.height // 8, options.width // 8, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((options.width, options.height))
        image.save(folder / f"images/{number:04d}.jpg", quality=90)
    args = supervised.Args(
        dataset="folder", num_classes=options.classes, backbone="resnet18", weights="none"
    )
    args = merge(args, supervised.preset)
    args = replace(args, split="all")
    torch.manual_seed(0)
    group = predict.SimpleNamespace(world=1, device=torch.device("cpu"))
    net = supervised.build(args, options.classes, supervised.DeepLabV3Plus, group)
    content = dict(script="supervised.py", args=acting(args), step=1)
    write_checkpoint(folder / "net.pt", content | {"networks": {"student": net.state_dict()}})


class Elsewhere(torch.nn.Module):
    """Stands in for a network on another device: waits, and says class 0 or 1 by brightness.

    Upsampling and argmax are computed there too: `likeliest` takes the brightness as it is.
    """

    def __init__(self, seconds, classes):
        super().__init__()
        self.seconds = seconds
        self.classes = classes

    def forward(self, x, upsampled=True):
        time.sleep(self.seconds * len(x))
        if not upsampled:
            return {"logits": x}
        dark = x[:, :1].float() - 127
        return {"logits": torch.cat([dark, -dark, *[dark - 300] * (self.classes - 2)], 1)}

    def likeliest(self, x, size):
        """Returns the classes of images as forward(upsampled=False) leaves them."""
        return (x[:, 0] > 127).long()


def put_elsewhere(options):
    """Has predict.open_source return a Source whose network is the stand-in."""
    opened = predict.open_source
    net = Elsewhere(options.elsewhere / 1000, options.classes)
    supervised.likeliest = net.likeliest

    def open_source(*given):
        return opened(*given)._replace(net=net)

    predict.open_source = open_source


def plain(options, folder):
    """One image after the other."""
    source = predict.open_source(folder / "net.pt")
    kinds = ["classes", "overlays"]
    kinds += ["confidence", "entropy"] * options.maps
    writer = outputs.Writer(folder / "plain", kinds, source.data)
    writer.folder.mkdir()
    for item in outputs.find_images([str(folder / "images")], writer.folder):
        item, image, label = writer.read(item)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        (found,) = predict.segment(source, pixels, maps=options.maps)
        writer.write(item, image, label, found)


def overlapped(options, folder):
    """The command."""
    words = [str(folder / "net.pt"), str(folder / "images"), "--out", str(folder / "overlapped")]
    predict.main(words + ["--device", "cpu"] + ["--maps"] * options.maps)


def child(options):
    """Runs one of the two, and prints seconds and bytes as JSON."""
    torch.set_num_threads(options.threads)
    if options.elsewhere:
        put_elsewhere(options)
    begin = time.time()
    {"plain": plain, "overlapped": overlapped}[options.child](options, Path(options.folder))
    seconds = time.time() - begin
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([seconds, kibibytes * 1024]))


def main(options):
    """Draws, runs both in turns, and prints a line for each."""
    rows = {"plain": [], "overlapped": []}
    with tempfile.TemporaryDirectory() as name:
        draw(options, Path(name))
        for repeat in range(options.repeats):
            for kind in sorted(rows, reverse=bool(repeat % 2)):
                folder = Path(name) / kind
                if folder.exists():
                    folder.rename(Path(name) / f"{kind}-{repeat}")
                words = [f"--{key}={value}" for key, value in asdict(options).items()]
                words = [w for w in words if not w.startswith(("--maps", "--child", "--folder"))]
                words += ["--child", kind, "--folder", name, *["--maps"] * options.maps]
                done = subprocess.run(
                    [sys.executable, __file__, *words],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                rows[kind].append(json.loads(done.stdout.splitlines()[-1]))
    report(options, rows)


def report(options, rows):
    """Prints a line for each of the two, and the ratio of their medians."""
    size = f"{options.width}x{options.height}"
    network = f"waits {options.elsewhere} ms" if options.elsewhere else "computes here"
    print(f"{options.images} images of {size}, {options.threads} threads, the network {network}")
    medians = {}
    for kind, found in rows.items():
        seconds = sorted(row[0] for row in found)
        medians[kind] = statistics.median(seconds)
        memory = max(row[1] for row in found) / 2**30
        rate = options.images / medians[kind]
        spread = f"{seconds[0]:.2f} to {seconds[-1]:.2f} s"
        print(f"{kind:11} {rate:8.2f} images a second ({spread}), peak memory {memory:.2f} GiB")
    print(f"overlapped is {medians['plain'] / medians['overlapped']:.2f} times as fast")


if __name__ == "__main__":
    with refusals("start again"):
        options = cli(Options)
        if options.child:
            child(options)
        else:
            main(options)
