"""The network: torchvision's weights and features, strides, dilations, sizes, parameters, heads."""

import hashlib
import importlib
import os
import shutil
import urllib.request
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from common import weights
from cps_fpl import CPSHead
from supervised import Args, DeepLabV3Plus, Network, dilate, make_backbone, upsample
from trees import refusal

STAGES = ("layer1", "layer2", "layer3", "layer4")
DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
STEMS = {"classic": (), "deep": (64, 64, 128), "v1c": (32, 32, 64)}  # channels of the three 3x3
WIDE, NARROW = [256, 512, 1024, 2048], [64, 128, 256, 512]
HEADS = {"deeplab": DeepLabV3Plus, "cps": CPSHead}


def flags(backbone="resnet18", stem="classic", weights="none", stride=16, **others):
    """Returns the flags that the network reads."""
    values = dict(backbone=backbone, stem=stem, weights=weights, output_stride=stride)
    return Args(**{"aux_weight": 0.0, "aspp_rates": (1, 2, 3), **values, **others})


def meta(make, *args):
    """Returns make(*args) without memory: shapes and parameter counts only."""
    with torch.device("meta"):
        return make(*args)


def unsettled(net):
    """Returns a network as after a training: no weight or statistic of a BN is 0 or 1."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.uniform_(-0.5, 0.5)
            module.num_batches_tracked.fill_(7)
    return net


def literal(backbone, stem, seed=0, **options):
    """torchvision's ResNet, where asked with a deep stem put in front of it, written out."""
    torch.manual_seed(seed)
    net = getattr(torchvision.models, backbone)(weights=None, **options)
    if STEMS[stem]:
        a, b, c = STEMS[stem]
        net.conv1 = nn.Sequential(
            nn.Conv2d(3, a, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(a),
            nn.ReLU(),
            nn.Conv2d(a, b, 3, stride=1, padding=1, bias=False),
            nn.BatchNorm2d(b),
            nn.ReLU(),
            nn.Conv2d(b, c, 3, stride=1, padding=1, bias=False),
        )
        net.bn1, first = nn.BatchNorm2d(c), net.layer1[0]
        if c == 128:  # the first block takes 128 channels, by a shortcut
            if backbone == "resnet18":
                first.conv1 = nn.Conv2d(128, 64, 3, padding=1, bias=False)
                shortcut = nn.Conv2d(128, 64, 1, bias=False)
                first.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(64))
            else:
                first.conv1 = nn.Conv2d(128, 64, 1, bias=False)
                first.downsample[0] = nn.Conv2d(128, 256, 1, bias=False)
    return unsettled(net).eval()


def features(net, x):
    """Returns the four stages' features of a ResNet, torchvision's or ours."""
    h, stages = net.maxpool(net.relu(net.bn1(net.conv1(x)))), []
    for name in STAGES:
        h = getattr(net, name)(h)
        stages.append(h)
        # not all dead: equal features say something
        assert h.is_meta or 0.1 < (h > 0).float().mean() <= 1
    return stages


# ---- weights ----

STYLES = {  # names of a deep stem's parts in files: ours, OpenMMLab's
    "conv1.0.": "stem.0.",
    "conv1.1.": "stem.1.",
    "conv1.3.": "stem.3.",
    "conv1.4.": "stem.4.",
    "conv1.6.": "stem.6.",
    "bn1.": "stem.7.",
}


def as_openmmlab(state):
    """Returns a state under OpenMMLab's names; everything behind the stem keeps its own."""
    renamed = {}
    for name, value in state.items():
        old = next((old for old in STYLES if name.startswith(old)), "")
        renamed[STYLES.get(old, "") + name[len(old) :]] = value
    assert not any(name.startswith(("conv1", "bn1")) for name in renamed)
    return renamed


