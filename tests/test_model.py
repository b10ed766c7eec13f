"""The network: torchvision's weights and features, strides, dilations, sizes, parameters."""

import hashlib
import os
import shutil
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from common import Refusal, weights
from cps_fpl import CPSHead
from supervised import Args, DeepLabV3Plus, Network, dilate, make_backbone, upsample

STAGES = ("layer1", "layer2", "layer3", "layer4")
DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


def flags(backbone="resnet18", stem="classic", weights="none", stride=16, **others):
    """Returns the flags that the network reads."""
    values = dict(backbone=backbone, stem=stem, weights=weights, output_stride=stride)
    return Args(**{"aux_weight": 0.0, "aspp_rates": (1, 2, 3), **values, **others})


def torchvision_file(folder, backbone, seed=0):
    """Saves torchvision's own network with random weights and statistics; returns it and the file.

    Calling it twice with one seed gives one network.
    """
    torch.manual_seed(seed)
    net = getattr(torchvision.models, backbone)(weights=None).eval()
    for module in net.modules():  # as after a training: no statistic is 0 or 1
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.uniform_(-0.5, 0.5)
    path = folder / f"{backbone}.pth"
    torch.save(net.state_dict(), path)
    return net, str(path)


def features(net, x):
    """Returns the four stages' features of a ResNet, torchvision's or ours."""
    h, stages = net.maxpool(net.relu(net.bn1(net.conv1(x)))), []
    for name in STAGES:
        h = getattr(net, name)(h)
        stages.append(h)
        # not all dead: equal features say something
        assert h.is_meta or 0.1 < (h > 0).float().mean() <= 1
    return stages


def meta(make, *args):
    """Returns make(*args) without memory: shapes and parameter counts only."""
    with torch.device("meta"):
        return make(*args)


# ---- weights ----


@pytest.mark.parametrize("backbone", DEPTHS)
def test_torchvisions_weights_load_with_no_key_left_over(tmp_path, backbone):
    net, path = torchvision_file(tmp_path, backbone)
    mine, theirs = make_backbone(flags(backbone, weights=path)).state_dict(), net.state_dict()
    assert set(theirs) - set(mine) == {"fc.weight", "fc.bias"} and not set(mine) - set(theirs)
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


def test_a_deep_stem_file_loads_and_its_classifier_is_dropped(tmp_path):
    torch.manual_seed(0)
    state = make_backbone(flags(stem="deep")).state_dict()
    stem = {name: tuple(v.shape) for name, v in state.items() if name.endswith("weight")}
    kernels = {name: shape for name, shape in stem.items() if name.startswith(("conv1", "bn1"))}
    assert kernels == {
        "conv1.0.weight": (64, 3, 3, 3),
        "conv1.1.weight": (64,),
        "conv1.3.weight": (64, 64, 3, 3),
        "conv1.4.weight": (64,),
        "conv1.6.weight": (128, 64, 3, 3),
        "bn1.weight": (128,),
    }  # the names of the released deep-stem files
    torch.save(state | {"fc.weight": torch.zeros(1000, 512)}, tmp_path / "deep.pth")
    torch.manual_seed(1)
    loaded = make_backbone(flags(stem="deep", weights=str(tmp_path / "deep.pth"))).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.smoke
@pytest.mark.parametrize("key", ["conv1.weight", "layer3.1.bn2.running_var", "layer4.0.bn1.bias"])
def test_a_file_that_does_not_fit_is_refused(tmp_path, key):
    net, path = torchvision_file(tmp_path, "resnet18")
    whole = net.state_dict()
    missing = {name: value for name, value in whole.items() if name != key}
    extra = whole | {"layer5.weight": torch.zeros(1)}
    other = whole | {key: whole[key][..., :-1]}
    for state in (missing, extra, other):
        torch.save(state, path)
        name = "layer5.weight" if state is extra else key
        with pytest.raises(Refusal) as refusal:
            make_backbone(flags(weights=path))
        message = str(refusal.value)
        assert path in message and "1 keys do not fit" in message and name in message
        assert "\n" not in message


def test_a_file_of_another_backbone_or_stem_is_refused(tmp_path):
    _, path = torchvision_file(tmp_path, "resnet18")
    with pytest.raises(Refusal, match="resnet50"):
        make_backbone(flags("resnet50", weights=path))
    with pytest.raises(Refusal, match="keys do not fit"):
        make_backbone(flags(stem="deep", weights=path))


