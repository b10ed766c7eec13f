"""Networks: torchvision's and timm's weights and features, dilations, parameters, heads, ViTs."""

import hashlib
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import cps_fpl
import predict
import supervised
import tiny
import unimatch
import unimatch_v2 as v2
from common import distributed, weights
from common.data import FACTS
from common.distributed import Group
from common.flags import merge
from cps_fpl import CPSHead
from esl import ESLHead
from results import released
from supervised import DeepLabV3Plus, Network, build, dilate, features, make_backbone, upsample
from trees import refusal
from u2pl import U2PLHead

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


def test_every_parameter_is_in_one_group():
    """Also single factors, which some of timm's networks have."""
    parts = [nn.ParameterList(torch.zeros(n) for n in ((), (2,), (2, 2))) for _ in range(2)]
    args = SimpleNamespace(lr_head=1.0, lr=1.0, weight_decay=0.1, decay_on="weights")
    for script in (supervised, v2):
        net = SimpleNamespace(backbone=parts[0], head=parts[1])
        groups = script.make_optimizer([net], args).param_groups
        assert [len(group["params"]) for group in groups] == [1, 2, 1, 2]


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
    of_unimatch = isinstance(head, unimatch.UniMatchHead)
    project, first, second, last = NAMES_IN_UNIMATCH if of_unimatch else NAMES_IN_U2PL
    x = block(head, torch.cat([pooled, *parts], 1), project, 0 if of_unimatch else 1)
    x = torch.cat([block(head, low, "low"), up(x, low.shape[2:])], 1)
    x = block(head, block(head, x, first, 1), second, 1)
    out = {"logits": up(conv(head, x, last), size)}
    if not of_unimatch:
        out["aux"] = up(conv(head, block(head, third, "aux.0", 1), "aux.2"), size)
    return out


NAMES_IN_U2PL = "project.0 classify.0 classify.2 classify.4".split()
NAMES_IN_UNIMATCH = "project decode.0 decode.1 classify".split()
DROPPED = "project.1 classify.1 classify.3 aux.1".split()
DROPPED_WITH_REP = [*DROPPED, "represent.1", "represent.3"]
LITERAL = [  # head, dilations; where it drops channels; what it adds in training
    (CPSHead, literal_cps, (1, 2, 4), [], {}),
    (unimatch.UniMatchHead, literal_deeplab, (2, 4), [], {}),
    (DeepLabV3Plus, literal_deeplab, (1, 2, 4), DROPPED, {}),
    (U2PLHead, literal_deeplab, (2, 4), DROPPED_WITH_REP, {"rep": 256}),
    (ESLHead, literal_deeplab, (2, 4), DROPPED_WITH_REP, {"rep": 512, "encoder": 512}),
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


OF_TIMM = [("tf_efficientnet_lite0", 8), ("convnext_atto", 16)]
OF_TIMM += [("mobilenetv3_small_050", 16), ("resnet18d", 16)]


@pytest.mark.parametrize("name, stride", OF_TIMM)
def test_a_network_of_timm_takes_a_step_with_its_own_normalization(name, stride):
    timm = pytest.importorskip("timm")
    more = {"lr": 0.01, "lr_head": 1.0, "decay_on": "weights", "weight_decay": 1e-4}
    args = flags(f"timm/{name}", stride=stride, head_channels=8, **more)
    net = Network(args, 5, DeepLabV3Plus)
    assert net.backbone.feature_info.reduction() == [4, 8, stride, stride]
    mean = timm.get_pretrained_cfg(name).mean
    assert (net.mean.flatten() / 255).tolist() == pytest.approx(mean)
    before = [p.detach().clone() for p in net.parameters()]
    x = torch.randint(0, 256, (2, 3, 65, 97), dtype=torch.uint8)
    net(x)["logits"].square().sum().backward()
    supervised.make_optimizer([net], args).step()
    assert all(p.grad is not None and p.isfinite().all() for p in net.parameters())
    moved = [not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)]
    assert sum(moved) > 0.8 * len(moved)  # not behind a BN that starts as 0, as timm's ResNets do


