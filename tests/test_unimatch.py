"""unimatch.py and unimatch_v2.py: what is drawn, networks; several T; unimatch_fpl.py.

Their losses: test_equations.py. Their steps: test_steps.py.
"""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as colours

import cps_fpl
import predict
import tiny
import unimatch
import unimatch_v2 as v2
from common import distributed, weights
from common.flags import as_fields
from oracles import Scripted
from oracles import fpl as fpl_oracle
from oracles.fpl import printed
from results import unimatch_fpl
from trees import refusal

ALONE = distributed.Group(0, 1, torch.device("cpu"))

# ---- thresholds, K, numbers of the log ----


def test_several_T_choose_K_by_the_neighbours():
    args = printed(T=(0.4437, 0.6437, 0.8937, 0.9837), k_max=4)
    rng = torch.Generator().manual_seed(0)
    for classes, spread in ((3, 2), (11, 2), (11, 0)):
        t = spread * torch.randn(3, classes, 5, 6, generator=rng, dtype=torch.float64)
        t = F.avg_pool2d(t, 3, 1, 1)  # so that neighbours agree somewhere
        inside = torch.rand(3, 5, 6, generator=rng) < torch.tensor([0.7, 1.0, 0.0]).view(3, 1, 1)
        K = unimatch.adaptive_assignment(t, inside, args)
        rows = zip(t.softmax(1).movedim(1, -1).tolist(), inside.tolist(), strict=True)
        assert K.tolist() == [fpl_oracle.adaptive_positives(*row, args) for row in rows]
        assert len(K.unique()) > 1 or (classes, spread) != (11, 2)


def test_statistics():
    """Two pixels of two classes, or the first alone; T 0.9: K is 1 and 2."""
    prob = torch.tensor([[0.96, 0.03, 0.01], [0.3, 0.5, 0.2]], dtype=torch.float64)
    logits = prob.log().T.repeat_interleave(4, 1).view(1, 3, 1, 8)  # of which every fourth counts
    inside, args = torch.ones(1, 1, 8, dtype=torch.bool), printed(T=0.9)
    first = torch.arange(8).view(1, 1, 8) < 4
    p = prob.sort(1, descending=True).values.T[None, :, None]
    weight = unimatch.adaptive_weight(p, torch.tensor([[[1, 2]]])).mean()
    means = dict(commonest=0.5, confident=0.5, K=1.5, K_gt_1=0.5)
    means["weight"] = pytest.approx(weight.item())
    assert unimatch.statistics(logits, inside, args) == means
    assert unimatch.statistics(logits, first, args)["commonest"] == 1
    truth = torch.zeros(1, 1, 8, dtype=torch.int64)
    for mask, accuracy in ((inside, 0.5), (first, 1)):
        means = dict(pseudo_acc=accuracy, unsure_acc=0, coverage=1)
        assert unimatch.statistics(logits, mask, args, truth) == means


# ---- what is drawn ----


def test_boxes_are_drawn_as_released():
    """[D23]: none at even odds; a box that does not fit has another ratio and place."""
    square = 0.7 / (1 / 0.3 - 0.3)
    for shares, box in (  # of 200 pixels; of 4,000, 115 high at first
        ([0.49], (0, 0, 0, 0)),
        ([0.5, 0, 0, 0.94, 0, 0, 0.93, 0.76, 0, 0.93, 0.75], (93, 75, 7, 25)),
        ([0.5, 0, 1, 0.01, 0.02], (1, 2, 25, 7)),
        ([0.5, 1, 1, 0, 0, square, 0.37, 0.37], (37, 37, 63, 63)),
    ):
        script = Scripted(*shares)
        assert unimatch.drawn_box(script, 100) == box and not script.shares


def test_operations_are_drawn_as_released():
    """Jitter in any order, then grey, then blur, whose kernel fits into the crop."""
    assert unimatch.drawn_operations(Scripted(0, 0, 0, 0, 0.8, 0.2, 0.5), 9) == []
    for part, crop, change, hue, deviation, side in (
        (0, 20, 0.5, -0.25, 0.1, 3),
        (1, 20, 1.5, 0.25, 2.0, 17),
        (1, 8, 1.5, 0.25, 2.0, 15),
    ):
        script = Scripted(*[part] * 4, 0.79, 0.19, 0.49, part)
        names = "saturation", "contrast", "brightness"
        jitter = [("adjust_hue", hue), *((f"adjust_{name}", change) for name in names)]
        rest = [("rgb_to_grayscale", 3), ("gaussian_blur", side, pytest.approx(deviation))]
        assert unimatch.drawn_operations(script, crop) == jitter + rest


