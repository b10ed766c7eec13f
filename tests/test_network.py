"""The network: torchvision's weights and features, strides, dilations, sizes, parameters, heads."""

import hashlib
import itertools
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import cps_fpl
import supervised
import tiny
from common import weights
from common.distributed import Group
from cps_fpl import CPSHead
from esl import ESLHead
from supervised import DeepLabV3Plus, Network, build, dilate, features, make_backbone, upsample
from trees import refusal
from u2pl import U2PLHead
from unimatch import UniMatchHead

STEMS = {"classic": (), "deep": (64, 64, 128), "v1c": (32, 32, 64)}  # channels of the three 3x3
NARROW = [64, 128, 256, 512]


def flags(backbone="resnet18", stem="classic", weights="none", stride=16, **others):
    """Returns the flags that the network reads."""
    values = dict(aux_weight=0.0, aspp_rates=(1, 2, 3), head_channels=256, multi_grid=True)
    values |= dict(backbone=backbone, stem=stem, weights=weights, output_stride=stride)
    return supervised.Args(**values | others)


def unsettled(net):
    """Returns a network as after a training: no weight or statistic of a BN is 0 or 1."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            own = (module.weight.data, module.bias.data, module.running_mean, module.running_var)
            for tensor in own:
                tensor.uniform_(0.5, 1.5)
    return net


def literal(backbone, stem, **options):
    """torchvision's ResNet, where asked (ResNet-18) with a deep stem in front of it."""
    torch.manual_seed(0)
    net = getattr(torchvision.models, backbone)(weights=None, **options)
    layers = []
    for inputs, outputs in itertools.pairwise((3, *STEMS[stem])):
        stride = 1 if layers else 2
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    if layers:
        net.conv1, net.bn1 = nn.Sequential(*layers[:-2]), layers[-2]
    if stem == "deep":  # the first block takes 128 channels, by a shortcut
        first = net.layer1[0]
        first.conv1 = nn.Conv2d(128, 64, 3, padding=1, bias=False)
        first.downsample = nn.Sequential(nn.Conv2d(128, 64, 1, bias=False), nn.BatchNorm2d(64))
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
    return {re.sub("^bn1", "stem.7", re.sub("^conv1", "stem", k)): v for k, v in state.items()}


LOADED = [  # what is done to a state dict with its classifier, backbone, stem
    (lambda s: {k: v for k, v in s.items() if "num_batches" not in k}, "resnet18", "classic"),
    (lambda state: {"state_dict": state, "meta": {"epoch": 100}}, "resnet50", "classic"),
    (lambda s: {"model": {f"module.{k}": v for k, v in s.items()}}, "resnet18", "deep"),
    (as_openmmlab, "resnet18", "v1c"),
]


@pytest.mark.smoke
@pytest.mark.parametrize("saved, backbone, stem", LOADED)
def test_loaded_weights_give_the_features_of_a_literal_network(tmp_path, saved, backbone, stem):
    deep = backbone == "resnet50"  # torchvision dilates no other blocks; at an output stride of 8
    theirs = literal(backbone, stem, replace_stride_with_dilation=[False, deep, deep])
    torch.save(saved(theirs.state_dict()), tmp_path / "w.pth")
    mine = make_backbone(flags(backbone, stem, str(tmp_path / "w.pth"), 8 if deep else 16)).eval()
    kernels = [m for m in mine.layer4.modules() if getattr(m, "kernel_size", None) == (3, 3)]
    multi_grid = [4, 8, 16] if deep else [2, 2, 4, 4]  # [D6], which torchvision lacks
    assert [conv.dilation for conv in kernels] == [(d, d) for d in multi_grid]
    x = torch.randn(2, 3, 33, 49)
    with torch.no_grad():
        expected = literal_features(theirs, x)
        assert all(map(torch.equal, features(mine, x)[:3], expected))
        if deep:  # with torchvision's own dilations it is torchvision's
            dilate(mine.layer4, [2, 4, 4])
            assert torch.equal(features(mine, x)[3], expected[3])


def test_weights_auto_are_fetched_once_checked_and_no_code_in_them_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(weights, "V1C", tmp_path.as_uri() + "/")
    state, args = literal("resnet18", "v1c").state_dict(), flags(stem="v1c", weights="auto")

    def publish(content, digest=None):
        torch.save(content, "drawn.pth")
        digest = digest or hashlib.sha256(Path("drawn.pth").read_bytes()).hexdigest()[:8]
        monkeypatch.setattr(weights, "NAMES", {"resnet18": digest})
        return Path("drawn.pth").rename(f"resnet18_v1c-{digest}.pth")

    line = refusal(make_backbone, args)  # there is no such file yet
    assert "resnet18_v1c-" in line and "--weights FILE" in line and "--weights none" in line
    publish(state, "0" * 8)
    assert "invalid hash" in refusal(make_backbone, args)
    publish({"conv1.weight": Path("x")})  # more than tensors; of a file: test_refusals.py
    assert "no readable state dict" in refusal(make_backbone, args)
    source = publish(state)
    for _ in ("fetched", "cached"):
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


