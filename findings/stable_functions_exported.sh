#!/usr/bin/env bash
# torch 2.14.1, onnxscript 0.7.2, onnx 1.23.2, onnxruntime 1.32.0 (CPU): functions that are there to be stable, exported.
#
# One would guess: an exported network has the network's numbers up to rounding, and so has a head that ends in
#   logaddexp, logsigmoid, log1p or expm1, which exist so that nothing overflows or is lost.
# Behaviour: ONNX has no such operators, and torch's exporter writes logaddexp as Log(Exp(a) + Exp(b)), logsigmoid as
#   Log(Sigmoid(x)), log1p as Log(x + 1) and expm1 as Exp(x) - 1. In float32 logaddexp is -inf where both are below -104
#   and inf where one is above 88; logsigmoid is -inf below -104; log1p and expm1 are 0 below 6e-8. Random inputs, by which
#   exports are compared, show none of it; a sure network's logits do. logsumexp and log_softmax are operators of ONNX
#   and stable, as softplus and xlogy are.
#   To do: the mean of two networks as log_softmax, stacked, and logsumexp; logsigmoid(x) as -softplus(-x).
#   (Source: aten_logaddexp, aten_log_sigmoid, aten_log1p, aten_expm1 in onnxscript/function_libs/torch_lib/ops.)
# Output seen:
#   logaddexp(x, x), x = -200: torch -199.307, ONNX -inf
#   logaddexp(x, x), x = 100: torch 100.693, ONNX inf
#   log1p(x), x = 1e-8: torch 1e-08, ONNX 0
#   expm1(x), x = 1e-8: torch 1e-08, ONNX 0
#   logsigmoid(x), x = -200: torch -200, ONNX -inf
#   softplus(x), x = -30: torch 9.35762e-14, ONNX 9.35762e-14
#   xlogy(x, x), x = 0: torch 0, ONNX 0
#   logsumexp of (x, x), x = -200: torch -199.307, ONNX -199.307
#   log_softmax of (x, 0), x = -200: torch -200, ONNX -200
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/export.py" <<'PY'
import contextlib
import io

import onnxruntime
import torch
import torch.nn.functional as F


class Of(torch.nn.Module):
    """A network that is one function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


CASES = {
    "logaddexp(x, x), x = -200": (lambda x: torch.logaddexp(x, x), -200.0),
    "logaddexp(x, x), x = 100": (lambda x: torch.logaddexp(x, x), 100.0),
    "log1p(x), x = 1e-8": (torch.log1p, 1e-8),
    "expm1(x), x = 1e-8": (torch.expm1, 1e-8),
    "logsigmoid(x), x = -200": (F.logsigmoid, -200.0),
    "softplus(x), x = -30": (F.softplus, -30.0),
    "xlogy(x, x), x = 0": (lambda x: torch.special.xlogy(x, x), 0.0),
    "logsumexp of (x, x), x = -200": (lambda x: torch.stack([x, x]).logsumexp(0), -200.0),
    "log_softmax of (x, 0), x = -200": (lambda x: torch.stack([x, 0 * x]).log_softmax(0)[0], -200.0),
}
for words, (function, value) in CASES.items():
    x = torch.full((4,), value)
    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(Of(function), (x,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    print(f"{words}: torch {function(x)[0].item():.6g}, ONNX {found[0].item():.6g}")
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 numpy==2.4.6 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
"$folder/env/bin/python" -W ignore "$folder/export.py" 2> "$folder/error" | tee "$folder/seen" || { cat "$folder/error"; exit 1; }
diff "$folder/seen" <(sed -n 's/^#   \(.*: torch .*, ONNX .*\)$/\1/p' "$0")