def stem_file(path, stem, backbone="resnet18", seed=0):
    """Saves a random network with a stem; returns its state and the file."""
    torch.manual_seed(seed)
    state = make_backbone(flags(backbone, stem)).state_dict()
    for value in state.values():  # as after a training: no statistic is 0 or 1
        value.uniform_(0.5, 1.5) if value.is_floating_point() else value.fill_(7)
    torch.save(state, path)
    return state, str(path)


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


@pytest.mark.smoke
@pytest.mark.parametrize("style", ["conv1", "stem", "nested conv1", "nested stem"])
@pytest.mark.parametrize("stem", ["v1c", "deep"])
def test_deep_stems_load_bit_for_bit_from_files_in_every_style(stem, style, tmp_path):
    state, _ = stem_file(tmp_path / "a.pth", stem)
    content = as_openmmlab(state) if style.endswith("stem") else dict(state)
    content |= {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    if style.startswith("nested"):
        content = {"state_dict": content, "meta": {"epoch": 100}}
    torch.save(content, tmp_path / "b.pth")
    torch.manual_seed(1)
    loaded = make_backbone(flags(stem=stem, weights=str(tmp_path / "b.pth"))).state_dict()
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_a_nested_file_of_torchvisions_loads_too(tmp_path):
    net, path = torchvision_file(tmp_path, "resnet18")
    torch.save({"state_dict": net.state_dict()}, path)
    loaded = make_backbone(flags(weights=path)).state_dict()
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in loaded.items())


@pytest.mark.smoke
@pytest.mark.parametrize("stem", ["classic", "deep", "v1c"])
def test_a_file_of_another_stem_is_refused_and_its_flag_named(stem, tmp_path):
    for other in {"classic", "deep", "v1c"} - {stem}:
        state, path = stem_file(tmp_path / "w.pth", other)
        if other == "v1c":  # as it is published
            torch.save({"state_dict": as_openmmlab(state)}, path)
        with pytest.raises(Refusal) as refusal:
            make_backbone(flags(stem=stem, weights=path))
        line = str(refusal.value)
        assert "w.pth" in line and "do not fit resnet18" in line and "\n" not in line
        assert line.endswith(f"; is it --stem {other}?)"), line


def test_a_file_of_the_right_stem_and_another_backbone_names_no_stem(tmp_path):
    for stem in ("classic", "deep", "v1c"):
        _, path = stem_file(tmp_path / "w.pth", stem)
        with pytest.raises(Refusal, match="do not fit resnet50") as refusal:
            make_backbone(flags("resnet50", stem, weights=path))
        assert "--stem" not in str(refusal.value)


# ---- weights that are fetched ----


@pytest.fixture
def auto(tmp_path, monkeypatch):
    """Returns a function that publishes a drawn file as the weights of a stem, in tmp_path.

    auto(stem, backbone, cut, prefix) -> (state, the file as it lies there, the cached file).
    """
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    (tmp_path / "served").mkdir()

    def publish(stem, backbone="resnet18", cut=False, prefix=None):
        state, path = stem_file(tmp_path / "drawn.pth", stem, backbone)
        if stem != "classic":  # as OpenMMLab's files are
            torch.save({"state_dict": as_openmmlab(state), "meta": {}}, path)
        content = (tmp_path / "drawn.pth").read_bytes()
        prefix = prefix or hashlib.sha256(content).hexdigest()[:8]
        name = f"{backbone}-{prefix}.pth" if stem == "classic" else f"{backbone}_v1c-{prefix}.pth"
        source = tmp_path / "served" / name
        source.write_bytes(content[: len(content) // 2] if cut else content)
        enum = SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(url=source.as_uri()))
        monkeypatch.setattr(torchvision.models, "get_model_weights", {backbone: enum}.get)
        monkeypatch.setattr(weights, "V1C", (tmp_path / "served").as_uri() + "/")
        monkeypatch.setattr(weights, "NAMES", {backbone: prefix})
        return state, source, tmp_path / "home/hub/checkpoints" / name

    return publish


@pytest.mark.parametrize("stem", ["v1c", "classic"])
def test_weights_auto_are_fetched_once_and_cached(stem, auto):
    state, source, cached = auto(stem)
    for present in (True, False):
        torch.manual_seed(1)
        loaded = make_backbone(flags(stem=stem, weights="auto")).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in state.items())
        assert cached.is_file() and source.exists() == present
        source.unlink(missing_ok=True)


