"""The network: torchvision's weights and features, strides, dilations, sizes, parameters, heads."""

import hashlib
import itertools
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import cps_fpl
import predict
import tiny
from common import weights
from common.distributed import Group
from cps_fpl import CPSHead
from esl import ESLHead
from supervised import (
    Args,
    DeepLabV3Plus,
    Network,
    build,
    dilate,
    features,
    make_backbone,
    upsample,
)
from trees import refusal
from u2pl import U2PLHead

STEMS = {"classic": (), "deep": (64, 64, 128), "v1c": (32, 32, 64)}  # channels of the three 3x3
NARROW = [64, 128, 256, 512]


def flags(backbone="resnet18", stem="classic", weights="none", stride=16, **others):
    """Returns the flags that the network reads."""
    values = dict(backbone=backbone, stem=stem, weights=weights, output_stride=stride)
    values |= dict(aux_weight=0.0, aspp_rates=(1, 2, 3), head_channels=256, multi_grid=True)
    return Args(**values | others)


def unsettled(net):
    """Returns a network as after a training: no weight or statistic of a BN is 0 or 1."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.uniform_(-0.5, 0.5)
    return net


def literal(backbone, stem, seed=0, **options):
    """torchvision's ResNet, where asked with a deep stem put in front of it, written out."""
    torch.manual_seed(seed)
    net = getattr(torchvision.models, backbone)(weights=None, **options)
    if STEMS[stem]:
        layers = []
        for inputs, outputs in itertools.pairwise((3, *STEMS[stem])):
            stride = 1 if layers else 2
            conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
        net.conv1, net.bn1 = nn.Sequential(*layers[:-2]), layers[-2]
    if stem == "deep":  # the first block takes 128 channels, by a shortcut
        first = net.layer1[0]
        conv = first.conv1
        first.conv1 = nn.Conv2d(128, 64, conv.kernel_size, padding=conv.padding, bias=False)
        wide = 64 if backbone == "resnet18" else 256
        shortcut = nn.Conv2d(128, wide, 1, bias=False)
        first.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(wide))
    return unsettled(net).eval()


def literal_features(net, x):
    """Returns the four stages' features of torchvision's ResNet."""
    stages = [net.maxpool(net.relu(net.bn1(net.conv1(x))))]
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        stages.append(stage(stages[-1]))
        # not all dead: equal features say something
        assert 0.1 < (stages[-1] > 0).float().mean() <= 1
    return stages[1:]


def as_openmmlab(state):
    """Returns a state under OpenMMLab's names; everything behind the stem keeps its own."""
    names = {re.sub("^bn1", "stem.7", re.sub("^conv1", "stem", name)): name for name in state}
    return {name: state[old] for name, old in names.items()}


LOADED = [  # what is done to a state dict with its classifier, backbone, stem
    (lambda s: {k: v for k, v in s.items() if "num_batches" not in k}, "resnet18", "classic"),
    (lambda state: {"state_dict": state, "meta": {"epoch": 100}}, "resnet50", "classic"),
    (dict, "resnet18", "deep"),
    (as_openmmlab, "resnet18", "v1c"),
]


@pytest.mark.smoke
@pytest.mark.parametrize("saved, backbone, stem", LOADED)
def test_loaded_weights_give_the_features_of_a_literal_network(tmp_path, saved, backbone, stem):
    deep = backbone == "resnet50"  # torchvision dilates no other blocks; at an output stride of 8
    theirs = literal(backbone, stem, replace_stride_with_dilation=[False, deep, deep])
    torch.save(saved(theirs.state_dict()), tmp_path / "w.pth")
    mine = make_backbone(flags(backbone, stem, str(tmp_path / "w.pth"), 8 if deep else 16)).eval()
    for name, value in theirs.state_dict().items():
        unused = name[:3] == "fc." or "num_batches" in name
        assert unused or torch.equal(value, mine.state_dict()[name]), name
    x = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        pairs = list(zip(features(mine, x), literal_features(theirs, x), strict=True))
        assert all(torch.equal(a, b) for a, b in pairs[:3])
        assert not torch.equal(*pairs[3])  # the multi-grid, which torchvision lacks
        if deep:  # with torchvision's own dilations it is torchvision's
            dilate(mine.layer4, [2, 4, 4])
            assert torch.equal(features(mine, x)[3], pairs[3][1])