def test_strong_views_are_torchvisions_of_uint8():
    """Of (seed, name, sample number); here of the second of two processes."""
    args = SimpleNamespace(seed=3, batch_size_unlabeled=16, crop_size=40)
    weak = torch.randint(0, 256, (8, 3, 40, 40), generator=torch.Generator().manual_seed(0))
    weak = F.avg_pool2d(weak.float(), 5, 1, 2).byte()
    found, masks = unimatch.strong_views(weak, "view0", 7, args, ALONE._replace(rank=1))
    assert found.dtype == torch.uint8 and masks.any() and not masks.all()
    for i, image in enumerate(weak):
        rng = np.random.default_rng([3, unimatch.zlib.crc32(b"view0"), 120 + i])
        for name, *numbers in unimatch.drawn_operations(rng, 40):
            image = getattr(colours, name)(image, *numbers)
        top, left, height, width = unimatch.drawn_box(rng, 40)
        assert torch.equal(image, found[i]) and masks[i].sum() == height * width
        assert masks[i, 0, top : top + height, left : left + width].all()


@pytest.mark.smoke
@pytest.mark.parametrize("images, whole, kept", [(6, 0.5, 3), (5, 0.5, 2), (1, 0.5, 0), (4, 1, 4)])
def test_dropout_is_complementary_and_leaves_some_images_whole(images, whole, kept):
    """[D24]: a channel is dropped in one of the views, at even odds."""
    torch.manual_seed(0)
    for _ in range(20):
        first, second = v2.complementary_masks(images, 1000, whole, "cpu")
        assert first.shape == (images, 1000, 1, 1) and torch.equal(first + second, 0 * first + 2)
        alike = (first == 1).flatten(1)
        assert (alike.all(1) | ~alike.any(1)).all() and alike.all(1).sum() == kept
        dropped = first[~alike.all(1)]
        assert ((dropped == 0) | (dropped == 2)).all()
        assert kept == images or 0.4 < (dropped == 2).float().mean() < 0.6


# ---- several T, results/unimatch_fpl.py ----


def test_an_older_checkpoint_has_one_T_and_predict_shows_K_of_one_alone():
    saved = {"T": 0.9, "scales": [0.5, 2.0], "lr": 0.1}
    assert as_fields(cps_fpl.Args, saved) == {"T": (0.9,), "scales": (0.5, 2.0), "lr": 0.1}
    for T, one in (([0.9], 0.9), (0.9, 0.9), ([0.8, 0.9], None), (None, None)):
        assert predict.one_T(SimpleNamespace(saved={"args": {"T": T}})) == one


def test_what_fpl_does_there_is_counted_and_drawn(tmp_path, monkeypatch, capsys):
    """Pixels: sure and right; 0.65, wrong, the truth second; void. T 0.95: K is 1, 2, 2."""
    prob = torch.tensor([[0.97, 0.02, 0.01], [0.65, 0.25, 0.1], [0.4, 0.3, 0.3]])
    args = printed(T=0.95)
    found = unimatch_fpl.counts(prob.log().T[None, :, None], torch.tensor([[[0, 1, 255]]]), args)
    assert found.tolist() == [[0] * 4] * 2 + [[1, 0, 1, 1]] + [[0] * 4] * 3 + [[1, 1, 1, 0]]
    tiny.shrink(unimatch, monkeypatch)
    run, out = tmp_path / "run", tmp_path / "x.png"
    argv = tiny.flags(tiny.draw_tree(tmp_path / "data"), run, log=1, iters=2, evaluate=2, save=2)
    tiny.train(unimatch, [*argv, *"--unsup-loss fpl --T 0.2 0.5".split()])
    rows = (f"log {run}", 0), (f"val {run}/last.pt --images 2", 0)
    for words, code in (*rows, (f"val {run}/last.pt --images 9", 2), (f"log {out}", 2)):
        out.unlink(missing_ok=True)
        assert unimatch_fpl.main([*words.split(), "--out", str(out)]) == code
        assert out.exists() == (code == 0)
    assert "2 images of val, T 0.2 0.5" in capsys.readouterr().out


# ---- networks ----

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


def flags(**changes):
    values = dict(backbone="dinov2_vits14", weights="none", freeze=0, amp="none")
    return SimpleNamespace(**values | dict(checkpoint_activations=False) | changes)


@pytest.fixture
def small(monkeypatch):
    """Makes every ViT a small one; returns a function of flags to a backbone."""
    own = dict(width=32, depth=4, heads=2, taken=(0, 1, 2, 3), maps=(4, 6, 8, 10), fused=12)
    sizes = {name: size._replace(**own) for name, size in v2.SIZES.items()}
    monkeypatch.setattr(v2, "SIZES", sizes)
    return lambda **changes: v2.make_backbone(flags(**changes)).eval()