@pytest.mark.parametrize("name", ["resnet18", "timm/tf_efficientnet_lite0", "timm/resnet18d"])
def test_sync_bn_leaves_a_network_what_it_computes(name):
    """Also where a BN of timm's holds the activation behind it."""
    pytest.importorskip("timm")
    net = unsettled(Network(flags(name, head_channels=8), 5, DeepLabV3Plus)).eval()
    x = torch.randint(0, 256, (2, 3, 65, 97), dtype=torch.uint8)
    with torch.no_grad():
        before, keys = net(x)["logits"], list(net.state_dict())
        net = distributed.sync_bn(net)
        assert torch.equal(net(x)["logits"], before) and list(net.state_dict()) == keys
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, nn.SyncBatchNorm) for m in norms)


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


MILLIONS = [  # of the released logs: of the network, or of backbone and head; dilations of layer4
    (unimatch, "resnet50 --stem deep --output-stride 8", [40.5], [2, 4, 4]),
    (unimatch, "resnet101 --stem deep", [59.5], [1, 2, 2]),
    (v2, "dinov2_vits14", [22.1, 2.7], []),
    (v2, "dinov2_vitb14", [86.6, 10.6], []),
    (v2, "dinov2_vitl14", [304.4, 30], []),
    (v2, "dinov3_vits16", [21.6, 2.7], []),  # the last three: of timm's networks
    (v2, "dinov3_vitb16", [85.7, 10.6], []),
    (v2, "dinov3_vitl16", [303.2, 30], []),
]


@pytest.mark.parametrize("script, backbone, millions, dilations", MILLIONS)
def test_networks_have_the_parameters_of_the_released_logs(script, backbone, millions, dilations):
    """DPT: 10.9 and 31.2 there, with a residual unit that is never called [D6]. No multi-grid."""
    words = f"--dataset voc --split 92 --weights none --backbone {backbone}".split()
    head = v2.DPTHead if script is v2 else unimatch.UniMatchHead
    with torch.device("meta"):
        net = script.Network(tiny.resolved(script, words), 21, head)
    parts = [net.backbone, net.head] if script is v2 else [net]
    for part, expected in zip(parts, millions, strict=True):
        assert sum(p.numel() for p in part.parameters()) / 1e6 == pytest.approx(expected, abs=0.06)
    assert [block.conv2.dilation[0] for block in getattr(net.backbone, "layer4", [])] == dilations


def test_the_head_decodes_the_last_images_once_more_with_channels_dropped(monkeypatch):
    """A channel of an image is 0 or doubled; clean ones are as without it."""
    features = torch.randn(5, 400, 3, 3)
    ratio = unimatch.feature_perturbation(features) / features
    assert ((ratio == ratio[..., :1, :1]) & ((ratio == 0) | (ratio == 2))).all()
    assert 0.45 < (ratio == 2).float().mean() < 0.55
    args = SimpleNamespace(head_channels=16, aspp_rates=(1, 2))
    head = unimatch.UniMatchHead([4, 8, 16, 32], 5, args).eval()
    stages = [torch.randn(3, c, s, s) for c, s in ((4, 16), (8, 8), (16, 4), (32, 4))]
    clean = head(stages, (61, 61))["logits"]
    seen = []
    monkeypatch.setattr(unimatch, "feature_perturbation", lambda x: seen.append(x) or 3 * x)
    head.perturbed = 2
    out = head(stages, (61, 61))
    assert torch.allclose(out["logits"], clean, atol=1e-5) and out["logits"].shape == clean.shape
    assert [torch.equal(x, stages[i][1:]) for x, i in zip(seen, (0, 3), strict=True)] == [True] * 2
    head.perturbed = 0
    tripled = head([3 * x[1:] for x in stages], (61, 61))["logits"]
    assert torch.allclose(out["perturbed"], tripled, atol=1e-4)


def of_vit(**changes):
    values = dict(backbone="dinov2_vits14", weights="none", freeze=0, amp="none")
    return SimpleNamespace(**values | dict(checkpoint_activations=False) | changes)


@pytest.fixture
def small(monkeypatch):
    """Makes every ViT a small one; returns a function of flags to a backbone."""
    own = dict(width=32, depth=4, heads=2, taken=(0, 1, 2, 3), maps=(4, 6, 8, 10), fused=12)
    sizes = {name: size._replace(**own) for name, size in v2.SIZES.items()}
    monkeypatch.setattr(v2, "SIZES", sizes)
    return lambda **changes: v2.make_backbone(of_vit(**changes)).eval()