@pytest.mark.parametrize("backbone, stride", [("resnet18", 16), ("resnet50", 8), ("resnet101", 8)])
def test_dilations(backbone, stride):
    """Of the 3x3 convolutions of the last two stages' blocks; the multi-grid [D6]."""
    third = {"resnet18": [1, 1], "resnet50": [1] + [2] * 5, "resnet101": [1] + [2] * 22}[backbone]
    fourth = [2, 4] if backbone == "resnet18" else [4, 8, 16]
    with torch.device("meta"):  # no memory
        net = make_backbone(flags(backbone, stride=stride))
    for stage, dilations in ((net.layer3, third), (net.layer4, fourth)):
        for block, d in zip(stage, dilations, strict=True):
            convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
            found = {(c.dilation, c.padding) for c in convs if c.kernel_size == (3, 3)}
            assert found == {((d, d), (d, d))}


@pytest.mark.parametrize("stem, other", [("classic", "deep"), ("deep", "v1c"), ("v1c", "classic")])
def test_a_file_of_another_stem_is_refused_and_its_stem_named(tmp_path, stem, other):
    path, state = tmp_path / "w.pth", literal("resnet18", other).state_dict()
    torch.save(as_openmmlab(state) if other == "v1c" else state, path)  # as it is published
    line = refusal(make_backbone, flags("resnet18", stem, str(path)))
    assert line.startswith(f"--weights {path}: ") and "keys do not fit resnet18 (" in line
    assert line.endswith(f"; is it --stem {other}?)")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_weights_auto_are_fetched_once_checked_and_no_code_in_them_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(weights, "V1C", tmp_path.as_uri() + "/")
    state, args = literal("resnet18", "v1c").state_dict(), flags(stem="v1c", weights="auto")

    def publish(content, prefix=None):
        torch.save(content, "drawn.pth")
        prefix = prefix or hashlib.sha256(Path("drawn.pth").read_bytes()).hexdigest()[:8]
        monkeypatch.setattr(weights, "NAMES", {"resnet18": prefix})
        return Path("drawn.pth").rename(f"resnet18_v1c-{prefix}.pth")

    line = refusal(make_backbone, args)  # there is no such file yet
    assert "resnet18_v1c-" in line and "--weights FILE" in line and "--weights none" in line
    source = publish(state, prefix="0" * 8)
    line = refusal(make_backbone, args)
    assert source.name in line and "invalid hash" in line
    publish({"conv1.weight": Evil()})  # of a file: test_refusals.py
    line = refusal(make_backbone, args)
    assert "no readable state dict" in line and not Path("executed").exists()
    source = publish(state)
    for _ in ("fetched", "cached"):
        torch.manual_seed(1)
        loaded = make_backbone(args).state_dict()
        assert all(torch.equal(value, state[name]) for name, value in loaded.items())
        source.unlink(missing_ok=True)


def test_kernels_begin_by_kaimings_normal_distribution():
    """By fan out in backbone and stem; by fan in in the head of CPS, as its released code."""
    torch.manual_seed(0)
    backbone, head = make_backbone(flags("resnet18", "deep")), CPSHead(NARROW, 21, flags())
    for net, fan in ((backbone, "out_channels"), (head, "in_channels")):
        for name, module in net.named_modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:
                x = module.weight.detach()
                expected = (2 / (getattr(module, fan) * module.kernel_size[0] ** 2)) ** 0.5
                # 864 numbers in the smallest kernel: 1 / sqrt(2 n) = 2.4 % per sigma
                assert x.std().item() == pytest.approx(expected, rel=0.08), name
                assert x.abs().max() > 2.5 * x.std(), name  # a uniform one has no tails


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


def literal_cps(head, stages, size, training, rates):
    """CPS's head in the order of its released code: no dropout, ASPP added to its pool."""
    one, (low, _, _, high) = Literal(head, training), stages
    parts = [one.conv(high, "branches.0")]
    parts += [one.conv(high, f"branches.{i}", rate) for i, rate in enumerate(rates, 1)]
    x = F.leaky_relu(one.norm(torch.cat(parts, 1), "project.0.0"), 0.01)
    x = one.conv(x, "project.1")
    pooled = one.conv(F.adaptive_avg_pool2d(high, 1), "pool.0")
    pooled = one.conv(F.leaky_relu(one.norm(pooled, "pool.1.0"), 0.01), "pool.2")
    x = F.leaky_relu(one.norm(x + pooled, "norm.0"), 0.01)  # added, not concatenated
    x = torch.cat([one.block(low, "low"), up(x, low.shape[2:])], 1)
    x = one.block(one.block(x, "decode.0", 1), "decode.1", 1)
    return {"logits": up(one.conv(x, "classify"), size)}