CONTENTS = {  # of a file, from a state dict with its classifier
    "plain": lambda state: state,
    "nested": lambda state: {"state_dict": state, "meta": {"epoch": 100}},
    "OpenMMLab's": as_openmmlab,
    "OpenMMLab's, nested": lambda state: {"state_dict": as_openmmlab(state)},
    "without counters": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
}


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("style", CONTENTS)
def test_weights_load_bit_for_bit_from_files_in_every_style(tmp_path, style, stem):
    backbones = DEPTHS if (stem, style) == ("classic", "plain") else ["resnet18"]
    for backbone in backbones if stem != "classic" or style[0] != "O" else ():
        theirs = literal(backbone, stem).state_dict()
        torch.save(CONTENTS[style](theirs), tmp_path / "w.pth")
        torch.manual_seed(1)
        args = flags(backbone, stem, str(tmp_path / "w.pth"))
        mine = make_backbone(args).state_dict()
        assert set(theirs) - set(mine) == {"fc.weight", "fc.bias"} and not set(mine) - set(theirs)
        for name, value in mine.items():
            counter = "num_batches" in name and style == "without counters"
            assert counter or torch.equal(value, theirs[name]), name


KEY = "layer3.1.bn2.running_var"
ONE = "1 keys do not fit resnet18 (%s)"
MISFITS = [  # --backbone, --stem, the file's backbone, stem and change; the end of the refusal
    *(("resnet18", "classic", "resnet18", "classic", change, ONE % (how and key or "layer5.weight"))
      for key in ("conv1.weight", KEY, "layer4.0.bn1.bias")
      for how, change in (
          ("missing", lambda state, key=key: state.pop(key)),
          ("shape", lambda state, key=key: state.update({key: state[key][..., :-1]})),
          ("", lambda state: state.update({"layer5.weight": torch.zeros(1)})),
      )),
    *(("resnet18", stem, "resnet18", other, dict.copy, f"; is it --stem {other}?)")
      for stem in STEMS for other in STEMS if stem != other),
    *(("resnet50", stem, "resnet18", stem, dict.copy, ")") for stem in STEMS),
]  # fmt: skip


@pytest.mark.parametrize("backbone, stem, other, its_stem, change, end", MISFITS)
def test_a_file_that_does_not_fit_is_refused_and_its_stem_named(
    tmp_path, backbone, stem, other, its_stem, change, end
):
    state = literal(other, its_stem).state_dict()
    change(state)
    path = tmp_path / "w.pth"
    # v1c as it is published
    torch.save({"state_dict": as_openmmlab(state)} if its_stem == "v1c" else state, path)
    line = refusal(make_backbone, flags(backbone, stem, str(path)))
    assert line.startswith(f"--weights {path}: ") and line.endswith(end)
    assert f"keys do not fit {backbone} (" in line and ("--stem" in line) == (stem != its_stem)


# ---- weights that are fetched ----


