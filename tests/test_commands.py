"""results/commands.py: the commands of the papers' entries, and why numbers stay away."""

import re
import shlex

import pytest

import tiny
from common import Refusal
from results import commands

NEEDED = {  # a script, and a word of its flags or source: the rows that keep its number away
    ("cps_fpl", "FPL Table 1, FPL+CPS w/ cutmix"): "D9 D5 D18 D11",
    ("cps_fpl", "FPL Table 2, CPS w/o cutmix"): "D9 D5",
    ("ael_fpl", "FPL Table 1, AEL (rerun)"): "D9 D5 D32",
    ("ael_fpl", "U2PL Table 3, AEL (rerun)"): "D9 D5",
    ("ael_fpl", "FPL Table 2, FPL+AEL"): "D9 D5 D5 D28",
    ("u2pl_ael", "U2PL Table 3, U2PL (w/ AEL)"): "D9 D5 D16 D35",
    ("unimatch", "UniMatch logs, last"): "D9",
    ("esl", "ESL Table of Cityscapes, R101"): "",
}


def test_every_entry_has_its_command_steps_hours_and_the_rows_that_say_why(capsys):
    seen = {}
    for entry, _ in commands.entries():
        found = commands.reasons(entry)
        seen[entry["script"], entry["source"]] = " ".join(x.split(":")[0] for x in found)
        page = (tiny.ROOT / f"docs/{entry['script']}.md").read_text()
        assert all(f"| {reason.split(':')[0]} |" in page for reason in found)
    assert {key: seen[key] for key in NEEDED} == NEEDED
    commands.main(commands.Options(scripts=("u2pl_ael",), gpus=4))
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if "torchrun" in line]
    assert printed.count("Table 3") == len(lines) == 4
    assert " 74.90  U2PL Table 3, U2PL (w/ AEL), 1/16" in printed
    # 34,800 steps of 24 crops of 769 x 769 at 0.4 megapixels a second
    assert "34,800 steps, about 343 GPU-hours" in printed
    for line in lines:
        script, *words = re.search(r"--nproc_per_node 4 (\S+).py (.*)", line).groups()
        assert tiny.resolved(tiny.script(script), shlex.split(words[0])).total_iters >= 18_600
    for name, count in (("esl", 4), ("cps_fpl", 8), ("mean_teacher", 8)):  # esl: 8 in pairs
        args = tiny.resolved(tiny.script(name), "--dataset voc --split 92".split())
        assert commands.processes(name, args, 8) == count
    with pytest.raises(Refusal, match="--scripts fixmatch: only ael_fpl, cps_fpl, "):
        commands.main(commands.Options(scripts=("fixmatch",)))