def literal_deeplab(head, stages, size, training, rates):
    """U2PL's head: ASPP with its pool first, two blocks on 256 + 256 channels; the auxiliary one.

    Dropout is left out: it is compared in evaluation alone.
    """
    one, (low, _, third, high) = Literal(head, training), stages
    pooled = one.block(high.mean((2, 3), keepdim=True), "pool").expand(-1, -1, *high.shape[2:])
    parts = [pooled, one.block(high, "branches.0")]
    parts += [one.block(high, f"branches.{i}", rate) for i, rate in enumerate(rates, 1)]
    x = one.block(torch.cat(parts, 1), "project.0", 1)
    x = torch.cat([one.block(low, "low"), up(x, low.shape[2:])], 1)
    x = one.block(one.block(x, "classify.0", 1), "classify.2", 1)
    aux = one.conv(one.block(third, "aux.0", 1), "aux.2")
    return {"logits": up(one.conv(x, "classify.4"), size), "aux": up(aux, size)}


LITERAL = [
    (CPSHead, literal_cps, True, (1, 2, 3), 256),
    (CPSHead, literal_cps, False, (2, 4), 64),
    (DeepLabV3Plus, literal_deeplab, False, (1, 2, 4), 64),
]


@pytest.mark.smoke
@pytest.mark.parametrize("kind, literal_head, training, rates, width", LITERAL)
def test_the_heads_are_the_literal_ones(kind, literal_head, training, rates, width):
    torch.manual_seed(0)
    args = flags(aux_weight=0.4, aspp_rates=rates, head_channels=width)
    head = unsettled(kind(NARROW, 5, args)).train(training)
    widths = {m.out_channels for m in head.modules() if isinstance(m, nn.Conv2d)}
    assert widths - {48} == {width, 5}  # 48: CPS's low-level branch
    sides = zip(NARROW, (9, 5, 3, 3), strict=True)
    stages = [torch.randn(2, c, s, s + 1, requires_grad=True) for c, s in sides]
    expected = literal_head(head, stages, (33, 37), training, rates)
    out, again = (head([x.clone() for x in stages], (33, 37)) for _ in (1, 2))
    assert list(out) == list(expected)
    for key, logits in out.items():
        # the same operations in the same order; numbers of order 1
        assert torch.allclose(logits, expected[key], rtol=0, atol=1e-5)
        assert logits.shape == (2, 5, 33, 37) and logits.std() > 0.05
        assert torch.equal(logits, again[key])  # CPS has no dropout in training either


OWN = {  # what a head adds to the parent's where its flag is set, and the shape of that
    (U2PLHead, "training"): {"rep": (2, 256, 9, 10)},
    (ESLHead, "training"): {"rep": (2, 512, 9, 10), "encoder": (2, 512, 3, 4)},
    (ESLHead, "with_features"): {"rep": (2, 512, 9, 10), "encoder": (2, 512, 3, 4)},
}


@pytest.mark.parametrize("kind, flag", OWN)
@pytest.mark.parametrize("value", [True, False])
def test_heads_with_features_are_the_parents_and_more(kind, flag, value):
    torch.manual_seed(0)
    args = flags(aux_weight=0.4, head_channels=64)
    head, parent = kind(NARROW, 5, args).eval(), DeepLabV3Plus(NARROW, 5, args).eval()
    parent.load_state_dict({k: head.state_dict()[k] for k in parent.state_dict()})
    setattr(head, flag, value)  # of the head alone: BN and dropout stay in eval mode
    stages = [torch.randn(2, c, s, s + 1) for c, s in zip(NARROW, (9, 5, 3, 3), strict=True)]
    out, expected = head(stages, (33, 37)), parent(stages, (33, 37))
    assert all(torch.equal(out.pop(key), logits) for key, logits in expected.items())
    if kind is U2PLHead:  # its logits at stride 4, always
        assert torch.equal(upsample(out.pop("coarse"), (33, 37)), expected["logits"])
    assert {key: tuple(x.shape) for key, x in out.items()} == (OWN[kind, flag] if value else {})


