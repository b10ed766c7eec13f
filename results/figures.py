"""The papers' figures of runs, from their logs and checkpoints: with numbers and a verdict.

    python results/figures.py RUN... --out DIR      # folders of runs, checkpoints or logs
    python results/figures.py --keep RUN...         # beside runs that train, for figures over steps

FPL Fig. 3a, 3b, 4a, 4b, 5 and supplement Fig. 1 to 4 of a run of cps_fpl.py; U2PL Fig. 1 and 2 of a
run of any script, Fig. A2 of two; ESL supplement Fig. 2 (as FPL supplement Fig. 6, U2PL Fig. 4 and
A1) of all. What cannot be drawn of the runs given is named, with what it lacks. Each figure says
whether the paper's sentence holds in the run: a word on these few images, not a test.

A run keeps last.pt, previous.pt and best.pt. Figures at 10, 50 and 100 % of training and those over
steps need more of them: --keep, started beside a run, holds every last.pt that it writes, as
RUN/kept/STEP.pt, until the run has ended (--save-every says how often). It changes nothing in the
run: a held file is the one that the run wrote, by a second name. The steps that stand in a figure
are those of the checkpoints that there are.

Pixels are those of val, whose masks are opened (the papers take the unlabelled images). Networks
are in eval mode with BN as evaluation has it, --precise-bn; of cps_fpl.py branch 2 teaches branch 1
as in results/analysis.py. A "mini-batch" is an image.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from scipy.stats import rankdata

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import cps_fpl  # noqa: E402
import u2pl  # noqa: E402
from common import Refusal, distributed, metrics, needs  # noqa: E402
from common.checkpoints import load_checkpoint, writing  # noqa: E402
from common.data import IGNORE  # noqa: E402
from common.flags import Count, check_needs, cli, given_names  # noqa: E402
from common.outputs import put  # noqa: E402
from common.pictures import colour  # noqa: E402
from common.run import refusals  # noqa: E402
from predict import build_source  # noqa: E402
from results import analysis, logs  # noqa: E402

STAGES = (0.1, 0.5, 1.0)  # of training, FPL Fig. 5
NEAR = 3  # pixels: what lies so close to another label is at a boundary
ALPHA = 0.2  # U2PL's alpha_0: the share of unreliable pixels, where a run has no such flag
POINTS = 40  # of a class at most, in U2PL Fig. A2
NEIGHBOURS = 5  # of a point there, whose class is compared with its own


@dataclass(frozen=True)
class Args:
    """Draws the papers' figures that logs and checkpoints allow, and says what they show."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]  # folders, checkpoints or logs
    out: str = "figures"  # folder of the pictures; older ones are replaced
    images: Count = 12  # of val, evenly spread: behind all numbers
    shown: Count = 3  # of them, drawn as maps
    data_root: str = ""  # folder of the data set; left out: that of the checkpoint
    device: Literal["cpu", "cuda"] = "cpu"
    # draw nothing: keep every last.pt that the runs write from now on, until they have ended
    keep: bool = False

    NEEDS: ClassVar[dict] = dict.fromkeys("out images shown data_root device".split(), "no keep")


class Missing(Exception):
    """A figure cannot be drawn of the runs given; says what it lacks."""


# ---- runs ------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A run as it lies there. log is None of a checkpoint alone."""

    name: str
    script: str  # without .py
    flags: dict  # those that acted
    log: logs.Log | None
    checkpoints: dict  # {step: path}, in the order of steps

    @property
    def last(self):
        """The last step of which there is a checkpoint."""
        return max(self.checkpoints)


def read_run(place):
    """Returns the Run of a folder, a checkpoint or a log. Raises Refusal."""
    path = Path(place)
    if path.suffix == ".pt":
        saved = load_checkpoint(path)
        script = Path(saved["script"]).stem
        return Run(path.stem, script, saved["args"], None, {saved["step"]: path})
    log = logs.read(path)
    found = {}
    if path.is_dir():
        for file in (path / name for name in ("best.pt", "previous.pt", "last.pt")):
            if file.is_file():
                found[load_checkpoint(file)["step"]] = file
        for file in path.glob("kept/[0-9]*.pt"):
            found.setdefault(int(file.stem), file)
    script = Path(log.start["script"]).stem
    return Run(log.name, script, log.start["args"], log, dict(sorted(found.items())))


def stages(run):
    """Returns the steps of a run's checkpoints that lie nearest to STAGES, each once."""
    total = run.flags["total_iters"]
    nearest = [min(run.checkpoints, key=lambda step: abs(step - s * total)) for s in STAGES]
    return list(dict.fromkeys(nearest))


def first(runs, *scripts):
    """Returns the first run of one of the scripts (of any, if none is named) with a checkpoint.

    Of cps_fpl.py one that learns with FPL, if there is one. Raises Missing.
    """
    fitting = [run for run in runs if run.checkpoints and run.script in (scripts or [run.script])]
    if not fitting:
        what = " or ".join(f"{script}.py" for script in scripts) or "any script"
        raise Missing(f"needs a checkpoint of a run of {what}")
    return next((run for run in fitting if run.flags.get("unsup_loss") == "fpl"), fitting[0])