@pytest.mark.smoke
@pytest.mark.parametrize("h, w", [(37, 37), (57, 57), (37, 20), (20, 31), (1, 1), (9, 70)])
def test_position_embeddings_are_interpolated_as_published(h, w):
    """[D27]: by factors with an offset of 0.1, without antialiasing."""
    torch.manual_seed(0)
    grid = torch.randn(1, 37 * 37, 6, requires_grad=True)
    own, theirs = v2.position_embedding(grid, h, w), grid.unflatten(1, (37, 37)).movedim(3, 1)
    if (h, w) != (37, 37):
        factors = (h + 0.1) / 37, (w + 0.1) / 37
        theirs = F.interpolate(theirs, scale_factor=factors, mode="bicubic", antialias=False)
    assert own.shape == theirs.shape == (1, 6, h, w)
    # places are float32 numbers up to 37, in another order of rounding; slopes are of order 1
    assert (own - theirs).abs().max() <= (0 if h == w == 37 else 3e-5)
    slopes = [torch.autograd.grad((x * theirs.detach()).sum(), grid)[0] for x in (own, theirs)]
    assert torch.allclose(*slopes, atol=1e-4)


VITS = [  # backbone, timm's network, height, width
    ("dinov2_vits14", "vit_small_patch14_dinov2", (280, 434)),
    ("dinov3_vits16", "vit_small_patch16_dinov3", (512, 320)),
    ("dinov3_vits16", "vit_small_patch16_dinov3_qkvb", (16, 48)),  # biases of queries, values
]


