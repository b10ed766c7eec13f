"""predict.py against a plain loop over the script's predict: images per second and peak memory.

python benchmarks/predict.py                # 60 photographs of noise; results/predict.json
python benchmarks/predict.py --elsewhere 15 --out ""          # another device, 15 ms an image
python benchmarks/predict.py --width 8000 --height 6000 --images 1 --elsewhere 0 --out ""

Both read the same JPEG files with the same network of random weights (ResNet-18, stride 16) and
write the same classes and overlays. The plain loop reads, predicts and writes one image after the
other; predict.py reads ahead and writes behind. Every run is a process of its own, the two in
turns; the median of the repeats is printed and written, with the largest resident memory of a
process.

On a CPU the network takes nearly all of the time and there is little to overlap. --elsewhere puts a
wait in its place, as long as an accelerator would compute, during which both cores are free.
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
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

RESULT = ROOT / "results" / "predict.json"
SIZES = ("images", "width", "height", "classes", "threads")  # flags that a run is given


@dataclass
class Options:
    """What is predicted, and how often."""

    images: int = 60
    width: int = 480  # pixels
    height: int = 360
    classes: int = 11
    repeats: int = 3
    threads: int = torch.get_num_threads()  # of the network
    maps: bool = False  # confidence and entropy too
    # milliseconds that a stand-in for the network waits, one case after another; 0: the network
    elsewhere: tuple[float, ...] = (10, 20, 0)
    out: str = str(RESULT)  # "": no file
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
    """Has predict.build_source return a Source whose network is the stand-in."""
    built = predict.build_source
    net = Elsewhere(options.elsewhere[0] / 1000, options.classes)
    supervised.likeliest = net.likeliest

    def build_source(*given):
        return built(*given)._replace(net=net)

    predict.build_source = build_source


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
    if options.elsewhere[0]:
        put_elsewhere(options)
    begin = time.time()
    {"plain": plain, "overlapped": overlapped}[options.child](options, Path(options.folder))
    seconds = time.time() - begin
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([seconds, kibibytes * 1024]))


def case(options, folder):
    """Runs both in turns with options.elsewhere[0]; returns their row of the result."""
    runs = {"plain": [], "overlapped": []}
    for repeat in range(options.repeats):
        for kind in sorted(runs, reverse=bool(repeat % 2)):
            runs[kind].append(one_run(options, folder, kind))
    row = {"elsewhere": options.elsewhere[0]}
    for kind, found in runs.items():
        seconds = sorted(s for s, _ in found)
        row[kind] = {"rate": options.images / statistics.median(seconds), "s": seconds}
        row[kind]["peak_gib"] = max(size for _, size in found) / 2**30
    row["ratio"] = row["overlapped"]["rate"] / row["plain"]["rate"]
    return row


def one_run(options, folder, kind):
    """Returns seconds and bytes of a process that runs one of the two."""
    shutil.rmtree(folder / kind, ignore_errors=True)
    words = [f"--{name}={getattr(options, name)}" for name in SIZES]
    words += ["--elsewhere", str(options.elsewhere[0]), "--child", kind, "--folder", str(folder)]
    words += ["--maps"] * options.maps
    command = [sys.executable, __file__, *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(options):
    """Draws, runs all cases, prints a line for each of both and writes the rows."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        draw(options, Path(name))
        for wait in options.elsewhere:
            row = case(replace(options, elsewhere=(wait,)), Path(name))
            rows.append(row)
            print(f"network: {f'waits {wait} ms' if wait else 'computes here'}")
            for kind in ("plain", "overlapped"):
                one = row[kind]
                spread = f"{one['s'][0]:.2f} to {one['s'][-1]:.2f} s"
                memory = f"peak memory {one['peak_gib']:.2f} GiB"
                print(f"{kind:11} {one['rate']:8.2f} images a second ({spread}), {memory}")
            print(f"overlapped is {row['ratio']:.2f} times as fast", flush=True)
    about = {name: getattr(options, name) for name in (*SIZES, "repeats", "maps")}
    found = about | {"torch": torch.__version__, "load": os.getloadavg()[0], "rows": rows}
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    with refusals("start again"):
        options = cli(Options)
        if options.child:
            child(options)
        else:
            main(options)