def keep(places):
    """Holds every last.pt that runs write, as kept/STEP.pt, until the logs say that they ended."""
    waiting = {Path(place) for place in places}
    held = {}  # folder -> the file held last
    print("keeping what these runs write; stops when they have ended", flush=True)
    for folder in sorted(waiting):
        if not folder.is_dir():
            print(f"{folder}: no folder yet, waiting for it", flush=True)
    while waiting:
        for folder in sorted(waiting):
            last = folder / "last.pt"
            log = folder / "log.jsonl"
            ended = log.is_file() and '"kind": "done"' in log.read_text()
            new = folder / "kept/new"
            # between two names of a checkpoint there is no last.pt: the next look finds it
            with writing(new), contextlib.suppress(FileNotFoundError):
                if held.get(folder) != last.stat().st_mtime_ns:
                    new.parent.mkdir(exist_ok=True)
                    new.unlink(missing_ok=True)
                    os.link(last, new)
                    held[folder] = new.stat().st_mtime_ns
                    step = load_checkpoint(new)["step"]
                    os.replace(new, folder / f"kept/{step:06d}.pt")
                    print(f"{folder}: step {step}", flush=True)
            if ended:
                waiting.remove(folder)
        time.sleep(0.2)


# ---- what is computed of a checkpoint --------------------------------------------------------


class Fuzzy(NamedTuple):
    """What FPL's figures need of a checkpoint of cps_fpl.py."""

    sums: dict  # {column of analysis.measures: (3,) sums over the pixels of each case}
    gradients: np.ndarray  # (images, 2): mean gradient_sum with K = n, and with n - 1
    entropy: np.ndarray  # (2,): mean entropy of the teacher in nats where K = 1, and where K > 1
    at_boundary: np.ndarray  # (2,): share of K > 1 within NEAR pixels of another label, elsewhere
    more_than_one: float  # share of pixels with K > 1
    maps: list  # of the images shown: {title: array}

    def mean(self, column, case):
        """The mean of a column over the pixels of a case, 1 to 3; NaN over none."""
        pixels = self.sums["pixels"][case - 1]
        return float(self.sums[column][case - 1] / pixels) if pixels else np.nan


class Scored(NamedTuple):
    """What U2PL's and ESL's figures need of a checkpoint of any script."""

    confusion: torch.Tensor  # (C, C)
    by_class: np.ndarray  # (2, C): reliable and unreliable pixels of each true class
    top_three: np.ndarray  # (2,): share of reliable and unreliable pixels with the truth among them
    mass: np.ndarray  # (2,): mean probability of those three
    features: np.ndarray  # (N, D): of pixels, before the classifier
    labels: np.ndarray  # (N,): their truth
    maps: list  # of the images shown: {title: array}
    examples: list  # of the first image: [((row, column), (C,) probabilities)], sure and unsure
    data: object


