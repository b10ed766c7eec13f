#!/usr/bin/env bash
# torch 2.10.0: a network with a max pooling, exported for images of any size.
#
# One would guess: torch.export.export with Dim.DYNAMIC for height and width, which raises nothing and whose
#   range_constraints name a lower bound alone, is a program for images of every size above it.
# Behaviour: the program's module refuses every image whose sides, halved by the convolution before the pooling, are odd
#   where the example's were even: AssertionError, Guard failed. The pooling's size was computed by a division that asked whether something
#   was left over, and the answer for the example became a condition on all images; nothing printed by the program but
#   _guards_code names it. The numbers are those of the network for every size: with check_guards=False they are equal.
#   Every ResNet begins with such a pooling. torch 2.8.0 writes no guards, and torch 2.14.1 asks no such question.
#   To do: run a program that was read back, not the one in memory, on images of both parities before it is given away.
#   (Source: div_rtn in torch/_meta_registrations.py; _convert_guards_to_code in torch/export/exported_program.py.)
# Output seen:
#   exported at 64 x 64: range constraints [2, inf]
#   64 x 64: equal
#   68 x 96: equal
#   65 x 64: Guard failed; unchecked: equal
#   66 x 64: Guard failed; unchecked: equal
#   67 x 64: equal
#   64 x 70: Guard failed; unchecked: equal
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/export.py" <<'PY'
import io

import torch
from torch import nn

torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 4, 7, 2, 3), nn.MaxPool2d(3, 2, 1)).eval().requires_grad_(False)
free = ({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
program = torch.export.export(net, (torch.zeros(1, 3, 64, 64),), dynamic_shapes=free)
content = io.BytesIO()
torch.export.save(program, content)
program = torch.export.load(io.BytesIO(content.getvalue()))
bounds = {f"[{bound.lower}, {'inf' if 'oo' in str(bound.upper) else bound.upper}]" for bound in program.range_constraints.values()}
print("exported at 64 x 64: range constraints", *sorted(bounds))
for height, width in ((64, 64), (68, 96), (65, 64), (66, 64), (67, 64), (64, 70)):
    x = torch.randn(1, 3, height, width)
    try:
        found = "equal" if torch.equal(program.module()(x), net(x)) else "other"
    except AssertionError as error:
        found = str(error).split(":")[0] + "; unchecked: "
        found += "equal" if torch.equal(program.module(check_guards=False)(x), net(x)) else "other"
    print(f"{height} x {width}: {found}")
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.10.0 numpy==2.4.6
"$folder/env/bin/python" -W ignore "$folder/export.py" 2> "$folder/error" | tee "$folder/seen" || { cat "$folder/error"; exit 1; }
diff "$folder/seen" <(sed -n 's/^#   \(\(exported at\|[0-9]* x [0-9]*:\).*\)$/\1/p' "$0")
