#!/usr/bin/env bash
# torch 2.14.1 and 2.6.0 (CPU), numpy 2.2.6, jax 0.4.38, onnx 1.17.0, onnxruntime 1.22.0: the likeliest class by argmax and
#   as the first of a top k, where two classes have the same logit.
#
# One would guess: topk(k)[1][:, 0] and sort(descending=True)[1][:, 0] are argmax; and that two classes never have the
#   same logit, but in a network without weights.
# Behaviour: networks under bf16 autocast give logits of 8 bits. Of random ones with deviation 3 (19 and 150 classes) 0.8 and
#   1.6 % of the pixels have two likeliest classes. argmax, max and a stable sort then give the lowest. torch's topk and
#   its plain sort give any: of equal logits of 19 classes the 12th and the 10th. So a
#   pseudo label that comes from topk or sort beside one from argmax differs at up to as many pixels, and where a
#   prediction is uncertain. jax's top_k and the TopK of ONNX, by its text, have the lowest first: an exported network
#   does not give what the network gave.
#   stable=True is what sort offers; topk has nothing like it.
#   (Source: topk_impl_loop in aten/src/ATen/native/TopKImpl.h: std::partial_sort or nth_element by value alone.)
# Output seen, for both versions of torch:
#   19 classes, all equal: argmax 0, topk(1) 11, topk(2) 11, sort 9, stable sort 0, jax top_k 0, ONNX TopK 0
#   150 classes, all equal: argmax 0, topk(1) 0, topk(2) 0, sort 104, stable sort 0, jax top_k 0, ONNX TopK 0
#   19 classes, bf16: ties at 0.78 % of the pixels; not argmax: topk(2) 0.41 %, sort 0.36 %, stable sort 0.00 %
#   150 classes, bf16: ties at 1.62 % of the pixels; not argmax: topk(2) 1.62 %, sort 0.77 %, stable sort 0.00 %
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/ties.py" <<'PY'
import jax
import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper

torch.set_num_threads(1)


def exported(z):
    """Returns the indices that ONNX's TopK of two classes gives."""
    node = helper.make_node("TopK", ["z", "k"], ["values", "indices"], axis=1)
    k = helper.make_tensor("k", TensorProto.INT64, [1], [2])
    given = helper.make_tensor_value_info("z", TensorProto.FLOAT, z.shape)
    made = helper.make_tensor_value_info("indices", TensorProto.INT64, [len(z), 2])
    graph = helper.make_graph([node], "top", [given], [made], [k])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {"z": z})[0]


def firsts(z):
    """Returns {way: the first class of each row of z}."""
    return {
        "argmax": z.argmax(1),
        "topk(1)": z.topk(1, dim=1)[1][:, 0],
        "topk(2)": z.topk(2, dim=1)[1][:, 0],
        "sort": z.sort(dim=1, descending=True)[1][:, 0],
        "stable sort": z.sort(dim=1, descending=True, stable=True)[1][:, 0],
    }


for C in (19, 150):
    equal = torch.zeros(1, C)
    found = {way: int(first) for way, first in firsts(equal).items()}
    found["jax top_k"] = int(jax.lax.top_k(equal.numpy(), 2)[1][0, 0])
    found["ONNX TopK"] = int(exported(equal.numpy())[0, 0])
    print(f"{C} classes, all equal: " + ", ".join(f"{way} {c}" for way, c in found.items()))
rng = np.random.default_rng(0)
for C in (19, 150):
    z = torch.from_numpy(3 * rng.standard_normal((100_000, C), np.float32)).bfloat16()
    two = z.topk(2, dim=1)[0]
    ties = 100 * float((two[:, 0] == two[:, 1]).double().mean())
    found = firsts(z)
    other = {
        way: 100 * float((found[way] != found["argmax"]).double().mean())
        for way in ("topk(2)", "sort", "stable sort")
    }
    words = ", ".join(f"{way} {share:.2f} %" for way, share in other.items())
    print(f"{C} classes, bf16: ties at {ties:.2f} % of the pixels; not argmax: {words}")
PY
for version in 2.14.1 2.6.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q "torch==$version" numpy==2.2.6 'jax[cpu]==0.4.38' onnx==1.17.0 onnxruntime==1.22.0
  "$folder/$version/bin/python" "$folder/ties.py" | tee "$folder/seen"
  diff "$folder/seen" <(sed -n 's/^#   \([0-9]* classes, .*\)$/\1/p' "$0")
  rm -rf "${folder:?}/$version"
done