class Views:
    """Computes Fuzzy and Scored of checkpoints, each once."""

    def __init__(self, options):
        self.options = options
        self.known = {}

    def of(self, kind, run, step):
        """Returns Fuzzy or Scored, by kind, of a run's checkpoint of this step."""
        key = (kind, run.checkpoints[step])
        if key not in self.known:
            compute = {"fuzzy": self.fuzzy, "scored": self.scored}[kind]
            self.known[key] = compute(run.checkpoints[step])
        return self.known[key]

    def opened(self, path, network=None):
        """Returns (predict.py's Source of a checkpoint's network, its Data with val)."""
        saved = load_checkpoint(path)
        if self.options.data_root:
            saved["args"]["data_root"] = self.options.data_root
        source = build_source(saved, network, self.options.device)
        args = replace(source.args, eval_only=True, eval_on="val", precise_bn=0)
        return source, source.script.load(args)

    def samples(self, script, data):
        """Yields (image (3, H, W), label (1, H, W) int64), evenly spread over val."""
        count = min(self.options.images, len(data.val))
        for i in range(count):
            image, label = script.Images(data, data.val)[i * len(data.val) // count]
            yield image.to(self.options.device), label[None].long().to(self.options.device)

    @torch.no_grad()
    def fuzzy(self, path):
        """Returns the Fuzzy of a checkpoint of cps_fpl.py."""
        student, data = self.opened(path, "branch1")
        teacher, _ = self.opened(path, "branch2")
        args = student.args
        if len(args.T) > 1:
            raise Missing("needs a run of cps_fpl.py with one --T")
        progress = max(student.saved["step"] - 1, 0) / args.total_iters
        sums = {}
        gradients = []
        tally = np.zeros((3, 2, 2))  # entropy by K, K > 1 by place: [sum, pixels]
        maps = []
        for image, label in self.samples(cps_fpl, data):
            prob_t = F.softmax(cps_fpl.upcast(analysis.mean_logits(teacher, image)), 1)
            logits_s = analysis.mean_logits(student, image).double()  # as analysis.py
            p, _ = cps_fpl.by_rank(prob_t)
            K = cps_fpl.k_values(p, progress, args)
            n = cps_fpl.cumulative_classes(p, args.T[0], args.strict)
            pair = [analysis.gradient_sum(logits_s, prob_t, k) for k in (n, (n - 1).clamp(min=1))]
            gradients.append([value.mean().item() for value in pair])
            case = analysis.case(prob_t, K, label)
            columns = analysis.measures(logits_s, prob_t, K, label)
            for name, values in columns.items():
                own = [values[case == c].double().sum().item() for c in (1, 2, 3)]
                sums[name] = sums.get(name, 0) + np.array(own)
            entropy = u2pl.entropy(prob_t)
            near = at_boundary(label)
            for i, (mask, values) in enumerate(
                ((K == 1, entropy), (K > 1, entropy), (near, K > 1), (~near, K > 1))
            ):
                tally[i // 2, i % 2] += [values[mask].double().sum().item(), mask.sum().item()]
            tally[2, 0] += [(K > 1).sum().item(), K.numel()]
            if len(maps) < self.options.shown:
                maps.append(
                    {
                        "image": image.cpu().numpy(),
                        "truth": label[0].cpu().numpy(),
                        "K": K[0].cpu().numpy(),
                        "R^v": columns["R^v"][0].cpu().numpy(),
                        "R^f": columns["R^f"][0].cpu().numpy(),
                        "palette": data.palette,
                    }
                )
        with np.errstate(invalid="ignore"):  # NaN over no pixel
            means = tally[..., 0] / tally[..., 1]
        return Fuzzy(sums, np.array(gradients), means[0], means[1], means[2, 0], maps)

    @torch.no_grad()
    def scored(self, path):
        """Returns the Scored of a checkpoint of any script."""
        source, data = self.opened(path)
        C = data.num_classes
        alpha = getattr(source.args, "alpha_0", None) or ALPHA
        confusion = torch.zeros(C, C, dtype=torch.int64)
        by_class = np.zeros((2, C))
        three = np.zeros((2, 2))  # reliable, unreliable: truths among the first three, their mass
        bank = Bank(C)
        maps = []
        examples = []
        for image, label in self.samples(source.script, data):
            prob = F.softmax(analysis.mean_logits(source, image).float(), 1)
            with bank.watching(source):
                source.net(image[None])  # in one piece: the features have the label's places
            bank.add(label)
            pred = prob.argmax(1)
            confusion += metrics.confusion_matrix(pred, label, C).cpu()
            inside = label != IGNORE
            H = u2pl.entropy(prob)
            (gamma,) = u2pl.quantiles(H, inside, 1 - alpha)
            unreliable = u2pl.candidates(H, inside, gamma, gamma, "unreliable").view_as(inside)
            p, order = prob.topk(min(3, C), 1)
            among = (order == label[:, None]).any(1)
            for i, mask in enumerate((inside & ~unreliable, unreliable)):
                by_class[i] += torch.bincount(label[mask], minlength=C).cpu().numpy()
                three[i] += [among[mask].sum().item(), p.sum(1)[mask].double().sum().item()]
            if len(maps) < self.options.shown:
                reliable = pred.masked_fill(unreliable, IGNORE)[0]
                top = {"image": image, "truth": label[0], "prediction": pred[0]}
                top |= {"entropy": H[0] / np.log(C), "reliable": reliable}
                maps.append({k: v.cpu().numpy() for k, v in top.items()})
            if not examples:
                examples = [typical(prob, H, mask) for mask in (inside & ~unreliable, unreliable)]
        pixels = np.maximum(by_class.sum(1), 1)
        features, labels = bank.points()
        return Scored(
            confusion,
            by_class,
            *(three / pixels[:, None]).T,
            features,
            labels,
            maps,
            examples,
            data,
        )


def at_boundary(label):
    """Returns where another label lies within NEAR pixels, (1, H, W) bool; void is one too."""
    x = label.float()[:, None]
    side = 2 * NEAR + 1
    highest = F.max_pool2d(x, side, 1, NEAR)
    lowest = -F.max_pool2d(-x, side, 1, NEAR)
    return (highest != lowest)[:, 0]


def typical(prob, H, mask):
    """Returns ((row, column), (C,) probabilities) of the pixel of median entropy within a mask."""
    values = H[mask]
    if not len(values):
        return (0, 0), prob[0, :, 0, 0].cpu().numpy()
    _, row, column = mask.nonzero()[(values - values.median()).abs().argmin()].tolist()
    return (row, column), prob[0, :, row, column].cpu().numpy()


class Bank:
    """Features before the classifier of a few pixels of each class, at most POINTS of each."""

    def __init__(self, classes):
        self.found = [[] for _ in range(classes)]
        self.maps = None

    def watching(self, source):
        """A with block in which the input of the network's last convolution is noted."""
        nets = source.net if isinstance(source.net, torch.nn.ModuleList) else [source.net]
        convolutions = [
            m for m in nets[0].head.classify.modules() if isinstance(m, torch.nn.Conv2d)
        ]
        return convolutions[-1].register_forward_pre_hook(self.note)

    def note(self, module, inputs):
        """Keeps what the last convolution is given, (1, D, h, w)."""
        self.maps = inputs[0].float()

    def add(self, label):
        """Takes pixels of an image, on a regular grid, so many of each class."""
        h, w = self.maps.shape[2:]
        small = F.interpolate(label[:, None].float(), (h, w))[0, 0].long()
        rows = self.maps[0].flatten(1).T
        for c, found in enumerate(self.found):
            places = (small.flatten() == c).nonzero()[:, 0]
            wanted = places[:: max(len(places) // 10, 1)][: min(10, POINTS - len(found))]
            found += [*rows[wanted].cpu().numpy()]

    def points(self):
        """Returns (features (N, D), classes (N,))."""
        labels = [c for c, found in enumerate(self.found) for _ in found]
        rows = [row for found in self.found for row in found]
        return np.array(rows, np.float64), np.array(labels, np.int64)


def purity(x, labels):
    """Returns the mean share of a point's NEIGHBOURS nearest, by cosine, that have its class."""
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    nearest = np.argsort(-cosine, 1, kind="stable")[:, :NEIGHBOURS]
    return float((labels[nearest] == labels[:, None]).mean())


def tsne(x):
    """Returns points in a plane (N, 2) by t-SNE; of x (N, D) directions count. Raises Missing."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise Missing("needs scikit-learn: pip install scikit-learn") from None
    if len(x) < 3:
        raise Missing("needs three pixels with a label")
    perplexity = min(30, max(len(x) // 3, 2))
    return TSNE(perplexity=perplexity, metric="cosine", random_state=0).fit_transform(x)


# ---- drawing ---------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """A figure: matplotlib's, the numbers behind it, what the paper says, whether it holds."""

    figure: object
    numbers: list  # lines
    claim: str
    holds: bool | None  # None: cannot be told


def panels(rows, columns, size=(3.2, 2.6)):
    """Returns (figure, axes (rows, columns)), of so many inches each."""
    from matplotlib.figure import Figure

    figure = Figure((size[0] * columns, size[1] * rows), layout="constrained", dpi=110)
    return figure, figure.subplots(rows, columns, squeeze=False)


def sheet(rows, palette, note=""):
    """Returns a figure of maps: rows of {title: map}, as common/pictures.py colours them.

    Titles that begin with R: scores in [-1, 1], red above 0, blue below; with K: dark 1, bright 4
    and more. note: a line above all.
    """
    height = 3.2 * rows[0]["image"].shape[1] / rows[0]["image"].shape[2]
    titles = [title for title in rows[0] if title != "palette"]
    figure, axes = panels(len(rows), len(titles), (3.2, height + 0.3))
    for line, row in zip(axes, rows, strict=True):
        for ax, title in zip(line, titles, strict=True):
            ax.set_axis_off()
            ax.set_title(title, fontsize=9)
            if title.startswith("R"):
                ax.imshow(row[title], cmap="bwr", vmin=-1, vmax=1)
            elif title.startswith("K"):
                ax.imshow(row[title], cmap="inferno", vmin=1, vmax=4)
            else:
                ax.imshow(colour(row[title], palette))
    figure.suptitle(note, fontsize=9)
    return figure


def curves(ax, steps, lines, title):
    """Draws {name: values} over steps."""
    for name, values in lines.items():
        ax.plot(steps, values, marker="o", markersize=3, label=name)
    ax.set_title(title, fontsize=9)
    ax.set_xlabel("step")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


def over_training(run, views):
    """Returns (steps, [Fuzzy]) of all checkpoints of a run; Missing where there is but one."""
    steps = list(run.checkpoints)
    if len(steps) < 2:
        raise Missing(f"{run.name} has one checkpoint: --keep beside a run keeps more")
    return steps, [views.of("fuzzy", run, step) for step in steps]


def whole(values):
    """Returns whether there are numbers, and all are."""
    return len(values) > 0 and bool(np.isfinite(values).all())


# ---- FPL -------------------------------------------------------------------------------------


def fpl_3a(runs, views):
    """FPL Fig. 3a: positive gradient scores R^v and R^f as maps."""
    run = first(runs, "cps_fpl")
    view = views.of("fuzzy", run, run.last)
    rows = [{k: row[k] for k in ("image", "truth", "R^v", "R^f")} for row in view.maps]
    scores = [np.concatenate([row[k].ravel() for row in view.maps]) for k in ("R^v", "R^f")]
    wrong = [float((values < 0).mean()) for values in scores]
    turned = float((scores[1][scores[0] < 0] > 0).mean()) if wrong[0] else np.nan
    numbers = [
        f"{run.name}, step {run.last}: the truth is pushed down (R < 0) at {100 * wrong[0]:.2f} % "
        f"of pixels by cross-entropy, {100 * wrong[1]:.2f} % by FPL",
        f"of the pixels with R^v < 0, {100 * turned:.2f} % have R^f > 0",
    ]
    claim = "many parts with R^v < 0 have R^f > 0 (read as: FPL pushes the truth down less often)"
    figure = sheet(rows, view.maps[0]["palette"], "red: the truth is encouraged, blue: suppressed")
    return Drawn(figure, numbers, claim, wrong[1] < wrong[0])


def fpl_3b(runs, views):
    """FPL Fig. 3b: mean positive gradient scores by case."""
    run = first(runs, "cps_fpl")
    view = views.of("fuzzy", run, run.last)
    vanilla, fuzzy = ([view.mean(name, c) for c in (1, 2, 3)] for name in ("R^v", "R^f"))
    figure, [[ax]] = panels(1, 1, (4.5, 3))
    for shift, name, values in ((-0.2, "R^v", vanilla), (0.2, "R^f", fuzzy)):
        ax.bar(np.arange(1, 4) + shift, values, 0.4, label=name)
    ax.set(xticks=(1, 2, 3), xlabel="case", ylabel="positive gradient score", ylim=(-1.05, 1.05))
    ax.axhline(0, color="black", linewidth=0.8)
    ax.legend()
    numbers = [f"{run.name}, step {run.last}"]
    shares = view.sums["pixels"] / view.sums["pixels"].sum()
    for case, share, v, f in zip((1, 2, 3), shares, vanilla, fuzzy, strict=True):
        numbers.append(f"case {case}: {100 * share:.2f} % of pixels, R^v {v:.3f}, R^f {f:.3f}")
    holds = None
    if whole(vanilla + fuzzy):
        alike = [abs(vanilla[i] - fuzzy[i]) < 0.2 for i in (0, 2)]
        holds = fuzzy[1] > 0 > vanilla[1] and all(alike)
    claim = "R^f is far above R^v in case 2 and near it in cases 1 and 3 (read as: within 0.2)"
    return Drawn(figure, numbers, claim, holds)


def fpl_4a(runs, views):
    """FPL Fig. 4a: pixels with K = 1 and K > 1 during training, from the log.

    Runs that learn otherwise log the K that FPL would take; they are drawn, and not judged.
    """
    logged = [run for run in runs if run.log and any("K_gt_1" in e for e in run.log.train)]
    if not logged:
        raise Missing("needs the log of a run that has K_gt_1: cps_fpl.py, ael_fpl.py, unimatch.py")
    figure, axes = panels(1, len(logged), (4.5, 3))
    numbers = []
    verdicts = []
    for ax, run in zip(axes[0], logged, strict=True):
        rows = [(e["step"], e["K_gt_1"]) for e in run.log.train if "K_gt_1" in e]
        steps, shares = zip(*rows, strict=True)
        pixels = run.flags["crop_size"] ** 2
        above = pixels * np.array(shares)
        curves(ax, steps, {"K = 1": pixels - above, "K > 1": above}, run.name[:60])
        ax.set(ylabel=f"pixels of {pixels}", ylim=(0, None))
        begin, middle, end = analysis.parts_of_training(shares)
        numbers.append(
            f"{run.name}: K > 1 at {100 * begin:.2f} %, {100 * middle:.2f} %, {100 * end:.2f} % of "
            f"pixels in the first, middle and last tenth of {steps[-1]} steps"
        )
        if run.flags.get("unsup_loss") == "fpl":
            verdicts.append(end < begin and 1 - end > 0.9375)
    claim = "K > 1 becomes rarer; late in training K = 1 at more than 93.75 % of pixels"
    return Drawn(figure, numbers, claim, all(verdicts) if verdicts else None)


def weight_curves(T=0.95, K=2, points=200):
    """Returns (largest negative probability, {name: w}) of Eq. (11) and (16), sum of Y being T."""
    rest = torch.linspace(0, T / K, points, dtype=torch.float64)
    p = torch.cat([torch.full((K, points), T / K, dtype=torch.float64), rest[None]])[None, :, None]
    number = torch.full((1, 1, points), K)
    kinds = ("concave", "linear", "convex")
    found = {kind: cps_fpl.adaptive_weight(p, number, kind)[0, 0].numpy() for kind in kinds}
    return rest.numpy(), found


def fpl_4b(runs, views):
    """FPL Fig. 4b: the adaptive weights, T = 0.95 and K = 2; and entropy by K, of Sec. 4.3.3."""
    rest, weights = weight_curves()
    figure, [[ax, bars]] = panels(1, 2, (4.5, 3))
    for kind, values in weights.items():
        ax.plot(rest, values, label=kind)
    ax.set(xlabel="largest probability outside Y", ylabel="weight w")
    ax.grid(alpha=0.3)
    ax.legend()
    middle = len(rest) // 2
    text = ", ".join(f"{kind} {values[middle]:.3f}" for kind, values in weights.items())
    numbers = [f"weights where that is {rest[middle]:.3f}: {text}"]
    falls = all((np.diff(values) <= 0).all() for values in weights.values())
    holds = falls and bool(weights["concave"][middle] > weights["linear"][middle])
    claim = "the weight falls and is concave"
    try:
        run = first(runs, "cps_fpl")
    except Missing as missing:
        bars.set_axis_off()
        numbers.append(f"entropy by K: {missing}")
    else:
        view = views.of("fuzzy", run, run.last)
        bars.bar(["K = 1", "K > 1"], view.entropy)
        bars.set(ylabel="mean entropy of the teacher, nats")
        numbers.append(
            f"{run.name}, step {run.last}: mean entropy {view.entropy[0]:.3f} nats where K = 1, "
            f"{view.entropy[1]:.3f} where K > 1"
        )
        claim += "; K = 1 at low entropy and K > 1 at high entropy"
        if whole(view.entropy):
            holds = holds and bool(view.entropy[1] > view.entropy[0])
        else:
            holds = None
    return Drawn(figure, numbers, claim, holds)


def fpl_5(runs, views):
    """FPL Fig. 5 and supplement Fig. 5: maps of K at 10, 50 and 100 % of training."""
    run = first(runs, "cps_fpl")
    steps = stages(run)
    found = [views.of("fuzzy", run, step) for step in steps]
    total = run.flags["total_iters"]
    rows = []
    for images in zip(*(view.maps for view in found), strict=True):
        row = {"image": images[0]["image"], "truth": images[0]["truth"]}
        for step, own in zip(steps, images, strict=True):
            row[f"K, step {step} of {total}"] = own["K"]
        rows.append(row)
    numbers = []
    for step, view in zip(steps, found, strict=True):
        near, far = 100 * view.at_boundary
        numbers.append(
            f"{run.name}, step {step} of {total}: K > 1 at {100 * view.more_than_one:.2f} % of "
            f"pixels: {near:.2f} % of those within {NEAR} pixels of another label, {far:.2f} % of "
            "the others"
        )
    holds = None
    if len(steps) > 1:
        fewer = found[-1].more_than_one < found[0].more_than_one
        holds = fewer and bool(found[-1].at_boundary[0] > found[-1].at_boundary[1])
    claim = "pixels with K > 1 become fewer, and at the end lie at the boundaries of objects"
    note = "K: black 1, violet 2, orange 3, bright 4 and more"
    return Drawn(sheet(rows, found[0].maps[0]["palette"], note), numbers, claim, holds)


def fpl_s1(runs, views):
    """FPL supplement Fig. 1: gradient sums of mini-batches with K = n and K = n - 1."""
    run = first(runs, "cps_fpl")
    rows = views.of("fuzzy", run, run.last).gradients
    rows = rows[np.argsort(rows[:, 0])]
    figure, [[ax]] = panels(1, 1, (4.5, 3))
    ax.plot(rows[:, 0], marker=".", label="K = n")
    ax.plot(rows[:, 1], marker=".", label="K = n - 1")
    ax.set(xlabel="images, sorted by the sum of K = n", ylabel="gradient sum, mean over pixels")
    ax.grid(alpha=0.3)
    ax.legend()
    more = rows[:, 1] > rows[:, 0]
    numbers = [
        f"{run.name}, step {run.last}: mean {rows[:, 0].mean():.4f} with K = n, "
        f"{rows[:, 1].mean():.4f} with K = n - 1, which is larger in {more.sum()} of {len(more)}"
    ]
    claim = "K = n - 1 has the larger gradient in most mini-batches"
    return Drawn(figure, numbers, claim, bool(more.mean() > 0.5))


def fpl_s2(runs, views):
    """FPL supplement Fig. 2: K = 1 and R in case 1, R in case 3, over training."""
    run = first(runs, "cps_fpl")
    steps, found = over_training(run, views)
    ones = [view.mean("K = 1", 1) for view in found]
    R = {(n, c): [v.mean(n, c) for v in found] for n in ("R^v", "R^f") for c in (1, 3)}
    figure, [axes] = panels(1, 3)
    curves(axes[0], steps, {"share": ones}, "(a) K = 1 in case 1")
    for ax, c, title in ((axes[1], 1, "(b) R of case 1"), (axes[2], 3, "(c) R of case 3")):
        curves(ax, steps, {name: R[name, c] for name in ("R^v", "R^f")}, title)
    numbers = [run.name]
    for i, step in enumerate(steps):
        numbers.append(
            f"step {step}: K = 1 at {100 * ones[i]:.2f} % of case 1; R^f {R['R^f', 1][i]:.3f} in "
            f"case 1; in case 3 R^v {R['R^v', 3][i]:.3f}, R^f {R['R^f', 3][i]:.3f}"
        )
    holds = None
    if whole(ones) and whole(R["R^f", 3]):
        lower = all(f <= v for f, v in zip(R["R^f", 3], R["R^v", 3], strict=True))
        holds = min(ones) > 0.85 and min(R["R^f", 1]) > 0.9 and lower
    claim = "in case 1 K = 1 at more than 85 % and R^f near 1 (above 0.9); in case 3 R^f below R^v"
    return Drawn(figure, numbers, claim, holds)


def per_step(steps, lines):
    """Returns a line for each step; lines: {name: a value a step}."""
    found = []
    for i, step in enumerate(steps):
        text = ", ".join(f"{name} {values[i]:.3f}" for name, values in lines.items())
        found.append(f"step {step}: {text}")
    return found


def fpl_s3(runs, views):
    """FPL supplement Fig. 3: cosine of G^f and G^v with the ideal gradient in case 2."""
    run = first(runs, "cps_fpl")
    steps, found = over_training(run, views)
    columns = {"sim(G^f, G^ide)": "sim(f,ide)", "sim(G^v, G^ide)": "sim(v,ide)"}
    columns["positive rate of G^f"] = "sim(f)>0"
    lines = {name: [view.mean(column, 2) for view in found] for name, column in columns.items()}
    figure, [[ax]] = panels(1, 1, (5, 3))
    curves(ax, steps, lines, "case 2")
    numbers = [run.name, *per_step(steps, lines)]
    fuzzy, vanilla, rate = lines.values()
    holds = None
    if whole(fuzzy + vanilla):
        above = all(f > v for f, v in zip(fuzzy, vanilla, strict=True))
        holds = above and min(rate) > 0.9
    claim = "sim(G^f, G^ide) is above sim(G^v, G^ide), and positive at more than 90 % of pixels"
    return Drawn(figure, numbers, claim, holds)


def fpl_s4(runs, views):
    """FPL supplement Fig. 4: norms of G^f and of the ideal gradient in case 2."""
    run = first(runs, "cps_fpl")
    steps, found = over_training(run, views)
    lines = {name: [view.mean(name, 2) for view in found] for name in ("|G^f|", "|G^ide|")}
    figure, [[ax]] = panels(1, 1, (5, 3))
    curves(ax, steps, lines, "case 2")
    numbers = [run.name, *per_step(steps, lines)]
    fuzzy, ideal = lines.values()
    holds = None
    if whole(fuzzy + ideal):
        holds = all(f < i for f, i in zip(fuzzy, ideal, strict=True))
    claim = "the norms are close, that of G^f the smaller (read as: at every step)"
    return Drawn(figure, numbers, claim, holds)


# ---- U2PL and ESL ----------------------------------------------------------------------------


def u2pl_1(runs, views):
    """U2PL Fig. 1: IoU of each class, and its pixels with reliable and unreliable predictions."""
    run = first(runs)
    view = views.of("scored", run, run.last)
    iou = 100 * metrics.iou_per_class(view.confusion).numpy()
    pixels = view.by_class.sum(0)
    unsure = 100 * view.by_class[1] / np.maximum(pixels, 1)
    order = np.argsort(-np.nan_to_num(iou))
    names = [view.data.classes[i] for i in order]
    figure, [[top], [bottom]] = panels(2, 1, (max(5, 0.45 * len(names)), 2.6))
    top.bar(names, iou[order])
    top.set(ylabel="IoU, %")
    places = np.arange(len(names))
    bottom.bar(places - 0.2, view.by_class[0][order], 0.4, label="reliable")
    bottom.bar(places + 0.2, view.by_class[1][order], 0.4, label="unreliable")
    bottom.set(ylabel="pixels", yscale="symlog")
    bottom.set_xticks(places, names)
    bottom.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    for ax in (top, bottom):
        ax.tick_params(axis="x", rotation=90, labelsize=8)
    numbers = [f"{run.name} ({run.script}.py), step {run.last}"]
    for i in order:
        numbers.append(
            f"{view.data.classes[i]:16} IoU {iou[i]:6.2f} %, unreliable {unsure[i]:6.2f} % of "
            f"{int(pixels[i])} pixels"
        )
    there = (pixels > 0) & np.isfinite(iou)
    ranks = [rankdata(values[there]) for values in (iou, unsure)]
    spread = min(np.ptp(values) for values in ranks)  # 0: all classes are alike
    rank_correlation = np.corrcoef(*ranks)[0, 1] if spread else np.nan
    numbers.append(f"rank correlation of IoU and share of unreliable pixels {rank_correlation:.2f}")
    claim = "classes that are predicted badly have the unreliable pixels (a correlation below 0)"
    holds = bool(rank_correlation < 0) if np.isfinite(rank_correlation) else None
    return Drawn(figure, numbers, claim, holds)


def u2pl_2(runs, views):
    """U2PL Fig. 2: entropy, reliable pseudo labels, and probabilities of two pixels."""
    run = first([run for run in runs if run.script == "u2pl"] or runs)
    view = views.of("scored", run, run.last)
    palette = view.data.palette
    row = view.maps[0]
    figure, axes = panels(2, 2, (4, 3))
    titles = {"entropy": "(a) entropy", "reliable": "(b) reliable pseudo labels"}
    for ax, (key, title) in zip(axes[0], titles.items(), strict=True):
        ax.imshow(colour(row[key], palette))
        ax.set_title(title, fontsize=9)
        ax.set_axis_off()
    numbers = [f"{run.name} ({run.script}.py), step {run.last}"]
    pixels = {"(c) reliable": "yellow", "(d) unreliable": "red"}
    for ax, (place, prob), (title, mark) in zip(
        axes[1], view.examples, pixels.items(), strict=True
    ):
        axes[0, 0].plot(*place[::-1], "x", markersize=9, color=mark)
        ax.bar(view.data.classes, prob, color=palette / 255)
        ax.set(ylim=(0, 1))
        ax.set_title(title, fontsize=9)
        ax.tick_params(axis="x", rotation=90, labelsize=7)
    for i, kind in enumerate(("reliable", "unreliable")):
        numbers.append(
            f"{kind}: the likeliest three classes have {100 * view.mass[i]:.2f} % of the "
            f"probability, and the truth at {100 * view.top_three[i]:.2f} % of pixels"
        )
    C = view.data.num_classes
    numbers.append(f"chance would have the truth among three at {100 * min(3 / C, 1):.2f} %")
    claim = "an unreliable pixel hovers between few classes (three have above 90 %)"
    return Drawn(figure, numbers, claim, bool(view.mass[1] > 0.9))


def u2pl_a2(runs, views):
    """U2PL Fig. A2: features of pixels in a plane by t-SNE, U2PL's and labels' alone."""
    pair = [first(runs, name) for name in ("supervised", "u2pl")]
    figure, [axes] = panels(1, 2, (4.5, 4))
    numbers = []
    pure = []
    for ax, run in zip(axes, pair, strict=True):
        view = views.of("scored", run, run.last)
        points = tsne(view.features)
        ax.scatter(*points.T, c=view.data.palette[view.labels] / 255, s=8)
        ax.set_title(f"{run.script}.py, step {run.last}", fontsize=9)
        ax.set(xticks=(), yticks=())
        pure.append(purity(view.features, view.labels))
        numbers.append(
            f"{run.name} ({run.script}.py), step {run.last}: of the {NEIGHBOURS} nearest of "
            f"{len(points)} pixels, by cosine, {100 * pure[-1]:.2f} % are of the same class"
        )
    claim = "U2PL's features have clearer boundaries than those of labels alone (more neighbours of"
    return Drawn(figure, numbers, f"{claim} the same class)", pure[1] > pure[0])


def esl_s2(runs, views):
    """ESL supplement Fig. 2, U2PL Fig. 4 and A1, FPL supplement Fig. 6: predictions."""
    drawn = [run for run in runs if run.checkpoints]
    if not drawn:
        raise Missing("needs a checkpoint of a run of any script")
    found = [views.of("scored", run, run.last) for run in drawn]
    if any(view.data.classes != found[0].data.classes for view in found):
        raise Missing("needs runs with the same classes")
    rows = []
    for images in zip(*(view.maps for view in found), strict=True):
        row = {"image": images[0]["image"], "truth": images[0]["truth"]}
        for i, (run, own) in enumerate(zip(drawn, images, strict=True), 1):
            row[f"{i}: {run.script}.py, step {run.last}"] = own["prediction"]
        rows.append(row)
    scores = [100 * metrics.scores(view.confusion)["miou"] for view in found]
    numbers = []
    for i, (run, score) in enumerate(zip(drawn, scores, strict=True), 1):
        numbers.append(f"{i}: {run.name} ({run.script}.py), step {run.last}: mIoU {score:.2f} %")
    names = [run.script for run in drawn]
    holds = None
    if "esl" in names and "u2pl" in names:
        holds = scores[names.index("esl")] > scores[names.index("u2pl")]
    claim = "ESL's segmentation is more accurate than U2PL's"
    return Drawn(sheet(rows, found[0].data.palette), numbers, claim, holds)


FIGURES: dict[str, Callable] = {
    "fpl_3a": fpl_3a,
    "fpl_3b": fpl_3b,
    "fpl_4a": fpl_4a,
    "fpl_4b": fpl_4b,
    "fpl_5": fpl_5,
    "fpl_s1": fpl_s1,
    "fpl_s2": fpl_s2,
    "fpl_s3": fpl_s3,
    "fpl_s4": fpl_s4,
    "u2pl_1": u2pl_1,
    "u2pl_2": u2pl_2,
    "u2pl_a2": u2pl_a2,
    "esl_s2": esl_s2,
}
VERDICTS = {True: "holds here", False: "does not hold here", None: "cannot be told here"}


def main(argv=None):
    """Draws what the runs allow, and prints numbers and verdicts. Raises Refusal."""
    options = cli(Args, argv)
    check_needs(options, given_names(options, argv))
    if not options.runs:
        raise Refusal("RUN...: give folders of runs, checkpoints or logs")
    if options.keep:
        keep(options.runs)
        return
    needs("matplotlib")
    distributed.setup(options.device)  # refuses a GPU that is not there
    runs = [read_run(found) for place in options.runs for found in logs.expanded(place)]
    views = Views(options)
    for name, draw in FIGURES.items():
        title = draw.__doc__.partition("\n")[0].rstrip(".")
        try:
            drawn = draw(runs, views)
        except Missing as missing:
            print(f"{name}: not drawn: {title}: {missing}", flush=True)
            continue
        path = Path(options.out) / f"{name}.png"
        put(path, lambda new, figure=drawn.figure: figure.savefig(new, format="png"))
        print(f"{path}: {title}")
        print(*(f"  {line}" for line in drawn.numbers), sep="\n")
        print(f"  the paper: {drawn.claim}: {VERDICTS[drawn.holds]}", flush=True)


if __name__ == "__main__":
    with refusals("start again"):
        main()