@pytest.mark.parametrize("backbone, name, size", VITS)
def test_features_are_those_of_timms_networks(backbone, name, size, small, tmp_path):
    """From random weights, by timm's key names; but for DINOv2's position embedding."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    shape = dict(embed_dim=32, depth=4, num_heads=2, num_classes=0, img_size=size)
    theirs = timm.create_model(name, **shape).eval()
    for p in theirs.parameters():
        p.data += 0.2 * torch.randn_like(p)
    state = theirs.state_dict()
    if "pos_embed" in state:
        first, patches = state["pos_embed"][:, :1], torch.randn(1, 37 * 37, 32)
        state["pos_embed"] = torch.cat([first, patches], 1)
        positions = v2.position_embedding(patches, size[0] // 14, size[1] // 14)
        theirs.pos_embed.data[:, 1:] = positions.flatten(2).transpose(1, 2)
    torch.save(state, tmp_path / "w.pth")
    own = small(backbone=backbone, weights=str(tmp_path / "w.pth")).train()
    x = torch.randn(2, 3, *size)
    maps = theirs.forward_intermediates(x, norm=True, intermediates_only=True)
    for mine, other in zip(v2.features(own, x), maps, strict=True):
        assert mine.shape == other.shape and torch.allclose(mine, other, atol=1e-5)


SIZES = {(56, 70): (4, 5), (57, 62): (4, 4), (63, 64): (5, 5), (6, 300): (1, 21), (1, 1): (1, 1)}
CASES = [("dinov2_vits14", *case) for case in SIZES.items()]


@pytest.mark.parametrize("backbone, size, grid", [*CASES, ("dinov3_vits16", (71, 9), (4, 1))])
def test_features_of_any_size(backbone, size, grid, small):
    """The image becomes one of whole patches, the nearest; half a patch is rounded up [D28]."""
    net, x = small(backbone=backbone), torch.randn(2, 3, *size)
    resized = [v2.SIZES[backbone].patch * n for n in grid]
    resized = F.interpolate(x, resized, mode="bilinear", align_corners=True)
    for mine, expected in zip(v2.features(net, x), net(resized), strict=True):
        assert mine.shape == (2, 32, *grid) and torch.equal(mine, expected)
    logits = v2.Network(of_vit(backbone=backbone), 5, v2.DPTHead)(x.byte())["logits"]
    assert logits.shape == (2, 5, *size) and logits.isfinite().all()


def test_dpt_is_the_literal_one(small):
    torch.manual_seed(0)
    head = v2.DPTHead([32] * 4, 5, of_vit())
    stages = [torch.randn(2, 32, 5, 3) for _ in range(4)]

    def residual(x, name):
        return x + conv(head, conv(head, x.relu(), f"{name}.conv1", 1).relu(), f"{name}.conv2", 1)

    maps = [conv(head, x, f"project.{i}") for i, x in enumerate(stages)]
    for i, function, options in (
        (0, F.conv_transpose2d, {"stride": 4}),
        (1, F.conv_transpose2d, {"stride": 2}),
        (3, F.conv2d, {"stride": 2, "padding": 1}),
    ):
        module = head.resize[i]
        maps[i] = function(maps[i], module.weight, module.bias, **options)
    *maps, x = (conv(head, x, f"narrow.{i}", 1) for i, x in enumerate(maps))
    for i, size in ((3, (5, 3)), (2, (10, 6)), (1, (20, 12)), (0, (40, 24))):
        if i < 3:
            x = x + residual(maps[i], f"before.{i}")
        x = conv(head, up(residual(x, f"after.{i}"), size), f"out.{i}")
    x = up(conv(head, conv(head, x, "classify.0", 1).relu(), "classify.2"), (71, 43))
    assert torch.allclose(head(stages, (71, 43))["logits"], x, atol=1e-6)
    masks = torch.rand(2, 32, 1, 1)
    expected = head([stage * masks for stage in stages], (9, 9))["logits"]
    head.masks = masks
    assert torch.equal(head(stages, (9, 9))["logits"], expected)


# script: how keys begin here, and in the released code
THEIRS = json.loads(Path(__file__).with_name("released.json").read_text())


# weights whose input channels come in another order: those of the first here, last there
LAST = {"unimatch": ("head.project.0.weight", 256), "cps_fpl": ("head.decode.0.0.weight", 48)}


def as_released(name, net, begin=""):
    """Returns the state dict of a network as the released code of a script has it."""
    found = {}
    for key, value in net.state_dict().items():
        weight, width = LAST.get(name, ("", 0))
        if key == weight:
            value = torch.cat([value[:, width:], value[:, :width]], 1)
        here = next((here for here in THEIRS[name] if key.startswith(here)), "")
        found[f"module.{begin}{THEIRS[name].get(here, '')}{key[len(here) :]}"] = value
    return found


FILES = {  # script: data set, names of both networks in a file, None: the file itself
    "unimatch_v2": ("voc", "model", "model_ema"),
    "unimatch": ("cityscapes", None, None),
    "u2pl": ("cityscapes", "model_state", "teacher_state"),
    "cps_fpl": ("voc", "model", "model"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_released_checkpoint_computes_here_what_it_computed(name, small, tmp_path, monkeypatch):
    monkeypatch.setattr(released, "VITS", {32: "dinov2_vits14"})
    monkeypatch.setattr(released, "RESNETS", {2: "resnet18"})
    monkeypatch.chdir(tmp_path)
    dataset, *places = FILES[name]
    module = tiny.script(name)
    backbone = {"unimatch_v2": {}}.get(name, dict(backbone="resnet18", stem="deep"))
    args = merge(module.Args(dataset=dataset, weights="none", **backbone), module.preset)
    nets, saved = {}, {"epoch": 37, "previous_best": np.mean([86.1])}
    for part, place in zip(tiny.NETWORKS[name], places, strict=False):
        nets[part] = module.Network(args, len(FACTS[dataset]["classes"]), predict.head_of(module))
        begin = f"{part}." * (name == "cps_fpl")
        state = as_released(name, nets[part].eval(), begin)
        if name == "unimatch_v2":  # what computes nothing
            state["module.backbone.mask_token"] = torch.zeros(1, 32)
            state["module.head.scratch.refinenet4.resConfUnit1.conv1.bias"] = torch.zeros(1)
        saved = saved | {place: saved.get(place, {}) | state} if place else state
    torch.save(saved, "best.pth")
    released.main(["best.pth", "--dataset", dataset, "--out", "new"])
    x = torch.randint(0, 256, (1, 3, 30, 45), dtype=torch.uint8)
    for part, net in nets.items():
        found, classes = predict.load("new", part)
        assert torch.allclose(found(x), net(x)["logits"], atol=1e-5)
        assert list(classes) == FACTS[dataset]["classes"]
    assert predict.open_source("new").name == tiny.SCORED[name]
    line = refusal(released.main, ["best.pth", "--dataset", "coco", "--out", "n"])
    assert f"of {name}.py for the 81 classes of coco (head." in line
    assert not Path("n").exists()


def test_what_is_no_released_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    marks = {code.script: code.mark for code in released.CODES}
    alone = {marks["unimatch"]: torch.zeros(3), "head.project.0.weight": torch.zeros(3)}
    for name, content in {
        "other": {"model": {"a": torch.zeros(1)}},
        "keys": {1: torch.zeros(1)},
        "tensor": {"model": torch.zeros(1)},
        "words": {"model": {marks["unimatch"]: "text"}},
        "one": alone,
        "head": {marks["unimatch_v2"]: torch.zeros(1)},
    }.items():
        torch.save(content, f"{name}.pth")
    Path("bad.pth").write_bytes(b"no file")
    none = "none of the networks that the released codes of unimatch_v2, unimatch"
    for name, out, line in (
        ("other.pth", "there", "--out there exists"),
        *((f"{name}.pth", "n", none) for name in ("other", "keys", "tensor", "words")),
        ("one.pth", "n", "keys do not fit resnet101 of unimatch.py for the 21 classes of voc"),
        ("head.pth", "n", "keys do not fit dinov2_vits14 of unimatch_v2.py"),
        ("bad.pth", "n", "bad.pth: no checkpoint of a released code"),
        ("no.pth", "n", "no.pth: no such file"),
    ):
        assert line in refusal(released.main, [name, "--dataset", "voc", "--out", out])


def test_weights_are_metas_or_timms_and_nothing_else(small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(weights, "META", tmp_path.as_uri() + "/")
    state = {key: torch.randn_like(x) for key, x in small().state_dict().items()}
    meta, wide = state | {"mask_token": torch.zeros(1, 32)}, torch.zeros(1, 1, 384)
    address, file = tmp_path / "dinov2_vits14/dinov2_vits14_pretrain.pth", str(tmp_path / "w.pth")
    address.parent.mkdir()
    torch.save(meta, address)
    line = refusal(v2.make_backbone, of_vit(weights="auto"))
    assert "invalid hash" in line and "--weights FILE" in line
    sha = hashlib.sha256(address.read_bytes()).hexdigest()
    monkeypatch.setitem(weights.DINOV2, "dinov2_vits14", sha)
    torch.save({f"backbone.{key}": x for key, x in meta.items()}, file)
    for name in ("auto", file):
        found = small(weights=name).state_dict()
        assert all(torch.equal(x, state[key]) for key, x in found.items())
    for more, words in (
        ({"pos_embed": torch.zeros(1, 257, 32)}, "1 keys do not fit dinov2_vits14 (pos_embed"),
        ({"register_tokens": torch.zeros(1, 4, 32)}, "register tokens: give the one without"),
        ({"storage_tokens": torch.zeros(1, 4, 384), "cls_token": wide}, "it is dinov3_vits16"),
        ({"blocks.0.mlp.w1.weight": torch.zeros(32)}, "a ViT with a gated MLP"),
    ):
        torch.save(meta | more, file)
        assert words in refusal(v2.make_backbone, of_vit(weights=file))


OF_TRANSFORMERS = (  # Meta's names -> transformers'; queries, keys and values are apart there
    ("patch_embed.proj", "embeddings.patch_embeddings"),
    ("cls_token", "embeddings.cls_token"),
    ("storage_tokens", "embeddings.register_tokens"),
    ("attn.proj", "attention.o_proj"),
    ("ls1.gamma", "layer_scale1.lambda1"),
    ("ls2.gamma", "layer_scale2.lambda1"),
    ("fc1", "up_proj"),
    ("fc2", "down_proj"),
    ("blocks", "layer"),
)


def test_weights_of_a_dinov3_are_metas_or_transformers(small, tmp_path):
    """Meta's file has the periods, rounded, and a mask of biases; the other neither."""
    torch.manual_seed(0)
    file, backbone = str(tmp_path / "w.pth"), "dinov3_vits16"
    fresh = small(backbone=backbone)
    state = {key: torch.randn_like(x) for key, x in fresh.named_parameters()}
    constants = dict(fresh.named_buffers())
    rounded = {"rope_embed.periods": constants["rope_embed.periods"].bfloat16().float()}
    torch.save(constants | rounded | state | {"mask_token": torch.zeros(1, 32)}, file)
    net = small(backbone=backbone, weights=file)
    found = net.state_dict()
    assert all(torch.equal(x, (constants | rounded | state)[key]) for key, x in found.items())
    x = torch.randn(1, 3, 64, 80)
    expected = v2.features(net, x)[3]
    for key in state:
        if key.endswith("qkv.bias"):
            found[key][32:64] = 9.0  # of keys: masked
    assert torch.equal(v2.features(net, x)[3], expected)

    theirs = {}
    for key, value in state.items():
        for own, other in OF_TRANSFORMERS:
            key = key.replace(own, other)
        if "qkv" in key:
            for letter, part in zip("qkv", value.split(32), strict=True):
                theirs[key.replace("attn.qkv", f"attention.{letter}_proj")] = part
        else:
            theirs[key] = value
    theirs = {key: x for key, x in theirs.items() if not key.endswith("k_proj.bias")}
    for damaged, names in (
        ({"layer.0.attention.v_proj.weight": None}, "0.attn.k_proj.weight, blocks.0.attn.q_proj"),
        ({"layer.3.attention.v_proj.bias": None}, "blocks.3.attn.q_proj.bias, blocks.3.attn.qkv"),
        ({"layer.3.attention.k_proj.bias": torch.ones(32)}, "blocks.3.attn.k_proj.bias"),
        ({"embeddings.register_tokens": None}, "1 keys do not fit dinov3_vits16 (storage_tokens)"),
        ({"local_cls_norm.weight": torch.ones(32)}, "a DINOv3 of satellite images"),
    ):
        kept = {key: x for key, x in (theirs | damaged).items() if x is not None}
        torch.save(kept, file)
        assert names in refusal(v2.make_backbone, of_vit(backbone=backbone, weights=file))
    torch.save(theirs | {"embeddings.mask_token": torch.zeros(1, 1, 32)}, file)
    found = small(backbone=backbone, weights=file).state_dict()
    for key, value in (constants | state).items():
        if key.endswith("qkv.bias"):
            value[32:64] = 0
        assert torch.equal(found[key], value), key

    torch.save(small().state_dict() | {"cls_token": torch.zeros(1, 1, 768)}, file)
    licence = "dinov3-license; give --weights FILE"
    for name, words in (file, "it is dinov2_vitb14"), ("auto", licence):
        assert words in refusal(v2.make_backbone, of_vit(backbone=backbone, weights=name))