@pytest.mark.parametrize("stem", ["v1c", "classic"])
@pytest.mark.parametrize("harm", ["another file", "cut off"])
def test_weights_auto_with_another_hash_are_refused_and_not_kept(stem, harm, auto):
    _, source, cached = auto(stem, cut=harm == "cut off", prefix="0" * 8 if harm[0] == "a" else "")
    with pytest.raises(Refusal) as refusal:
        make_backbone(flags(stem=stem, weights="auto"))
    line = str(refusal.value)
    assert source.name in line and "invalid hash" in line and "\n" not in line
    assert "--weights FILE" in line and "--weights none" in line
    assert not cached.exists()


def test_a_cached_file_that_was_cut_off_is_refused_in_one_line(auto):
    _, source, cached = auto("v1c")
    make_backbone(flags(stem="v1c", weights="auto"))
    cached.write_bytes(cached.read_bytes()[:1000])
    with pytest.raises(Refusal, match="no readable state dict") as refusal:
        make_backbone(flags(stem="v1c", weights="auto"))
    assert source.name in str(refusal.value) and "\n" not in str(refusal.value)


def test_weights_auto_with_the_wide_stem_name_the_one_that_can_be_fetched(auto):
    auto("v1c")
    with pytest.raises(Refusal, match="is it --stem v1c") as refusal:
        make_backbone(flags(stem="deep", weights="auto"))
    assert "\n" not in str(refusal.value)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("way", ["file", "auto"])
def test_no_code_in_a_file_of_weights_is_run(way, auto, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = str(tmp_path / "evil.pth")
    if way == "auto":
        torch.save({"conv1.weight": Evil()}, path)
        prefix = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]
        path = auto("v1c", prefix=prefix)[1]
        shutil.copy(tmp_path / "evil.pth", path)
    else:
        torch.save({"conv1.weight": Evil()}, path)
    with pytest.raises(Refusal, match="no readable state dict") as refusal:
        make_backbone(flags(stem="v1c", weights="auto" if way == "auto" else path))
    assert "invalid hash" not in str(refusal.value)
    assert not (tmp_path / "executed").exists()


def test_every_backbone_has_a_file_and_the_beginning_of_its_hash():
    # OpenMMLab's names, as its model zoo has them: mmcv/model_zoo/open_mmlab.json
    published = {"resnet18": "b5776b93", "resnet50": "2cccc1ad", "resnet101": "e67eebb6"}
    assert weights.NAMES == published == {name: published[name] for name in DEPTHS}
    assert weights.V1C == "https://download.openmmlab.com/pretrain/third_party/"


def test_a_file_without_the_batch_counters_is_taken(tmp_path):
    net, path = torchvision_file(tmp_path, "resnet18")
    old = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(old, path)
    loaded = make_backbone(flags(weights=path)).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in old.items() if not k.startswith("fc."))


def test_a_file_that_is_no_state_dict_is_refused(tmp_path):
    with pytest.raises(Refusal, match="absent.pth.*[Nn]o such file"):
        make_backbone(flags(weights=str(tmp_path / "absent.pth")))
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    for name in ("text.pth", "list.pth"):
        with pytest.raises(Refusal, match="state dict"):
            make_backbone(flags(weights=str(tmp_path / name)))


@pytest.mark.parametrize(
    "stem, url",
    [
        ("classic", "https://download.pytorch.org/models/resnet18-"),
        ("v1c", "https://download.openmmlab.com/pretrain/third_party/resnet18_v1c-b5776b93.pth"),
    ],
)
def test_weights_auto_without_a_network_name_the_url_in_one_line(stem, url, tmp_path):
    # every request goes to a port of this machine where nothing listens
    closed = urllib.request.ProxyHandler({"https": "http://127.0.0.1:9"})
    folder = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path))  # nothing cached
    urllib.request.install_opener(urllib.request.build_opener(closed))
    try:
        with pytest.raises(Refusal) as refusal:
            make_backbone(flags(stem=stem, weights="auto"))
    finally:
        urllib.request.install_opener(None)
        torch.hub.set_dir(folder)
    message = str(refusal.value)
    assert url in message and "\n" not in message
    assert "--weights FILE" in message and "--weights none" in message