def conv(head, x, name, rate=0):
    """A head's convolution by its name: 1x1 at rate 0, else 3x3."""
    module = head.get_submodule(name)
    return F.conv2d(x, module.weight, module.bias, padding=rate, dilation=rate or 1)


def norm(head, x, name):
    module = head.get_submodule(name)
    return F.batch_norm(x, None, None, module.weight, module.bias, training=True)


def block(head, x, name, rate=0):
    """Convolution, BN, ReLU."""
    return F.relu(norm(head, conv(head, x, f"{name}.0", rate), f"{name}.1"))


def up(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def literal_cps(head, stages, size, rates):
    """CPS's head in the order of its released code: ASPP added to its pool."""
    low, _, _, high = stages
    parts = [conv(head, high, f"branches.{i}", rate) for i, rate in enumerate((0, *rates))]
    x = F.leaky_relu(norm(head, torch.cat(parts, 1), "project.0.0"), 0.01)
    x = conv(head, x, "project.1")
    pooled = conv(head, F.adaptive_avg_pool2d(high, 1), "pool.0")
    pooled = conv(head, F.leaky_relu(norm(head, pooled, "pool.1.0"), 0.01), "pool.2")
    x = F.leaky_relu(norm(head, x + pooled, "norm.0"), 0.01)  # added, not concatenated
    x = torch.cat([block(head, low, "low"), up(x, low.shape[2:])], 1)
    x = block(head, block(head, x, "decode.0", 1), "decode.1", 1)
    return {"logits": up(conv(head, x, "classify"), size)}


def literal_deeplab(head, stages, size, rates):
    """U2PL's head: ASPP with its pool first, two blocks on all channels; UniMatch's by 1x1."""
    low, _, third, high = stages
    pooled = block(head, high.mean((2, 3), keepdim=True), "pool").expand(-1, -1, *high.shape[2:])
    parts = [block(head, high, f"branches.{i}", rate) for i, rate in enumerate((0, *rates))]
    of_unimatch = isinstance(head, UniMatchHead)
    project, first, second, last = IN_UNIMATCH if of_unimatch else IN_U2PL
    x = block(head, torch.cat([pooled, *parts], 1), project, 0 if of_unimatch else 1)
    x = torch.cat([block(head, low, "low"), up(x, low.shape[2:])], 1)
    x = block(head, block(head, x, first, 1), second, 1)
    out = {"logits": up(conv(head, x, last), size)}
    if not of_unimatch:
        out["aux"] = up(conv(head, block(head, third, "aux.0", 1), "aux.2"), size)
    return out


IN_U2PL = "project.0 classify.0 classify.2 classify.4".split()
IN_UNIMATCH = "project decode.0 decode.1 classify".split()
IN_DEEPLAB = "project.1 classify.1 classify.3 aux.1".split()
IN_BOTH = [*IN_DEEPLAB, "represent.1", "represent.3"]
LITERAL = [  # head, dilations; where it drops channels; what it adds in training
    (CPSHead, literal_cps, (1, 2, 4), [], {}),
    (UniMatchHead, literal_deeplab, (2, 4), [], {}),
    (DeepLabV3Plus, literal_deeplab, (1, 2, 4), IN_DEEPLAB, {}),
    (U2PLHead, literal_deeplab, (2, 4), IN_BOTH, {"rep": 256}),
    (ESLHead, literal_deeplab, (2, 4), IN_BOTH, {"rep": 512, "encoder": 512}),
]


@pytest.mark.smoke
@pytest.mark.parametrize("kind, literal_head, rates, dropped, own", LITERAL)
def test_the_heads_are_the_literal_ones(kind, literal_head, rates, dropped, own):
    torch.manual_seed(0)
    args = flags(aux_weight=0.4, aspp_rates=rates, head_channels=64)
    head = unsettled(kind(NARROW, 5, args))
    widths = {m.out_channels for m in head.modules() if isinstance(m, nn.Conv2d)}
    assert widths - {48} == {64, 5, *own.values()}  # 48: CPS's low-level branch
    dropouts = {name: m for name, m in head.named_modules() if isinstance(m, nn.Dropout2d)}
    assert {name: m.p for name, m in dropouts.items()} == dict.fromkeys(dropped, 0.1)
    for module in dropouts.values():
        module.p = 0.0
    stages = [torch.randn(2, c, s, s + 1) for c, s in zip(NARROW, (9, 5, 3, 3), strict=True)]
    expected = literal_head(head, stages, (33, 37), rates)
    out = head(stages, (33, 37))
    for key, logits in expected.items():
        # the same operations in the same order; numbers of order 1
        assert torch.allclose(out[key], logits, rtol=0, atol=1e-5)
        assert logits.shape == (2, 5, 33, 37) and logits.std() > 0.05
    if kind is U2PLHead:  # its logits at stride 4, always
        expected["coarse"] = out["coarse"]
        assert torch.equal(upsample(out["coarse"], (33, 37)), out["logits"])
    assert {key: out[key].shape[1] for key in out.keys() - expected.keys()} == own
    if own:
        assert out["rep"].shape[2:] == (9, 10) and out.get("encoder", stages[3]) is stages[3]
    assert head.eval()(stages, (33, 37)).keys() == expected.keys()
    head.with_features = True
    assert head(stages, (33, 37)).keys() == (out if kind is ESLHead else expected).keys()


@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize("head, aux", [(DeepLabV3Plus, 0.4), (CPSHead, 0)])
def test_the_input_is_normalized_and_logits_are_float32_and_reach_every_parameter(head, aux, amp):
    torch.manual_seed(0)
    args = flags(amp=amp, aux_weight=aux, head_channels=32)
    net = build(args, 5, head, Group(0, 1, torch.device("cpu")))
    given, seen = [], []
    net.backbone.conv1.register_forward_hook(lambda module, inputs, out: given.append(inputs[0]))
    net.head.low.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    x = torch.randint(256, (2, 3, 33, 50), dtype=torch.uint8)
    out = net(x)
    mean = torch.tensor((123.675, 116.28, 103.53)).double()[:, None, None]  # ImageNet's
    std = torch.tensor((58.395, 57.12, 57.375)).double()[:, None, None]
    # float32, numbers up to 3
    assert torch.allclose(given[0].double(), (x.double() - mean) / std, rtol=0, atol=1e-6)
    for kept in (given[0], *(p for p in net.parameters() if p.ndim == 4)):
        assert kept.is_contiguous(memory_format=torch.channels_last)
    assert seen == [torch.bfloat16 if amp == "bf16" else torch.float32]
    for logits in out.values():
        assert logits.shape == (2, 5, 33, 50) and logits.dtype == torch.float32
    assert not {"mean", "std"} & set(net.state_dict())
    if amp == "none":  # backward in bfloat16 takes long on a CPU
        sum(logits.square().mean() for logits in out.values()).backward()
        for name, p in net.named_parameters():
            assert p.grad.any() or name.endswith("0.bias"), name  # a bias before BN: nearly 0
            assert p.grad.isfinite().all(), name
    with torch.no_grad():
        large, small = (net.eval()(x, upsampled=choice)["logits"] for choice in (True, False))
    assert small.shape[2] == 9 and torch.equal(upsample(small, (33, 50)), large)


@pytest.mark.parametrize("name, stride", [("tf_efficientnet_lite0", 8), ("convnext_atto", 16)])
def test_a_network_of_timm_learns_with_its_own_normalization(name, stride):
    """Features at strides 4, 8, 16 and the output stride; all parameters get a gradient."""
    timm = pytest.importorskip("timm")
    net = Network(flags(f"timm/{name}", stride=stride, head_channels=8), 5, DeepLabV3Plus)
    assert net.backbone.feature_info.reduction() == [4, 8, stride, stride]
    mean = timm.get_pretrained_cfg(name).mean
    assert (net.mean.flatten() / 255).tolist() == pytest.approx(mean)
    net(torch.randint(0, 256, (2, 3, 65, 97), dtype=torch.uint8))["logits"].sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_weights_of_timm_fit_or_are_refused_and_so_are_networks_without_features(tmp_path):
    timm = pytest.importorskip("timm")
    whole = timm.create_model("resnet18d").state_dict()
    larger = timm.create_model("resnet34d").state_dict()
    part = {key: x for key, x in whole.items() if key != "layer2.0.bn1.bias"}
    args = flags("timm/resnet18d", weights=str(tmp_path / "w.pth"))
    for state, words in (
        (larger, "it has 80 weights that resnet18d lacks, such as layer1.2.conv1"),
        (part, "weights of resnet18d, such as layer2.0.bn1.bias"),
    ):
        torch.save(state, args.weights)
        assert words in refusal(make_backbone, args)
    for state in ({key: x for key, x in whole.items() if key[:3] != "fc."}, whole):
        torch.save(state, args.weights)
        found = make_backbone(args).state_dict()
        assert all(torch.equal(whole[name], value) for name, value in found.items())
    for name, words in ("vit_tiny_patch16_224", "convnext_tiny"), ("resnet18x", "near: resnet18"):
        assert words in refusal(make_backbone, flags(f"timm/{name}"))


def test_two_networks_of_cps_may_be_unlike():
    words = "--backbone-2 resnet50 --weights a.pth --weights-2 b.pth".split()
    args = tiny.resolved(cps_fpl, words)
    for name, pair in ("branch1", ("resnet18", "a.pth")), ("branch2", ("resnet50", "b.pth")):
        branch = cps_fpl.of_branch(args, name)
        assert (branch.backbone, branch.weights) == pair
