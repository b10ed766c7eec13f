"""unimatch_v2.py: DINOv2, DPT, weights, frozen and recomputed blocks, dropout, a step."""

import hashlib
import zlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import recorder
import tiny
import unimatch_v2 as v2
from common import weights
from common.distributed import Group
from trees import refusal

ALONE = Group(0, 1, torch.device("cpu"))
SMALL = v2.Size(32, 4, 2, (0, 1, 2, 3), (4, 6, 8, 10), 12)


@pytest.fixture
def small(monkeypatch):
    """Makes every DINOv2 a small one; returns a function of flags to a backbone."""
    monkeypatch.setattr(v2, "SIZES", dict.fromkeys(v2.SIZES, SMALL))
    return lambda **changes: v2.make_backbone(flags(**changes)).eval()


def flags(**changes):
    values = dict(backbone="dinov2_vits14", weights="none", freeze=0, amp="none")
    return SimpleNamespace(**values | dict(checkpoint_activations=False) | changes)


def published(grid, h, w):
    """Meta's rule by torch's own interpolation, (1, width, h, w)."""
    x = grid.unflatten(1, (37, 37)).permute(0, 3, 1, 2)
    if h == w == 37:
        return x
    factors = (h + 0.1) / 37, (w + 0.1) / 37
    return F.interpolate(x, scale_factor=factors, mode="bicubic", antialias=False)


@pytest.mark.smoke
@pytest.mark.parametrize("h, w", [(37, 37), (57, 57), (37, 20), (20, 31), (5, 5), (1, 1), (9, 70)])
def test_position_embeddings_are_interpolated_as_published(h, w):
    """[D27]: by factors with an offset of 0.1, without antialiasing; value and gradient."""
    torch.manual_seed(0)
    grid = torch.randn(1, 37 * 37, 6, requires_grad=True)
    own, theirs = v2.position_embedding(grid, h, w), published(grid, h, w)
    assert own.shape == theirs.shape == (1, 6, h, w)
    # places are float32 numbers up to 37, in another order of rounding; slopes are of order 1
    assert (own - theirs).abs().max() <= (0 if h == w == 37 else 3e-5)
    back = torch.randn_like(own)
    slopes = [torch.autograd.grad((x * back).sum(), grid)[0] for x in (own, theirs)]
    assert torch.allclose(*slopes, atol=1e-3 * back.abs().max().item())