def test_random_weights_are_a_function_of_the_seed():
    for stem in ("classic", "deep", "v1c"):
        states = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            states.append(make_backbone(flags(stem=stem)).state_dict())
        assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
        for name in ("conv1.weight", "conv1.0.weight", "layer1.0.conv1.weight"):
            if name in states[0]:
                assert not torch.equal(states[0][name], states[2][name])


@pytest.mark.parametrize("stem", ["deep", "v1c"])
def test_deep_stems_start_as_torchvisions_convolutions_do(stem):
    torch.manual_seed(0)
    net = make_backbone(flags("resnet50", stem=stem))
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):  # Kaiming's normal distribution, fan out
            expected = (2 / (module.out_channels * module.kernel_size[0] ** 2)) ** 0.5
            # 864 numbers in the smallest kernel: 1 / sqrt(2 n) = 2.4 % per sigma
            assert module.weight.std().item() == pytest.approx(expected, rel=0.08), name
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all() and module.bias.eq(0).all(), name


# ---- features ----


@pytest.mark.smoke
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_the_first_three_stages_at_stride_16_are_torchvisions(tmp_path, backbone):
    theirs, path = torchvision_file(tmp_path, backbone)
    mine = make_backbone(flags(backbone, weights=path)).eval()
    x = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        pairs = list(zip(features(mine, x), features(theirs, x), strict=True))
    for a, b in pairs[:3]:
        assert torch.equal(a, b)  # the same modules on the same weights
    assert pairs[3][0].shape[2:] == pairs[2][0].shape[2:] != pairs[3][1].shape[2:]


def test_a_dilated_last_stage_is_torchvisions_where_torchvision_has_one(tmp_path):
    _, path = torchvision_file(tmp_path, "resnet50")
    x = torch.randn(1, 3, 65, 97)
    state = torch.load(path, weights_only=True)
    for replaced in ([False, False, True], [False, True, True]):
        theirs = torchvision.models.resnet50(replace_stride_with_dilation=replaced).eval()
        theirs.load_state_dict(state)
        mine = torchvision.models.resnet50().eval()
        mine.load_state_dict(state)
        if replaced[1]:
            dilate(mine.layer3, [1, 2, 2, 2, 2, 2])
        dilate(mine.layer4, [2, 4, 4] if replaced[1] else [1, 2, 2])
        with torch.no_grad():
            for a, b in zip(features(mine, x), features(theirs, x), strict=True):
                assert torch.equal(a, b)


def test_layer3_at_stride_8_is_torchvisions(tmp_path):
    _, path = torchvision_file(tmp_path, "resnet50")
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    theirs.load_state_dict(torch.load(path, weights_only=True))
    mine = make_backbone(flags("resnet50", weights=path, stride=8)).eval()
    x = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        pairs = list(zip(features(mine, x), features(theirs, x), strict=True))
    for a, b in pairs[:3]:
        assert torch.equal(a, b)
    assert not torch.equal(*pairs[3])  # the multi-grid, which torchvision lacks


# size of the input, output stride: sides of the four stages
SIDES = {
    (129, 16): (33, 17, 9, 9),
    (128, 16): (32, 16, 8, 8),
    (129, 8): (33, 17, 17, 17),
    (128, 8): (32, 16, 16, 16),
    (513, 8): (129, 65, 65, 65),
    (769, 8): (193, 97, 97, 97),
}


@pytest.mark.smoke
@pytest.mark.parametrize("stride", [16, 8])
@pytest.mark.parametrize("stem", ["classic", "deep", "v1c"])
@pytest.mark.parametrize("backbone", DEPTHS)
def test_the_stages_have_the_sizes_of_their_strides(backbone, stem, stride):
    net = meta(make_backbone, flags(backbone, stem, stride=stride))
    wide = 1 if backbone == "resnet18" else 4
    for (size, s), sides in SIDES.items():
        if s == stride:
            stages = features(net, torch.empty(2, 3, size, size, device="meta"))
            expected = [(2, wide * 64 * 2**i, side, side) for i, side in enumerate(sides)]
            assert [tuple(stage.shape) for stage in stages] == expected


def literal(backbone, stem):
    """torchvision's ResNet with a deep stem put in front of it, written out."""
    a, b, c = {"deep": (64, 64, 128), "v1c": (32, 32, 64)}[stem]
    net = getattr(torchvision.models, backbone)(weights=None)
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
    del net.fc
    return net


