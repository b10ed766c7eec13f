"""Curves of any number of runs in one picture and one page.

    python results/curves.py RUN... [--out curves]   # run folders or logs

Writes curves.png and curves.html: loss, mIoU on val, K, the share of K > 1, that of the commonest
class, pseudo-label accuracy and coverage, as far as the logs have them. Runs that differ by seed
alone are one curve: the mean, and the range as a band. The page has their final scores too, and
the confusion matrices.
"""

import base64
import html
import io
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from common import Refusal, needs  # noqa: E402
from common.flags import cli  # noqa: E402
from common.outputs import STYLE, confusion_picture, put, put_text  # noqa: E402
from common.run import refusals  # noqa: E402
from results.logs import grouped, labels, notes, read_all, spread  # noqa: E402

QUANTITIES = {  # of a line of the log -> (kind of the line, title, what it is multiplied by)
    "loss": ("train", "loss", 1),
    "miou": ("eval", "mIoU on val, %", 100),
    "K": ("train", "K, mean", 1),
    "K_gt_1": ("train", "K > 1, % of pixels", 100),
    "commonest": ("train", "commonest class of unlabelled images, %", 100),
    "pseudo_acc": ("train", "accuracy of pseudo labels, %", 100),
    "coverage": ("train", "coverage of pseudo labels, %", 100),
}
PER_ROW = 3  # panels


@dataclass(frozen=True)
class Args:
    """Curves of runs: mean and range over seeds, as one PNG and one HTML page."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]  # run folders or logs
    out: str = "curves"  # of the files to write, without their endings; older ones are replaced


def curve(logs, name):
    """Returns (steps (S,), values (len(logs), S)) of a quantity at the steps that all logs have."""
    kind, _, factor = QUANTITIES[name]
    rows = []
    for log in logs:
        lines = log.train if kind == "train" else log.evals
        rows.append({line["step"]: factor * line[name] for line in lines if name in line})
    steps = sorted(set.intersection(*map(set, rows)))
    return np.array(steps), np.array([[row[step] for step in steps] for row in rows])


def draw(groups, names):
    """Returns the PNG, bytes, of all quantities that a log has; names: a label for each group."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    found = {}  # quantity -> [(index of the group, steps, values)]
    for name in QUANTITIES:
        curves = [(i, *curve(logs, name)) for i, logs in enumerate(groups)]
        curves = [entry for entry in curves if len(entry[1])]
        if curves:
            found[name] = curves
    columns = min(PER_ROW, len(found))
    rows = -(-len(found) // columns)
    legend_columns = 1 + (len(groups) > 8)
    legend_rows = -(-len(groups) // legend_columns)
    height = 3.2 * rows + 0.22 * legend_rows + 0.3  # inches: the legend is below
    figure = Figure((5 * columns, height), layout="constrained", dpi=110)
    colours = colormaps["tab10"].colors
    handles = {}
    for place, (name, curves) in enumerate(found.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.set_title(QUANTITIES[name][1])
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        for i, steps, values in curves:
            style = ("-", "--", ":", "-.")[i // len(colours) % 4]
            mark = "o" if len(steps) < 20 else ""
            look = {"color": colours[i % len(colours)], "linestyle": style, "linewidth": 1.3}
            (line,) = axes.plot(steps, values.mean(0), marker=mark, markersize=3, **look)
            if len(values) > 1:
                axes.fill_between(
                    steps, values.min(0), values.max(0), color=look["color"], alpha=0.2, lw=0
                )
            handles.setdefault(i, line)
    shown = sorted(handles)
    words = [textwrap.fill(names[i], 100) for i in shown]
    look = {"loc": "outside lower left", "fontsize": 9, "ncols": legend_columns}
    figure.legend([handles[i] for i in shown], words, **look)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def embedded(png, words):
    """Returns an image of HTML that holds the bytes of a PNG."""
    data = base64.b64encode(png).decode()
    return f"<img src='data:image/png;base64,{data}' alt='{html.escape(words, quote=True)}'>"


def page(groups, names, png, lines):
    """Returns a page of HTML that needs no other file; lines: what is to be noted."""
    parts = ["<!doctype html><meta charset='utf-8'><title>curves</title>"]
    parts.append(f"<style>{STYLE}</style><h1>Curves</h1>{embedded(png, 'curves')}")
    parts.append("<p>Line: mean over seeds, at the steps that all have; band: their range.</p>")
    parts += [f"<p>{html.escape(line)}</p>" for line in lines]
    parts.append("<table><tr><th>runs</th><th>on</th><th>mIoU, last</th><th>best</th></tr>")
    for logs, name in zip(groups, names, strict=True):
        cells = [name, logs[0].on]
        for which in ("last", "best"):
            scores = [log.done[which]["miou"] for log in logs if log.done and which in log.done]
            cells.append(spread([100 * score for score in scores]))
        parts.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    parts.append("</table>")
    for logs, name in zip(groups, names, strict=True):
        counts = [np.array(log.done["last"]["confusion"]) for log in logs if has_confusion(log)]
        if counts:
            file = io.BytesIO()
            confusion_picture(sum(counts), logs[0].classes).save(file, "PNG")
            words = f"{name}: confusion on {logs[0].on}, last"
            parts.append(f"<figure><figcaption>{html.escape(words)}</figcaption>")
            parts.append(f"{embedded(file.getvalue(), words)}</figure>")
    return "\n".join(parts) + "\n"


def has_confusion(log):
    """Returns whether a log is finished and of a time when logs had confusion matrices."""
    return bool(log.done) and "confusion" in log.done["last"]


def main(argv=None):
    """Writes both files. Raises Refusal."""
    args = cli(Args, argv)
    logs = read_all(args.runs)
    for log in logs:
        if not (log.train or log.evals):
            raise Refusal(f"{log.path}: nothing to draw yet")
    needs("matplotlib")
    groups = grouped(logs)
    lines = notes(groups)
    for group in groups:
        if not any(len(curve(group, name)[0]) for name in QUANTITIES):
            raise Refusal(f"{group[0].path} and its other seeds: no step in common to draw")
    names = labels(groups)
    png = draw(groups, names)
    picture = Path(f"{args.out}.png")
    put(picture, lambda new: new.write_bytes(png))
    put_text(Path(f"{args.out}.html"), page(groups, names, png, lines))
    print(*lines, sep="\n", end="\n" if lines else "")
    print(f"{picture}, {args.out}.html: {len(logs)} runs, {len(groups)} curves")


if __name__ == "__main__":
    with refusals("start again"):
        main()