@pytest.fixture
def auto(tmp_path, monkeypatch):
    """Returns a function that publishes a drawn file as the weights of a stem, in tmp_path.

    auto(stem, cut, prefix, content) -> (state, the file as it lies there, the cached file).
    """
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    (tmp_path / "served").mkdir()

    def publish(stem, cut=False, prefix=None, content=None):
        state = literal("resnet18", stem).state_dict()
        openmmlab = {"state_dict": as_openmmlab(state), "meta": {}} if stem != "classic" else state
        torch.save(content or openmmlab, tmp_path / "drawn.pth")
        text = (tmp_path / "drawn.pth").read_bytes()
        prefix = prefix or hashlib.sha256(text).hexdigest()[:8]
        name = f"resnet18{'' if stem == 'classic' else '_v1c'}-{prefix}.pth"
        source = tmp_path / "served" / name
        source.write_bytes(text[: len(text) // 2] if cut else text)
        enum = SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(url=source.as_uri()))
        monkeypatch.setattr(torchvision.models, "get_model_weights", {"resnet18": enum}.get)
        monkeypatch.setattr(weights, "V1C", (tmp_path / "served").as_uri() + "/")
        monkeypatch.setattr(weights, "NAMES", {"resnet18": prefix})
        return state, source, tmp_path / "home/hub/checkpoints" / name

    return publish


@pytest.mark.parametrize("stem", ["v1c", "classic"])
def test_weights_auto_are_fetched_once_checked_and_cached(stem, auto):
    for harm in (dict(prefix="0" * 8), dict(cut=True)):
        _, source, cached = auto(stem, **harm)
        line = refusal(make_backbone, flags(stem=stem, weights="auto"))
        if "cut" not in harm:
            assert source.name in line and "invalid hash" in line
        assert "--weights FILE" in line and "--weights none" in line and not cached.exists()
    state, source, cached = auto(stem)
    for present in (True, False):
        torch.manual_seed(1)
        loaded = make_backbone(flags(stem=stem, weights="auto")).state_dict()
        assert all(torch.equal(value, state[name]) for name, value in loaded.items())
        assert cached.is_file() and source.exists() == present
        source.unlink(missing_ok=True)
    cached.write_bytes(cached.read_bytes()[:1000])
    line = refusal(make_backbone, flags(stem=stem, weights="auto"))
    assert "no readable state dict" in line and source.name in line
    if stem == "v1c":  # the one that can be fetched is named
        auto("v1c")
        shutil.rmtree(cached.parent)
        assert "is it --stem v1c" in refusal(make_backbone, flags(stem="deep", weights="auto"))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_no_code_in_weights_that_are_fetched_is_run(auto, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    auto("v1c", content={"conv1.weight": Evil()})  # of a file: test_refusals.py
    line = refusal(make_backbone, flags(stem="v1c", weights="auto"))
    assert "no readable state dict" in line and "invalid hash" not in line
    assert not (tmp_path / "executed").exists()


def test_every_backbone_has_a_file_and_its_address_is_named_where_it_cannot_be_had(
    tmp_path, monkeypatch
):
    # OpenMMLab's names, as its model zoo has them: mmcv/model_zoo/open_mmlab.json
    published = {"resnet18": "b5776b93", "resnet50": "2cccc1ad", "resnet101": "e67eebb6"}
    assert weights.NAMES == published == {name: published[name] for name in DEPTHS}
    v1c = "https://download.openmmlab.com/pretrain/third_party/resnet18_v1c-b5776b93.pth"
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))  # nothing cached
    # every request goes to a port of this machine where nothing listens
    closed = urllib.request.ProxyHandler({"https": "http://127.0.0.1:9"})
    monkeypatch.setattr(urllib.request, "_opener", urllib.request.build_opener(closed))
    urls = {"classic": "https://download.pytorch.org/models/resnet18-", "v1c": v1c}
    for stem, url in urls.items():
        line = refusal(make_backbone, flags(stem=stem, weights="auto"))
        assert url in line and "--weights FILE" in line and "--weights none" in line


@pytest.mark.parametrize("stem", STEMS)
def test_random_weights_are_a_function_of_the_seed_and_begin_as_torchvisions(stem):
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        net = make_backbone(flags("resnet50", stem))
        states.append(net.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):  # Kaiming's normal distribution, fan out
            assert not torch.equal(module.weight, states[0][f"{name}.weight"])
            expected = (2 / (module.out_channels * module.kernel_size[0] ** 2)) ** 0.5
            # 864 numbers in the smallest kernel: 1 / sqrt(2 n) = 2.4 % per sigma
            assert module.weight.std().item() == pytest.approx(expected, rel=0.08), name
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all() and module.bias.eq(0).all(), name


# ---- features ----

SAME = [  # backbone, stem, output stride, torchvision's replace_stride_with_dilation
    ("resnet18", "classic", 16, None),
    ("resnet50", "classic", 16, [False, False, True]),
    ("resnet50", "classic", 8, [False, True, True]),
    ("resnet18", "deep", 16, None),
    ("resnet18", "v1c", 16, None),
]