@pytest.mark.smoke
@pytest.mark.parametrize("h, w", [(37, 37), (57, 57), (37, 20), (20, 31), (1, 1), (9, 70)])
def test_position_embeddings_are_interpolated_as_published(h, w):
    """[D27]: by factors with an offset of 0.1, without antialiasing."""
    torch.manual_seed(0)
    grid = torch.randn(1, 37 * 37, 6)
    own, theirs = v2.position_embedding(grid, h, w), grid.unflatten(1, (37, 37)).movedim(3, 1)
    if (h, w) != (37, 37):
        factors = (h + 0.1) / 37, (w + 0.1) / 37
        theirs = F.interpolate(theirs, scale_factor=factors, mode="bicubic", antialias=False)
    assert own.shape == theirs.shape == (1, 6, h, w)
    # places are float32 numbers up to 37, in another order of rounding; slopes are of order 1
    assert (own - theirs).abs().max() <= (0 if h == w == 37 else 3e-5)


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
    logits = v2.Network(flags(backbone=backbone), 5, v2.DPTHead)(x.byte())["logits"]
    assert logits.shape == (2, 5, *size) and logits.isfinite().all()


def test_dpt_is_the_literal_one(small):
    """By torch's functions on the module's tensors, for maps of an odd size; its masks."""
    torch.manual_seed(0)
    head = v2.DPTHead([32] * 4, 5, flags())
    stages = [torch.randn(2, 32, 5, 3) for _ in range(4)]

    def conv(x, name, **more):
        module = head.get_submodule(name)
        function = F.conv_transpose2d if isinstance(module, torch.nn.ConvTranspose2d) else F.conv2d
        return function(x, module.weight, module.bias, **more)

    def residual(x, name):
        y = conv(x.relu(), f"{name}.conv1", padding=1)
        return x + conv(y.relu(), f"{name}.conv2", padding=1)

    def up(x, *size):
        return F.interpolate(x, size, mode="bilinear", align_corners=True)

    maps = [conv(x, f"project.{i}") for i, x in enumerate(stages)]
    maps[0] = conv(maps[0], "resize.0", stride=4)
    maps[1] = conv(maps[1], "resize.1", stride=2)
    maps[3] = conv(maps[3], "resize.3", stride=2, padding=1)
    *maps, x = (conv(x, f"narrow.{i}", padding=1) for i, x in enumerate(maps))
    for i, size in ((3, (5, 3)), (2, (10, 6)), (1, (20, 12)), (0, (40, 24))):
        if i < 3:
            x = x + residual(maps[i], f"before.{i}")
        x = conv(up(residual(x, f"after.{i}"), *size), f"out.{i}")
    x = up(conv(conv(x, "classify.0", padding=1).relu(), "classify.2"), 71, 43)
    assert torch.allclose(head(stages, (71, 43))["logits"], x, atol=1e-6)
    masks = torch.rand(2, 32, 1, 1)
    expected = head([stage * masks for stage in stages], (9, 9))["logits"]
    head.masks = masks
    assert torch.equal(head(stages, (9, 9))["logits"], expected)


def test_weights_are_metas_or_timms_and_nothing_else(small, tmp_path, monkeypatch):
    """With the mask token of pretraining, below a prefix; by address, whose hash is checked."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(weights, "META", tmp_path.as_uri() + "/")
    state = {key: torch.randn_like(x) for key, x in small().state_dict().items()}
    meta, wide = state | {"mask_token": torch.zeros(1, 32)}, torch.zeros(1, 1, 384)
    address, file = tmp_path / "dinov2_vits14/dinov2_vits14_pretrain.pth", str(tmp_path / "w.pth")
    address.parent.mkdir()
    torch.save(meta, address)
    line = refusal(v2.make_backbone, flags(weights="auto"))
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
        assert words in refusal(v2.make_backbone, flags(weights=file))


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
        assert names in refusal(v2.make_backbone, flags(backbone=backbone, weights=file))
    torch.save(theirs | {"embeddings.mask_token": torch.zeros(1, 1, 32)}, file)
    found = small(backbone=backbone, weights=file).state_dict()
    for key, value in (constants | state).items():
        if key.endswith("qkv.bias"):
            value[32:64] = 0
        assert torch.equal(found[key], value), key

    torch.save(small().state_dict() | {"cls_token": torch.zeros(1, 1, 768)}, file)
    line = refusal(v2.make_backbone, flags(backbone=backbone, weights=file))
    assert "it is dinov2_vitb14" in line
    line = refusal(v2.make_backbone, flags(backbone=backbone, weights="auto"))
    assert "Meta's DINOv3 License" in line and "--weights FILE" in line


def test_frozen_blocks(small):
    """Tensors that learn nothing: 4 before the blocks, 14 of a block, 2 of the last norm."""
    for backbone in ("dinov2_vits14", "dinov3_vits16"):
        for frozen, fixed in ((0, 0), (2, 32), (4, 62)):
            net = small(backbone=backbone, freeze=frozen)
            assert sum(not p.requires_grad for p in net.parameters()) == fixed
    line = "--freeze 5: dinov2_vits14 has 4 blocks"
    assert refusal(v2.make_backbone, flags(freeze=5)) == line