def test_frozen_blocks(small):
    """Tensors that learn nothing: 4 before the blocks, 14 of a block, 2 of the last norm."""
    for backbone in ("dinov2_vits14", "dinov3_vits16"):
        for frozen, fixed in ((0, 0), (2, 32), (4, 62)):
            net = small(backbone=backbone, freeze=frozen)
            assert sum(not p.requires_grad for p in net.parameters()) == fixed
    line = "--freeze 5: dinov2_vits14 has 4 blocks"
    assert refusal(v2.make_backbone, of_vit(freeze=5)) == line


def test_activations_are_computed_again_where_a_block_learns_and_gradients_are_equal(small):
    x = torch.randn(2, 3, 28, 28)
    for backbone, frozen, runs in (
        ("dinov2_vits14", 0, [2, 2, 2, 2]),
        ("dinov3_vits16", 1, [1, 2, 2, 2]),
        ("dinov2_vits14", 3, [1, 1, 1, 2]),
    ):
        plain, net = (
            small(backbone=backbone, freeze=frozen, checkpoint_activations=again)
            for again in (False, True)
        )
        net.load_state_dict(plain.state_dict())
        seen = []
        for block in net.blocks:
            block.register_forward_pre_hook(lambda block, _, seen=seen: seen.append(block))
        for each in (plain, net):
            sum(stage.square().sum() for stage in v2.features(each, x)).backward()
        assert [seen.count(block) for block in net.blocks] == runs
        for own, other in zip(net.parameters(), plain.parameters(), strict=True):
            assert own.grad is other.grad or torch.equal(own.grad, other.grad)
        with torch.no_grad():
            v2.features(net, x)
        assert len(seen) == sum(runs) + 4
    words = "--dataset shapes --backbone dinov2_vits14 --freeze 4 --checkpoint-activations"
    line = "--checkpoint-activations: no block learns beside --freeze 4"
    assert refusal(tiny.resolved, v2, words.split()) == line