@pytest.mark.smoke
@pytest.mark.parametrize("backbone, stem, stride, replaced", SAME)
def test_the_first_three_stages_are_those_of_a_literal_construction(
    tmp_path, backbone, stem, stride, replaced
):
    theirs = literal(backbone, stem, replace_stride_with_dilation=replaced)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    mine = make_backbone(flags(backbone, stem, str(tmp_path / "w.pth"), stride)).eval()
    x = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        pairs = list(zip(features(mine, x), features(theirs, x), strict=True))
        assert all(torch.equal(a, b) for a, b in pairs[:3])
        assert not torch.equal(*pairs[3])  # the multi-grid, which torchvision lacks
        if replaced:  # with torchvision's own dilations it is torchvision's
            dilate(mine.layer4, [4 // (stride // 8) // 2] + [4 // (stride // 8)] * 2)
            assert torch.equal(features(mine, x)[3], pairs[3][1])


# size of the input, output stride: sides of the four stages
SIDES = {(129, 16): (33, 17, 9, 9), (128, 16): (32, 16, 8, 8)}
SIDES |= {(769, 8): (193, 97, 97, 97), (128, 8): (32, 16, 16, 16)}
LAYER3 = {16: lambda n: [1] * n, 8: lambda n: [1] + [2] * (n - 1)}
LAYER4 = {16: [2, 4, 8], 8: [4, 8, 16]}  # the multi-grid [D6]


@pytest.mark.parametrize("stride", [16, 8])
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("backbone", DEPTHS)
def test_sizes_strides_dilations_and_paddings_of_every_convolution(backbone, stem, stride):
    net = meta(make_backbone, flags(backbone, stem, stride=stride))
    wide = 1 if backbone == "resnet18" else 4
    for (size, _), sides in ((key, row) for key, row in SIDES.items() if key[1] == stride):
        stages = features(net, torch.empty(2, 3, size, size, device="meta"))
        expected = [(2, wide * 64 * 2**i, side, side) for i, side in enumerate(sides)]
        assert [tuple(stage.shape) for stage in stages] == expected
    grids = [[1] * n for n in DEPTHS[backbone][:2]]
    grids += [LAYER3[stride](DEPTHS[backbone][2]), LAYER4[stride][: DEPTHS[backbone][3]]]
    strided = {"layer2", "layer3"} if stride == 16 else {"layer2"}
    # torchvision's convolution with the stride: the first 3x3 of a stage
    first = "conv1" if backbone == "resnet18" else "conv2"
    for stage, dilations in zip(STAGES, grids, strict=True):
        for i, (block, d) in enumerate(zip(getattr(net, stage), dilations, strict=True)):
            for name, conv in block.named_modules():
                if isinstance(conv, nn.Conv2d):
                    moves = i == 0 and stage in strided and name in (first, "downsample.0")
                    assert conv.stride == ((2, 2) if moves else (1, 1)), (stage, i, name)
                    one = (conv.kernel_size, conv.dilation, conv.padding)
                    wide = ((3, 3), (d, d), (d, d))
                    assert one in (wide, ((1, 1), (1, 1), (0, 0))), (stage, i, name)
    convs = [m for m in net.conv1.modules() if isinstance(m, nn.Conv2d)]
    kernels = [(m.kernel_size, m.padding, m.dilation, m.stride) for m in convs]
    small = ((3, 3), (1, 1), (1, 1))
    deep = [(*small, (2, 2)), (*small, (1, 1)), (*small, (1, 1))]
    assert kernels == (deep if STEMS[stem] else [((7, 7), (3, 3), (1, 1), (2, 2))])
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    theirs = meta(literal, backbone, stem).state_dict()
    assert shapes == {k: tuple(v.shape) for k, v in theirs.items() if k[:3] != "fc."}


# ---- heads ----


def test_upsample_equals_a_loop_over_scalars_with_aligned_corners():
    torch.manual_seed(0)
    x = torch.randn(1, 1, 3, 4)
    rows, (height, width) = x[0, 0].tolist(), (7, 9)
    y = upsample(x, (height, width))[0, 0]
    for i in range(height):
        for j in range(width):
            u, v = i * 2 / (height - 1), j * 3 / (width - 1)  # the last pixel is the last pixel
            a, b = min(int(u), 1), min(int(v), 2)
            top = rows[a][b] * (b + 1 - v) + rows[a][b + 1] * (v - b)
            low = rows[a + 1][b] * (b + 1 - v) + rows[a + 1][b + 1] * (v - b)
            # float32 positions and sums of numbers up to 3
            assert y[i, j].item() == pytest.approx(top * (a + 1 - u) + low * (u - a), abs=2e-6)


class Literal:
    """A head by torch's functions on the module's tensors: every convolution and BN by its name."""

    def __init__(self, head, training):
        self.head, self.training = head, training

    def conv(self, x, name, rate=0):
        """A convolution: 1x1 at rate 0, else 3x3."""
        module = self.head.get_submodule(name)
        bias = None if module.bias is None else module.bias.detach()
        return F.conv2d(x, module.weight.detach(), bias, padding=rate, dilation=rate or 1)

    def norm(self, x, name):
        module = self.head.get_submodule(name)
        statistics = (module.running_mean.clone(), module.running_var.clone())
        own = (module.weight.detach(), module.bias.detach())
        return F.batch_norm(x, *statistics, *own, self.training, 0.1, 1e-5)

    def block(self, x, name, rate=0):
        """Convolution, BN, ReLU."""
        return F.relu(self.norm(self.conv(x, f"{name}.0", rate), f"{name}.1"))


def up(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def literal_cps(head, stages, size, training, slope=0.01):
    """CPS's head in the order of its released code: no dropout, ASPP added to its pool."""
    one, (low, _, _, high) = Literal(head, training), stages
    parts = [one.conv(high, "branches.0")]
    parts += [one.conv(high, f"branches.{i}", i) for i in (1, 2, 3)]  # the rates are 1, 2, 3
    x = F.leaky_relu(one.norm(torch.cat(parts, 1), "project.0.0"), slope)
    x = one.conv(x, "project.1")
    pooled = one.conv(F.adaptive_avg_pool2d(high, 1), "pool.0")
    pooled = one.conv(F.leaky_relu(one.norm(pooled, "pool.1.0"), slope), "pool.2")
    x = F.leaky_relu(one.norm(x + pooled, "norm.0"), slope)  # added, not concatenated
    x = torch.cat([one.block(low, "low"), up(x, low.shape[2:])], 1)
    x = one.block(one.block(x, "decode.0", 1), "decode.1", 1)
    return {"logits": up(one.conv(x, "classify"), size)}


def literal_deeplab(head, stages, size, training):
    """U2PL's head: ASPP with its pool first, two blocks on 256 + 256 channels; the auxiliary one.

    Dropout is left out: it is compared in evaluation alone.
    """
    one, (low, _, third, high) = Literal(head, training), stages
    pooled = one.block(high.mean((2, 3), keepdim=True), "pool").expand(-1, -1, *high.shape[2:])
    parts = [pooled, one.block(high, "branches.0")]
    parts += [one.block(high, f"branches.{i}", i) for i in (1, 2, 3)]
    x = one.block(torch.cat(parts, 1), "project.0", 1)
    x = torch.cat([one.block(low, "low"), up(x, low.shape[2:])], 1)
    x = one.block(one.block(x, "classify.0", 1), "classify.2", 1)
    aux = one.conv(one.block(third, "aux.0", 1), "aux.2")
    return {"logits": up(one.conv(x, "classify.4"), size), "aux": up(aux, size)}


@pytest.mark.smoke
@pytest.mark.parametrize("name, training", [("cps", True), ("cps", False), ("deeplab", False)])
def test_the_heads_are_the_literal_ones(name, training):
    torch.manual_seed(0)
    head = unsettled(HEADS[name](NARROW, 5, flags(aux_weight=0.4))).train(training)
    sides = zip(NARROW, (9, 5, 3, 3), strict=True)
    stages = [torch.randn(2, c, s, s + 1, requires_grad=True) for c, s in sides]
    expected = {"cps": literal_cps, "deeplab": literal_deeplab}[name](
        head, stages, (33, 37), training
    )
    out, again = (head([x.clone() for x in stages], (33, 37)) for _ in (1, 2))
    assert list(out) == list(expected)
    for key, logits in out.items():
        # the same operations in the same order; numbers of order 1
        assert torch.allclose(logits, expected[key], rtol=0, atol=1e-5)
        assert logits.shape == (2, 5, 33, 37) and logits.std() > 0.05
        assert torch.equal(logits, again[key])  # CPS has no dropout in training either
        reached = torch.autograd.grad(logits.square().sum(), stages, allow_unused=True)
        used = [False, False, True, False] if key == "aux" else [True, False, False, True]
        assert [x is not None and bool(x.any()) for x in reached] == used
    if name == "cps":
        other = literal_cps(head, stages, (33, 37), training, slope=0.2)["logits"]
        assert not torch.allclose(out["logits"], other, rtol=0, atol=1e-3)  # the slope is 0.01


FEATURES = {  # what a head adds in training to the parent's, and its shape
    "u2pl": {"rep": (2, 256, 9, 10)},
    "esl": {"rep": (2, 512, 9, 10), "encoder": (2, 512, 3, 4)},
}


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("aux", [0.0, 0.4])
@pytest.mark.parametrize("training", [True, False])
def test_heads_with_features_are_the_parents_and_more(name, aux, training):
    script = importlib.import_module(name)
    kind = {"u2pl": "U2PLHead", "esl": "ESLHead"}[name]
    torch.manual_seed(0)
    head = getattr(script, kind)(NARROW, 5, flags(aux_weight=aux)).eval()
    parent = DeepLabV3Plus(NARROW, 5, flags(aux_weight=aux)).eval()
    parent.load_state_dict({k: head.state_dict()[k] for k in parent.state_dict()})
    head.training = training  # its own flag: BN and dropout stay in eval mode
    sides = zip(NARROW, (9, 5, 3, 3), strict=True)
    stages = [torch.randn(2, c, s, s + 1) for c, s in sides]
    out, expected = head(stages, (33, 37)), parent(stages, (33, 37))
    own = FEATURES[name] if training else {}
    assert {key: tuple(out[key].shape) for key in own} == own
    coarse = {"coarse"} if name == "u2pl" else set()  # its logits at stride 4, always
    assert set(out) == set(expected) | set(own) | coarse
    assert ("aux" in out) == bool(aux)
    for key, logits in expected.items():
        assert torch.equal(out[key], logits)
    if name == "u2pl":
        assert torch.equal(upsample(out["coarse"], (33, 37)), expected["logits"])


@pytest.mark.parametrize("rates", [(12, 24, 36), (6, 12, 18), (1, 2)])
@pytest.mark.parametrize("name", HEADS)
def test_aspp_has_a_convolution_for_each_rate(name, rates):
    head = meta(HEADS[name], WIDE, 21, flags(aspp_rates=rates))
    convs = [m for m in head.branches.modules() if isinstance(m, nn.Conv2d)]
    assert [c.dilation[0] for c in convs] == [1, *rates]
    assert [c.kernel_size[0] for c in convs] == [1, *[3 for _ in rates]]
    assert [c.padding[0] for c in convs] == [0, *rates]
    stages = [torch.empty(2, c, 9, 9, device="meta") for c in WIDE]
    assert head(stages, (33, 33))["logits"].shape == (2, 21, 33, 33)


def test_the_head_of_cps_begins_as_the_released_one_with_one_bias_and_no_dropout():
    torch.manual_seed(0)
    head = CPSHead(WIDE, 21, flags())
    assert not any("Drop" in type(module).__name__ for module in head.modules())
    for name, module in head.named_modules():
        if isinstance(module, nn.Conv2d):  # Kaiming's normal distribution, fan in
            fan_in = module.in_channels * module.kernel_size[0] ** 2
            x = module.weight.detach().flatten()
            # 5,376 numbers or more: 1 / sqrt(2 n) = 1 % per sigma
            assert x.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05), name
            assert x.abs().max() > 3 * x.std(), name  # a normal one has tails, a uniform one none
            assert (module.bias is None) == (name != "classify")
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all() and module.bias.eq(0).all(), name
            assert (module.eps, module.momentum) == (1e-5, 0.1)
    bias = head.classify.bias.detach()
    assert bias.abs().max() <= 1 / 16 and bias.std() > 0.02  # torch's own: uniform in 1 / sqrt(256)


# ---- the whole network ----

RESNET50 = 25_557_032 - 2_049_000  # of torchvision's page, without the classifier
V1C = 27 * 32 + 2 * 32 + 9 * 32 * 32 + 2 * 32 + 9 * 32 * 64 + 2 * 64 - 9_408 - 128  # more than 7x7
CPS_HEAD = 2048 * 256 + 3 * 9 * 2048 * 256 + 2 * 1024  # ASPP: no BN of its own in a branch
CPS_HEAD += 1024 * 256 + (2048 * 256 + 2 * 256 + 256 * 256) + 2 * 256
CPS_HEAD += 256 * 48 + 2 * 48 + (304 * 256 * 9 + 2 * 256) + (256 * 256 * 9 + 2 * 256)
PARAMETERS = [  # backbone, stem, head, classes, weight of the auxiliary head; backbone's, head's
    ("resnet101", "deep", "deeplab", 21, 0.0, 42_623_936, 62_623_189 - 42_623_936),
    ("resnet101", "deep", "deeplab", 19, 0.0, 42_623_936, 62_623_189 - 42_623_936 - 2 * 257),
    ("resnet101", "deep", "deeplab", 19, 0.4, 42_623_936, 64_987_622 - 42_623_936),
    ("resnet50", "classic", "cps", 21, 0.0, RESNET50, CPS_HEAD + 257 * 21),
    ("resnet50", "v1c", "cps", 19, 0.0, RESNET50 + V1C, CPS_HEAD + 257 * 19),
    ("resnet101", "classic", "cps", 19, 0.0, 44_549_160 - 2_049_000, CPS_HEAD + 257 * 19),
]


@pytest.mark.parametrize("backbone, stem, head, classes, aux, first, second", PARAMETERS)
def test_the_parameters_are_as_many_as_in_the_released_networks(
    backbone, stem, head, classes, aux, first, second
):
    rates = (12, 24, 36)
    args = flags(backbone, stem, stride=8, aux_weight=aux, aspp_rates=rates)
    net = meta(Network, args, classes, HEADS[head])
    assert sum(p.numel() for p in net.backbone.parameters()) == first
    assert sum(p.numel() for p in net.head.parameters()) == second
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == first + second
    if aux:
        assert sum(p.numel() for p in net.head.aux.parameters()) == 2_364_947


def network(head="deeplab", **others):
    torch.manual_seed(0)
    net = Network(flags(**others), 5, HEADS[head])
    return net.to(memory_format=torch.channels_last)


def photographs(images, height, width):
    rng = torch.Generator().manual_seed(0)
    return torch.randint(256, (images, 3, height, width), dtype=torch.uint8, generator=rng)


@pytest.mark.smoke
@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize(
    "head, stride, aux", [("deeplab", 16, 0.4), ("deeplab", 8, 0), ("cps", 16, 0)]
)
def test_logits_have_the_size_of_the_input_in_float32_and_reach_every_parameter(
    head, stride, aux, amp
):
    net, seen = network(head, amp=amp, stride=stride, aux_weight=aux), []
    for module in (net.backbone.layer2, net.head.low):
        module.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    for training, sizes in ((False, [(33, 49), (64, 50)]), (True, [(33, 49)])):
        for height, width in sizes:
            out = net.train(training)(photographs(2, height, width))
            assert list(out) == ["logits", "aux"] if aux else ["logits"]
            for logits in out.values():
                assert logits.shape == (2, 5, height, width) and logits.dtype == torch.float32
                assert logits.isfinite().all() and logits.requires_grad
    assert set(seen) == {torch.bfloat16 if amp == "bf16" else torch.float32}
    assert aux or not any("aux" in name for name, _ in net.named_parameters())
    if amp == "none":  # backward in bfloat16 takes long on a CPU
        sum(logits.square().mean() for logits in out.values()).backward()
    for name, p in net.named_parameters() if amp == "none" else ():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert p.grad.any() or name.endswith("0.bias"), name  # a bias before BN: next to nothing


def test_bfloat16_gives_nearly_the_same_logits_and_a_batch_the_same_as_an_image_alone():
    x = photographs(3, 65, 49)
    with torch.no_grad():
        full, half = (network(amp=amp, aux_weight=0.4).eval()(x) for amp in ("none", "bf16"))
        alone = [network(aux_weight=0.4).eval()(x[i : i + 1]) for i in range(3)]
    difference = (full["logits"] - half["logits"]).abs().mean() / full["logits"].std()
    # 8 bits, about 20 layers: sqrt(20) roundings of 2^-9 relative are 1 %; five of them
    assert 0 < difference < 0.05
    for name, together in full.items():
        one = torch.cat([out[name] for out in alone])
        # float32 sums in another order for another batch: 1e-6 of the logits' scale
        assert torch.allclose(one, together, rtol=0, atol=2e-5 * together.abs().max().item())


def test_the_input_is_normalized_with_imagenets_mean_and_deviation():
    net, x, seen = network().eval(), photographs(1, 33, 33), []
    net.backbone.conv1.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    net(x)
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    for channel in range(3):
        expected = (x[0, channel].double() - mean[channel]) / std[channel]
        # float32, numbers up to 3
        assert torch.allclose(seen[0][0, channel].double(), expected, rtol=0, atol=1e-6)
    assert not {"mean", "std"} & set(net.state_dict())