@pytest.mark.parametrize("stem", ["deep", "v1c"])
@pytest.mark.parametrize("backbone", DEPTHS)
def test_deep_stems_have_the_tensors_of_a_literal_construction(backbone, stem):
    mine, theirs = meta(make_backbone, flags(backbone, stem)), meta(literal, backbone, stem)
    shapes = ({k: tuple(v.shape) for k, v in net.state_dict().items()} for net in (mine, theirs))
    assert next(shapes) == next(shapes)
    if stem == "v1c":  # the classic stem's 64 channels: nothing behind it changes
        classic = meta(make_backbone, flags(backbone, "classic"))
        behind = sum(p.numel() for n, p in classic.named_parameters() if n.startswith("layer"))
        own = 27 * 32 + 2 * 32 + 9 * 32 * 32 + 2 * 32 + 9 * 32 * 64 + 2 * 64
        assert sum(p.numel() for p in mine.parameters()) == behind + own
        if backbone == "resnet50":
            assert behind + own == 25_557_032 - 2_049_000 - 9_408 - 128 + own == 23_527_264


@pytest.mark.parametrize("stem", ["deep", "v1c"])
def test_a_deep_stem_computes_what_a_literal_construction_does(stem, tmp_path):
    _, path = stem_file(tmp_path / "w.pth", stem)
    mine, theirs = make_backbone(flags(stem=stem, weights=path)).eval(), literal("resnet18", stem)
    theirs.load_state_dict(torch.load(path, weights_only=True))
    x = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        pairs = list(zip(features(mine, x), features(theirs.eval(), x), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs[:3])  # behind them the dilation


LAYER3 = {16: lambda n: [1] * n, 8: lambda n: [1] + [2] * (n - 1)}
LAYER4 = {16: [2, 4, 8], 8: [4, 8, 16]}


@pytest.mark.parametrize("stride", [16, 8])
@pytest.mark.parametrize("stem", ["classic", "deep", "v1c"])
@pytest.mark.parametrize("backbone", DEPTHS)
def test_strides_dilations_and_paddings_of_every_convolution(backbone, stem, stride):
    net = meta(make_backbone, flags(backbone, stem, stride=stride))
    grids = [[1] * n for n in DEPTHS[backbone][:2]]
    grids += [LAYER3[stride](DEPTHS[backbone][2]), LAYER4[stride][: DEPTHS[backbone][3]]]
    strided = {"layer2", "layer3"} if stride == 16 else {"layer2"}
    # torchvision's convolution with the stride: the first 3x3 of a stage
    first = "conv1" if backbone == "resnet18" else "conv2"
    for stage, dilations in zip(STAGES, grids, strict=True):
        blocks = getattr(net, stage)
        assert len(blocks) == len(dilations)
        for i, (block, d) in enumerate(zip(blocks, dilations, strict=True)):
            for name, conv in block.named_modules():
                if not isinstance(conv, nn.Conv2d):
                    continue
                where = f"{stage}.{i}.{name}"
                here = i == 0 and stage in strided and name in (first, "downsample.0")
                assert conv.stride == ((2, 2) if here else (1, 1)), where
                wide = conv.kernel_size == (3, 3)
                assert conv.kernel_size in ((3, 3), (1, 1)), where
                assert conv.dilation == ((d, d) if wide else (1, 1)), where
                assert conv.padding == ((d, d) if wide else (0, 0)), where
    stem_convs = [m for m in net.conv1.modules() if isinstance(m, nn.Conv2d)]
    assert [m.stride for m in stem_convs] == [(2, 2)] + [(1, 1)] * (2 * (stem != "classic"))
    kernels = [(m.kernel_size, m.padding, m.dilation) for m in stem_convs]
    small, wide = ((3, 3), (1, 1), (1, 1)), ((7, 7), (3, 3), (1, 1))
    assert kernels == ([wide] if stem == "classic" else [small] * 3)


@pytest.mark.parametrize("rates", [(12, 24, 36), (1, 2)])
def test_aspp_has_a_convolution_for_each_rate(rates):
    head = meta(DeepLabV3Plus, [256, 512, 1024, 2048], 21, flags(aspp_rates=rates))
    convs = [branch[0] for branch in head.branches]
    assert [c.dilation[0] for c in convs] == [1, *rates]
    assert [c.kernel_size[0] for c in convs] == [1, *[3 for _ in rates]]
    assert [c.padding[0] for c in convs] == [0, *rates]
    stages = [torch.empty(2, 256 * 2**i, 9, 9, device="meta") for i in range(4)]
    assert head(stages, (33, 33))["logits"].shape == (2, 21, 33, 33)


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


def test_logits_read_the_first_and_last_stage_and_the_auxiliary_head_the_third():
    torch.manual_seed(0)
    head = DeepLabV3Plus([64, 128, 256, 256], 5, flags(aux_weight=0.4)).eval()
    for name, reached in (("logits", [True, False, False, True]), ("aux", [False, False, True])):
        torch.manual_seed(1)
        sides = zip((64, 128, 256, 256), (8, 4, 2, 2), strict=True)
        stages = [torch.randn(1, c, n, n, requires_grad=True) for c, n in sides]
        head(stages, (32, 32))[name].square().sum().backward()
        assert [x.grad is not None for x in stages] == [*reached, False][:4]
        assert all(x.grad is None or x.grad.any() for x in stages)


# ---- the whole network ----


def network(seed=0, classes=5, **others):
    torch.manual_seed(seed)
    net = Network(flags(**others), classes, DeepLabV3Plus)
    return net.to(memory_format=torch.channels_last)


def photographs(images, height, width, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (images, 3, height, width), dtype=torch.uint8, generator=rng)


@pytest.mark.smoke
@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize("stride", [16, 8])
def test_logits_have_the_size_of_the_input_in_float32(amp, stride):
    net = network(amp=amp, stride=stride, aux_weight=0.4).eval()
    seen = []
    net.backbone.layer2.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    for height, width in ((33, 49), (64, 50)):
        out = net(photographs(2, height, width))
        assert list(out) == ["logits", "aux"]
        for logits in out.values():
            assert logits.shape == (2, 5, height, width) and logits.dtype == torch.float32
            assert logits.isfinite().all() and logits.requires_grad
    assert set(seen) == {torch.bfloat16 if amp == "bf16" else torch.float32}


def test_bfloat16_gives_nearly_the_same_logits():
    x = photographs(2, 65, 65)
    with torch.no_grad():
        full, half = (network(amp=amp).eval()(x)["logits"] for amp in ("none", "bf16"))
    difference = (full - half).abs().mean() / full.std()
    # 8 bits, about 20 layers: sqrt(20) roundings of 2^-9 relative are 1 %; five of them
    assert 0 < difference < 0.05


def test_there_is_no_auxiliary_head_without_a_weight_for_it():
    net = network().eval()
    assert list(net(photographs(1, 33, 33))) == ["logits"]
    assert not any("aux" in name for name, _ in net.named_parameters())


@pytest.mark.smoke
def test_an_image_alone_and_in_a_batch_gets_the_same_logits():
    net, x = network(aux_weight=0.4).eval(), photographs(3, 64, 49)
    with torch.no_grad():
        together = net(x)
        for i in range(3):
            for name, logits in net(x[i : i + 1]).items():
                # float32 sums in another order for another batch: 1e-6 of the logits' scale
                scale = together[name].abs().max().item()
                assert torch.allclose(logits[0], together[name][i], rtol=0, atol=2e-5 * scale)


def test_the_input_is_normalized_with_imagenets_mean_and_deviation():
    net, x, seen = network().eval(), photographs(1, 33, 33), []
    net.backbone.conv1.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    net(x)
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    for channel in range(3):
        for y, x_ in ((0, 0), (5, 32), (32, 7)):
            expected = (x[0, channel, y, x_].item() - mean[channel]) / std[channel]
            # float32, numbers up to 3
            assert seen[0][0, channel, y, x_].item() == pytest.approx(expected, abs=1e-6)
    assert not any(name.endswith(("mean", "std")) for name in net.state_dict() if "." not in name)


def test_every_parameter_gets_a_gradient():
    net = network(aux_weight=0.4).train()
    out = net(photographs(2, 33, 33))
    sum((logits**2).mean() for logits in out.values()).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert p.grad.any() or name.endswith("0.bias"), name  # a bias before BN: next to nothing


@pytest.mark.parametrize(
    "classes, aux_weight, total",
    [(21, 0.0, 62_623_189), (19, 0.0, 62_623_189 - 2 * 257), (19, 0.4, 64_987_622)],
)
def test_the_parameters_are_as_many_as_in_the_released_networks(classes, aux_weight, total):
    rates = (12, 24, 36)
    args = flags("resnet101", "deep", stride=8, aux_weight=aux_weight, aspp_rates=rates)
    net = meta(Network, args, classes, DeepLabV3Plus)
    assert sum(p.numel() for p in net.backbone.parameters()) == 42_623_936
    assert sum(p.numel() for p in net.parameters()) == total
    assert all(p.requires_grad for p in net.parameters())
    if aux_weight:
        assert sum(p.numel() for p in net.head.aux.parameters()) == 2_364_947


# ---- CPS's head ----

WIDE, NARROW = [256, 512, 1024, 2048], [64, 128, 256, 512]


def cps_head(channels=NARROW, classes=5, seed=0, **others):
    torch.manual_seed(seed)
    return CPSHead(channels, classes, flags(**others))


def unsettled(head):
    """Returns the head with random BN weights and statistics: none is 0 or 1."""
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.uniform_(-0.5, 0.5)
    return head


def stages_of(channels, images=2, sides=(9, 5, 3, 3)):
    return [torch.randn(images, c, s, s + 1) for c, s in zip(channels, sides, strict=True)]


def resnet_parameters(blocks):
    """Of a ResNet of bottlenecks, classic stem, without classifier: weights, and 2 per BN."""
    total, inputs = 3 * 64 * 49 + 2 * 64, 64
    for stage, count in enumerate(blocks):
        c = 64 * 2**stage
        for i in range(count):
            total += inputs * c + 2 * c + 9 * c * c + 2 * c + c * 4 * c + 2 * 4 * c
            total += inputs * 4 * c + 2 * 4 * c if i == 0 else 0  # the shortcut
            inputs = 4 * c
    return total


@pytest.mark.parametrize("backbone", ["resnet50", "resnet101"])
def test_the_parameters_of_cps_are_those_of_the_audits_table(backbone):
    aspp = 2048 * 256 + 3 * 9 * 2048 * 256 + 2 * 1024  # no BN of its own in a branch
    aspp += 1024 * 256 + (2048 * 256 + 2 * 256 + 256 * 256) + 2 * 256
    decoder = 256 * 48 + 2 * 48 + (304 * 256 * 9 + 2 * 256) + (256 * 256 * 9 + 2 * 256)
    for classes in (21, 19):
        head = aspp + decoder + 256 * classes + classes
        args = flags(backbone, aspp_rates=(6, 12, 18))
        net = meta(Network, args, classes, CPSHead)
        assert sum(p.numel() for p in net.head.parameters()) == head
        whole = resnet_parameters(DEPTHS[backbone]) + head
        assert sum(p.numel() for p in net.parameters()) == whole
        assert all(p.requires_grad for p in net.parameters())
    assert resnet_parameters(DEPTHS["resnet50"]) == 25_557_032 - 2_049_000  # torchvision's page


def literal_head(head, stages, size, training, slope=0.01):
    """CPS's head by torch's functions on the module's tensors, in the order of the audit."""

    def norm(x, name):
        module = head.get_submodule(name)
        mean, var = module.running_mean.clone(), module.running_var.clone()
        weights = (module.weight.detach(), module.bias.detach())
        return F.batch_norm(x, mean, var, *weights, training, 0.1, 1e-5)

    def weight(name):
        return head.get_submodule(name).weight.detach()

    low, _, _, high = stages
    rates = (1, 2, 3)
    parts = [F.conv2d(high, weight("branches.0"))]
    for i, r in enumerate(rates, 1):
        parts.append(F.conv2d(high, weight(f"branches.{i}"), padding=r, dilation=r))
    x = F.leaky_relu(norm(torch.cat(parts, 1), "project.0.0"), slope)
    x = F.conv2d(x, weight("project.1"))
    pooled = F.conv2d(F.adaptive_avg_pool2d(high, 1), weight("pool.0"))
    pooled = F.conv2d(F.leaky_relu(norm(pooled, "pool.1.0"), slope), weight("pool.2"))
    x = F.leaky_relu(norm(x + pooled, "norm.0"), slope)  # added, not concatenated
    x = F.interpolate(x, low.shape[2:], mode="bilinear", align_corners=True)
    low = F.relu(norm(F.conv2d(low, weight("low.0")), "low.1"))
    x = torch.cat([low, x], 1)
    for i in (0, 1):
        x = F.relu(norm(F.conv2d(x, weight(f"decode.{i}.0"), padding=1), f"decode.{i}.1"))
    x = F.conv2d(x, weight("classify"), head.classify.bias.detach())
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


@pytest.mark.smoke
@pytest.mark.parametrize("training", [True, False])
def test_the_head_of_cps_is_the_literal_one(training):
    head = unsettled(cps_head()).train(training)
    stages = stages_of(NARROW)
    expected = literal_head(head, stages, (33, 37), training)
    other = literal_head(head, stages, (33, 37), training, slope=0.2)
    with torch.no_grad():
        logits = head([x.clone() for x in stages], (33, 37))["logits"]
        again = head([x.clone() for x in stages], (33, 37))["logits"]
    # the same operations in the same order; numbers of order 1
    assert torch.allclose(logits, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(logits, other, rtol=0, atol=1e-3)  # the slope is 0.01
    assert torch.equal(logits, again) and logits.std() > 0.1  # no dropout in training either
    assert logits.shape == (2, 5, 33, 37)


def test_the_head_of_cps_has_no_dropout_and_one_bias():
    head = cps_head()
    kinds = {type(module).__name__ for module in head.modules()}
    assert not any("Drop" in kind for kind in kinds)
    slopes = [m.negative_slope for m in head.modules() if isinstance(m, nn.LeakyReLU)]
    assert slopes == [0.01] * 3
    convs = {name: m for name, m in head.named_modules() if isinstance(m, nn.Conv2d)}
    assert [name for name, m in convs.items() if m.bias is not None] == ["classify"]
    assert len(convs) == 4 + 1 + 2 + 1 + 2 + 1
    assert all(not isinstance(m, nn.BatchNorm2d) for m in head.branches.modules())
    for m in head.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert (m.eps, m.momentum) == (1e-5, 0.1)


def test_the_head_of_cps_begins_as_the_released_one():
    head = cps_head(WIDE, 21)
    for name, module in head.named_modules():
        if isinstance(module, nn.Conv2d):  # Kaiming's normal distribution, fan in
            fan_in = module.in_channels * module.kernel_size[0] ** 2
            x = module.weight.detach().flatten()
            # 5,376 numbers or more: 1 / sqrt(2 n) = 1 % per sigma
            assert x.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05), name
            assert x.abs().max() > 3 * x.std(), name  # a normal one has tails, a uniform one none
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all() and module.bias.eq(0).all(), name
    bias = head.classify.bias.detach()
    assert bias.abs().max() <= 1 / 16 and bias.std() > 0.02  # torch's own: uniform in 1 / sqrt(256)


@pytest.mark.parametrize("rates", [(6, 12, 18), (1, 2)])
def test_cps_has_a_convolution_for_each_rate(rates):
    head = meta(CPSHead, WIDE, 21, flags(aspp_rates=rates))
    assert [c.dilation[0] for c in head.branches] == [1, *rates]
    assert [c.kernel_size[0] for c in head.branches] == [1, *[3 for _ in rates]]
    assert [c.padding[0] for c in head.branches] == [0, *rates]
    stages = [torch.empty(2, c, 9, 9, device="meta") for c in WIDE]
    assert head(stages, (33, 33))["logits"].shape == (2, 21, 33, 33)


def test_cps_reads_the_first_and_the_last_stage():
    head = unsettled(cps_head()).eval()
    stages = [x.requires_grad_() for x in stages_of(NARROW)]
    head(stages, (17, 19))["logits"].square().sum().backward()
    assert [x.grad is not None for x in stages] == [True, False, False, True]
    assert stages[0].grad.any() and stages[3].grad.any()


@pytest.mark.smoke
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_logits_of_cps_have_the_size_of_the_input_in_float32(amp):
    torch.manual_seed(0)
    net = Network(flags(amp=amp), 5, CPSHead).to(memory_format=torch.channels_last)
    seen = []
    net.head.decode.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    for training in (True, False):
        for height, width in ((33, 49), (64, 51)):
            out = net.train(training)(photographs(2, height, width))
            assert list(out) == ["logits"]
            logits = out["logits"]
            assert logits.shape == (2, 5, height, width) and logits.dtype == torch.float32
            assert logits.isfinite().all() and logits.requires_grad
    assert set(seen) == {torch.bfloat16 if amp == "bf16" else torch.float32}
    logits.square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