@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize("head, stride, aux", [(DeepLabV3Plus, 8, 0.4), (CPSHead, 16, 0)])
def test_the_input_is_normalized_and_logits_are_float32_and_reach_every_parameter(
    head, stride, aux, amp
):
    torch.manual_seed(0)
    one = Group(0, 1, torch.device("cpu"))
    net = build(flags(amp=amp, stride=stride, aux_weight=aux), 5, head, one)
    given, seen = [], []
    net.backbone.conv1.register_forward_hook(lambda module, inputs, out: given.append(inputs[0]))
    net.head.low.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    x = torch.randint(256, (2, 3, 33, 50), dtype=torch.uint8)
    out = net(x)
    for kept in (given[0], *(p for p in net.parameters() if p.ndim == 4)):
        assert kept.is_contiguous(memory_format=torch.channels_last)
    assert list(out) == ["logits", "aux"][: 1 + bool(aux)]
    for logits in out.values():
        assert logits.shape == (2, 5, 33, 50) and logits.dtype == torch.float32
    assert seen == [torch.bfloat16 if amp == "bf16" else torch.float32]
    mean = torch.tensor((123.675, 116.28, 103.53)).double()[:, None, None]  # ImageNet's
    std = torch.tensor((58.395, 57.12, 57.375)).double()[:, None, None]
    # float32, numbers up to 3
    assert torch.allclose(given[0].double(), (x.double() - mean) / std, rtol=0, atol=1e-6)
    assert not {"mean", "std"} & set(net.state_dict())
    if amp == "none":  # backward in bfloat16 takes long on a CPU
        sum(logits.square().mean() for logits in out.values()).backward()
        for name, p in net.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), name
            assert p.grad.any() or name.endswith("0.bias"), name  # a bias before BN: nearly 0
    with torch.no_grad():
        large, small = (net.eval()(x, upsampled=choice)["logits"] for choice in (True, False))
    assert small.shape[2] == 9 and torch.equal(upsample(small, (33, 50)), large)


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("name", ["convnext_atto", "tf_efficientnet_lite0", "resnet18d"])
def test_a_network_of_timm_learns_with_its_own_normalization(name, stride):
    """Features at strides 4, 8, 16 and the output stride; all parameters get a gradient."""
    timm = pytest.importorskip("timm")
    net = Network(flags(f"timm/{name}", stride=stride, head_channels=8), 5, DeepLabV3Plus)
    assert net.backbone.feature_info.reduction() == [4, 8, min(stride, 16), stride]
    mean = timm.get_pretrained_cfg(name).mean
    assert (net.mean.flatten() / 255).tolist() == pytest.approx(mean)
    net(torch.randint(0, 256, (2, 3, 65, 97), dtype=torch.uint8))["logits"].sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_weights_of_timm_fit_or_are_refused_and_so_are_networks_without_features(tmp_path):
    timm = pytest.importorskip("timm")
    path = str(tmp_path / "weights.pth")
    whole = timm.create_model("resnet18d").state_dict()
    torch.save(whole, path)
    found = make_backbone(flags("timm/resnet18d", weights=path)).state_dict()
    assert all(torch.equal(whole[name], value) for name, value in found.items())
    part = str(tmp_path / "part.pth")
    torch.save({key: x for key, x in whole.items() if key != "layer2.0.bn1.bias"}, part)
    larger = str(tmp_path / "larger.pth")
    torch.save(timm.create_model("resnet34d").state_dict(), larger)
    theirs = str(tmp_path / "torchvision.pth")
    torch.save(torchvision.models.resnet34().state_dict(), theirs)
    for name, file, words in (
        ("resnet18d", larger, "it has 80 weights that resnet18d lacks, such as layer1.2.conv1"),
        ("resnet18", theirs, "it has 80 weights that resnet18 lacks, such as layer1.2.conv1"),
        ("vit_tiny_patch16_224", "none", "convnext_tiny"),
        ("resnet18x", "none", "near: resnet18"),
        ("resnet26d", path, "resnet26d"),
        ("resnet18d", part, "weights of resnet18d, such as layer2.0.bn1.bias"),
    ):
        assert words in refusal(make_backbone, flags(f"timm/{name}", weights=file))
    more = "80 keys do not fit resnet18"  # of torchvision's own, by the names
    assert more in refusal(make_backbone, flags("resnet18", weights=theirs))


def test_two_networks_of_cps_may_be_unlike(tmp_path):
    """A ResNet and one of timm learn from each other; they are scored and taken away by name."""
    pytest.importorskip("timm")
    tree, out = tiny.draw_tree(tmp_path / "data"), tmp_path / "run"
    words = "--backbone resnet18 --backbone-2 timm/tf_efficientnet_lite0 --evaluate mean"
    words = f"{words} --head-channels 16".split()
    tiny.train(cps_fpl, [*tiny.flags(tree, out, iters=2, evaluate=2, save=2), *words])
    mean = predict.open_source(out / "last.pt")
    parts = mean.networks["branch1"].backbone, mean.networks["branch2"].backbone
    assert type(parts[0]).__name__ == "ResNet" and hasattr(parts[1], "feature_info")
    x = torch.randint(0, 256, (1, 3, 33, 47), dtype=torch.uint8)
    both = [predict.open_source(out / "last.pt", f"branch{i}").net(x)["logits"] for i in (1, 2)]
    expected = sum(logits.softmax(1) for logits in both) / 2
    assert torch.allclose(mean.net(x)["logits"].softmax(1), expected, atol=1e-5)
    args = tiny.resolved(cps_fpl, ["--weights", "a.pth", "--weights-2", "b.pth", *words])
    assert [cps_fpl.of_branch(args, b).weights for b in ("branch1", "branch2")] == [
        "a.pth",
        "b.pth",
    ]
    assert mean.args.weights == mean.args.weights_2 == "none"  # what opens it fetches nothing