def test_the_network_is_timms_and_its_position_embedding_another(small, tmp_path):
    """From random weights, by timm's key names: bit for bit at 518; elsewhere but for [D27]."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    shape = dict(embed_dim=32, depth=4, num_heads=2, num_classes=0)
    theirs = timm.create_model("vit_small_patch14_dinov2", **shape).eval()
    for p in theirs.parameters():
        p.data += 0.1 * torch.randn_like(p)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    own = small(weights=str(tmp_path / "w.pth"))
    for size in ((518, 518), (280, 434)):
        x, grid = torch.randn(1, 3, *size), [side // 14 for side in size]
        net = timm.create_model("vit_small_patch14_dinov2", **shape, img_size=size).eval()
        state = theirs.state_dict()
        square = net.pos_embed.shape == theirs.pos_embed.shape
        positions = v2.position_embedding(state["pos_embed"][:, 1:], *grid)
        positions = positions.flatten(2).transpose(1, 2)
        state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], positions], 1)
        net.load_state_dict(state)
        maps = net.forward_intermediates(x, norm=True, intermediates_only=True)
        for mine, other in zip(v2.features(own, x), maps, strict=True):
            assert mine.shape == (1, 32, *grid)
            assert torch.allclose(mine, other, atol=0 if square else 1e-5)
        resampled = timm.layers.resample_abs_pos_embed(theirs.pos_embed, grid)[:, 1:]
        assert torch.equal(resampled, positions) == square
        far = (resampled - positions).abs().max() / theirs.pos_embed.std()
        assert square or far > 0.5  # of a deviation: docs/unimatch_v2.md, D27


SIZES = {(56, 70): (4, 5), (57, 62): (4, 4), (63, 64): (5, 5), (6, 300): (1, 21), (1, 1): (1, 1)}


@pytest.mark.parametrize("size, grid", SIZES.items())
def test_features_of_any_size(size, grid, small):
    """The image becomes one of whole patches, the nearest; half a patch is rounded up [D28]."""
    net, x = small(), torch.randn(2, 3, *size)
    resized = F.interpolate(x, [14 * n for n in grid], mode="bilinear", align_corners=True)
    for mine, expected in zip(v2.features(net, x), net(resized), strict=True):
        assert mine.shape == (2, 32, *grid) and torch.equal(mine, expected)
    logits = v2.Network(flags(), 5, v2.DPTHead)(x.byte())["logits"]
    assert logits.shape == (2, 5, *size) and logits.isfinite().all()


MILLIONS = {
    "dinov2_vits14": (22.1, 2.7),
    "dinov2_vitb14": (86.6, 10.6),
    "dinov2_vitl14": (304.4, 30),
}


@pytest.mark.parametrize("name, millions", MILLIONS.items())
def test_networks_have_the_parameters_of_the_released_logs(name, millions):
    """Head: 2.7, 10.9, 31.2 there, with a residual unit that is never called [D6]."""
    with torch.device("meta"):
        net = v2.Network(flags(backbone=name), 21, v2.DPTHead)
    for part, expected in zip((net.backbone, net.head), millions, strict=True):
        assert sum(p.numel() for p in part.parameters()) / 1e6 == pytest.approx(expected, abs=0.06)


def test_the_head_is_the_literal_one(small):
    """DPT by torch's functions on the module's tensors, for maps of an odd size; its masks."""
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
    a, b, c, d = (conv(x, f"narrow.{i}", padding=1) for i, x in enumerate(maps))
    x = conv(up(residual(d, "after.3"), 5, 3), "out.3")
    x = conv(up(residual(x + residual(c, "before.2"), "after.2"), 10, 6), "out.2")
    x = conv(up(residual(x + residual(b, "before.1"), "after.1"), 20, 12), "out.1")
    x = conv(up(residual(x + residual(a, "before.0"), "after.0"), 40, 24), "out.0")
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
    meta = state | {"mask_token": torch.zeros(1, 32)}
    address = tmp_path / "dinov2_vits14/dinov2_vits14_pretrain.pth"
    address.parent.mkdir()
    torch.save(meta, address)
    line = refusal(v2.make_backbone, flags(weights="auto"))
    assert "invalid hash" in line and "--weights FILE" in line
    sha = hashlib.sha256(address.read_bytes()).hexdigest()
    monkeypatch.setitem(weights.DINOV2, "dinov2_vits14", sha)
    file = str(tmp_path / "w.pth")
    for name, saved in (("auto", None), (file, {f"backbone.{k}": x for k, x in meta.items()})):
        if saved:
            torch.save(saved, file)
        found = small(weights=name).state_dict()
        assert all(torch.equal(x, state[key]) for key, x in found.items())
    for more, words in (
        ({"pos_embed": torch.zeros(1, 257, 32)}, "1 keys do not fit dinov2_vits14 (pos_embed"),
        ({"register_tokens": torch.zeros(1, 4, 32)}, "register tokens: give the file without"),
        ({"storage_tokens": torch.zeros(1, 4, 32)}, "it is a DINOv3, another network"),
        ({"rope_embed.periods": torch.zeros(16)}, "it is a DINOv3, another network"),
    ):
        torch.save(meta | more, file)
        assert words in refusal(v2.make_backbone, flags(weights=file))


@pytest.mark.parametrize("frozen, fixed", [(0, 0), (2, 32), (4, 62)])
def test_frozen_blocks_do_not_learn_and_recomputed_ones_learn_the_same(frozen, fixed, small):
    """fixed: tensors without gradient: 4 before the blocks, 14 of a block, 2 of the last norm."""
    found = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        net = small(freeze=frozen, checkpoint_activations=recomputed)
        x = sum(v2.features(net, torch.ones(1, 3, 28, 28)))
        if x.requires_grad:
            (x * torch.arange(32).view(1, 32, 1, 1)).sum().backward()
        assert x.requires_grad == (frozen < 4)
        found.append({name: p.grad for name, p in net.named_parameters()})
    assert sum(grad is None for grad in found[0].values()) == fixed
    for grad, again in zip(found[0].values(), found[1].values(), strict=True):
        assert grad is again is None or torch.equal(grad, again)
    line = "--freeze 5: dinov2_vits14 has 4 blocks"
    assert refusal(v2.make_backbone, flags(freeze=5)) == line


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


def literal(student, teacher, batch, args, number):
    """A step in one graph: the loss, its parts; images mixed by multiplication."""
    weak, x_l, y_l = batch["unlabeled"], batch["labeled"]["image"], batch["labeled"]["label"].long()
    with torch.no_grad():
        q = teacher(weak["image"])["logits"]
    n = len(q)
    other = list(range(n))[::-1] if args.partner == "reversed" else [i ^ 1 for i in range(n)]
    mixed, taught = [], []
    for view in range(args.views):
        x, mask = v2.strong_views(weak["image"], f"view{view}", number, args, ALONE)
        pairs = ((x, mask), (q, mask), (weak["inside"], mask[:, 0]))
        x, target, inside = (a * ~m + a[other] * m for a, m in pairs)
        mixed.append(x)
        taught.append((target, inside))
    logits_l = student(x_l)["logits"]
    if args.views == 2 and args.complementary_dropout:
        student.head.masks = v2.complementary_masks(n, 8, args.kept_whole, "cpu").flatten(0, 1)
    logits = student(torch.cat(mixed))["logits"].chunk(args.views)
    student.head.masks = None
    strong = 0.0
    for z, (target, inside) in zip(logits, taught, strict=True):
        loss = v2.pixel_loss(z, v2.lesson(target, inside, args), args)
        strong = strong + loss[inside].sum() / inside.sum() / args.views
    sup = F.cross_entropy(logits_l, y_l, ignore_index=255)
    return dict(loss=(sup + strong) / 2, sup=sup, strong=strong)


def adamw(moments, name, p, gradient, step, lr, decay):
    """AdamW by hand, betas 0.9 and 0.999; returns the new parameter."""
    m, v = moments.get(name, (0, 0))
    moments[name] = m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient.square()
    m, v = m / (1 - 0.9**step), v / (1 - 0.999**step)
    return p * (1 - lr * decay) - lr * m / (v.sqrt() + 1e-8)


ROWS = [
    "",
    "--views 1",
    "--partner reversed --ema-decay 0.4",
    "--unsup-loss fpl --T 0.5 --freeze 1",
]


@pytest.mark.parametrize("row", ROWS)
def test_every_step_is_the_literal_one(row, tmp_path, monkeypatch):
    """Losses, gradients, AdamW with its two rates, the teacher's average."""
    tree = tiny.draw_tree(tmp_path / "data")
    argv = tiny.flags(tree, tmp_path / "run", log=1, iters=2, evaluate=9, save=9, pictures=2)
    argv += ["--batch-size-unlabeled", "4", *row.split()]
    argv = tiny.with_acting("unimatch_v2", argv)
    tiny.shrink(v2, monkeypatch)
    found = recorder.watch(monkeypatch, v2, argv)
    args, moments = tiny.resolved(v2, argv), {}
    student, teacher = found.networks["student"], found.networks["teacher"]
    for number, step in enumerate(found.steps):
        torch.manual_seed(zlib.crc32(b"%d %d 0" % (args.seed, number)))
        parts = literal(student, teacher, step.batch, args, number)
        parts["loss"].backward()
        assert {key: step.parts[key] for key in parts} == pytest.approx(
            {key: x.item() for key, x in parts.items()}, rel=1e-5, abs=1e-6
        )
        assert step.parts["strong"] > 0
        rate = args.lr * (1 - number / 2) ** 0.9
        ema = min(1 - 1 / (number + 1), args.ema_decay)
        for name, p in student.named_parameters():
            own, new = step.grads.get(f"student.{name}"), p.detach()
            assert (own is None) == (p.grad is None) == (not p.requires_grad), name
            if own is not None:
                assert (own - p.grad).abs().max() <= 5e-5 * p.grad.abs().max() + 1e-12, name
                lr = rate * (args.lr_head if name.startswith("head") else 1.0)
                new = adamw(moments, name, new, own, number + 1, lr, args.weight_decay)
            assert torch.allclose(step.nets["student"][name], new, atol=1e-7), name
            old = teacher.state_dict()[name]
            average = ema * old + (1 - ema) * step.nets["student"][name]
            assert torch.allclose(step.nets["teacher"][name], average, atol=1e-7), name
            p.grad = None
        student.load_state_dict(step.nets["student"])
        teacher.load_state_dict(step.nets["teacher"])
    titles = list(found.steps[-1].maps)
    assert sum(title.startswith("mixed") for title in titles) == args.views
