"""supervised.py: losses against loops over scalars, the optimizer's groups, the recipes."""

import json
import math
from collections import Counter

import pytest
import torch
from PIL import Image
from torch import nn

from common import Refusal
from common.run import resolve
from supervised import (
    Args,
    DeepLabV3Plus,
    Network,
    cross_entropy,
    main,
    make_optimizer,
    ohem_cross_entropy,
    preset,
    supervised_loss,
)

# U2PL audit, section 2: steps of SupOnly, then of the semi-supervised runs, per split
STEPS = {
    ("voc", "92"): (480, 52_400),
    ("voc", "183"): (960, 52_000),
    ("voc", "366"): (1840, 51_040),
    ("voc", "732"): (3680, 49_200),
    ("voc", "1464"): (7360, 45_600),
    ("voc_aug", "1/16"): (3360, 49_600),
    ("voc_aug", "1/8"): (6640, 46_240),
    ("voc_aug", "1/4"): (13_280, 39_680),
    ("voc_aug", "1/2"): (26_480, 26_400),
    ("cityscapes", "1/16"): (2400, 34_800),
    ("cityscapes", "1/8"): (4800, 32_600),
    ("cityscapes", "1/4"): (9400, 27_800),
    ("cityscapes", "1/2"): (18_600, 18_600),
}


def pixels(seed, images=2, classes=5, side=8, ignored=0.3, spread=2.0):
    """Returns random logits (B, C, H, W), a leaf, and a label with a share of 255."""
    rng = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(images, classes, side, side, generator=rng)
    label = torch.randint(classes, (images, side, side), generator=rng)
    label[torch.rand(label.shape, generator=rng) < ignored] = 255
    return logits.requires_grad_(), label


def scalar_nll(logits, label):
    """Oracle: one list per image of (row, column, -log softmax at the label), valid pixels only."""
    images = []
    for values, classes in zip(logits.tolist(), label.tolist(), strict=True):
        images.append([])
        for y, row in enumerate(classes):
            for x, k in enumerate(row):
                if k != 255:
                    z = [channel[y][x] for channel in values]
                    top = max(z)
                    total = math.fsum(math.exp(v - top) for v in z)
                    images[-1].append((y, x, math.log(total) + top - z[k]))
    return images


def scalar_cross_entropy(logits, label):
    losses = [nll for image in scalar_nll(logits, label) for _, _, nll in image]
    return math.fsum(losses) / len(losses) if losses else 0.0


def scalar_ohem(logits, label, threshold, min_kept):
    """Oracle: the loss, and per image the set of pixels kept (rule of U2PL's loss_helper)."""
    means, kept = [], []
    for image in scalar_nll(logits, label):
        limit = threshold
        if min_kept > len(image):
            limit = 1.0
        elif min_kept > 0:
            limit = max(threshold, sorted(math.exp(-nll) for _, _, nll in image)[min_kept - 1])
        some = [(y, x, nll) for y, x, nll in image if math.exp(-nll) <= limit]
        means.append(math.fsum(nll for _, _, nll in some) / len(some) if some else 0.0)
        kept.append({(y, x) for y, x, _ in some})
    return math.fsum(means) / len(means), kept


def pixels_with_gradient(loss, logits):
    """Returns per image the set of pixels that the loss reaches."""
    (grad,) = torch.autograd.grad(loss, logits)
    return [{tuple(p) for p in g.abs().sum(0).nonzero().tolist()} for g in grad]


def check_ohem(logits, label, threshold, min_kept):
    """Value and kept pixels equal the oracle's; returns how many are kept per image."""
    loss = ohem_cross_entropy(logits, label, threshold, min_kept)
    expected, kept = scalar_ohem(logits, label, threshold, min_kept)
    # float32 sums of at most 200 terms of order 1: a few 1e-7 relative
    assert loss.item() == pytest.approx(expected, rel=3e-6)
    assert pixels_with_gradient(loss, logits) == kept
    return [len(pixels) for pixels in kept]


# ---- cross_entropy ----


@pytest.mark.smoke
@pytest.mark.parametrize("seed", range(5))
def test_cross_entropy_equals_a_loop_over_scalars(seed):
    logits, label = pixels(seed, classes=2 + seed)
    # float32 sum of about 90 terms of order 1: a few 1e-7 relative
    expected = pytest.approx(scalar_cross_entropy(logits, label), rel=3e-6)
    assert cross_entropy(logits, label).item() == expected


def test_cross_entropy_of_large_logits_is_finite_and_right():
    logits, label = pixels(0, spread=300.0)
    expected = pytest.approx(scalar_cross_entropy(logits, label), rel=3e-6)
    assert cross_entropy(logits, label).item() == expected


def test_an_ignored_pixel_changes_neither_cross_entropy_nor_its_gradient():
    logits, label = pixels(1)
    changed = torch.where((label == 255)[:, None], 9.0, logits.detach()).requires_grad_()
    assert cross_entropy(changed, label).item() == cross_entropy(logits, label).item()
    loss = cross_entropy(logits, label)
    valid = [{tuple(p) for p in v.nonzero().tolist()} for v in label != 255]
    assert pixels_with_gradient(loss, logits) == valid


def test_cross_entropy_is_a_mean_over_all_valid_pixels_not_over_images():
    logits, label = pixels(2)
    label[0, :, 1:] = 255  # 8 pixels against 64
    label[1].clamp_(max=4)
    expected = scalar_cross_entropy(logits, label)
    per_image = [scalar_cross_entropy(logits[i : i + 1], label[i : i + 1]) for i in (0, 1)]
    assert abs(expected - sum(per_image) / 2) > 0.01  # the two means differ here
    assert cross_entropy(logits, label).item() == pytest.approx(expected, rel=3e-6)


@pytest.mark.parametrize("loss_of", [cross_entropy, lambda x, y: ohem_cross_entropy(x, y, 0.7, 9)])
def test_a_loss_over_nothing_is_zero_with_a_zero_gradient(loss_of):
    logits, label = pixels(0)
    loss = loss_of(logits, torch.full_like(label, 255))
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0 and loss.shape == ()
    assert torch.equal(grad, torch.zeros_like(grad))  # a NaN would not be equal


@pytest.mark.parametrize("loss_of", [cross_entropy, lambda x, y: ohem_cross_entropy(x, y, 0.7, 9)])
def test_a_loss_of_bfloat16_logits_is_computed_in_float32(loss_of):
    logits, label = pixels(3)
    half = logits.detach().bfloat16()
    loss = loss_of(half, label)
    assert loss.dtype == torch.float32
    assert loss.item() == loss_of(half.float(), label).item()  # nothing was rounded on the way
    # rounding the input to 8 bits moves a logit of order 2 by 2^-8: 1 % of a loss of order 1
    assert loss.item() == pytest.approx(loss_of(logits, label).item(), rel=0.01)


# ---- ohem_cross_entropy ----


@pytest.mark.smoke
@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("min_kept", [0, 1, 7, 30, 64, 1000])
def test_ohem_equals_a_loop_over_scalars(threshold, min_kept):
    check_ohem(*pixels(min_kept, images=3), threshold, min_kept)


def test_ohem_keeps_all_pixels_of_an_image_with_fewer_than_min_kept():
    logits, label = pixels(4)
    valid = (label != 255).flatten(1).sum(1).tolist()
    assert check_ohem(logits, label, 0.1, max(valid) + 1) == valid


def test_ohem_keeps_all_below_the_threshold_when_these_are_more_than_min_kept():
    logits, label = pixels(5)
    kept = check_ohem(logits, label, 0.5, 3)
    assert kept == check_ohem(logits, label, 0.5, 4)  # min_kept decides nothing here
    assert all(3 < n < 45 for n in kept)


def test_ohem_keeps_exactly_min_kept_when_fewer_are_below_the_threshold():
    assert check_ohem(*pixels(6), 0.01, 17) == [17, 17]


def test_ohem_counts_min_kept_for_each_image_and_averages_images():
    logits, label = pixels(7)
    logits = (logits.detach() * torch.tensor([3.0, 0.3]).view(2, 1, 1, 1)).requires_grad_()
    assert check_ohem(logits, label, 0.0, 10) == [10, 10]
    alone = [scalar_ohem(logits[i : i + 1], label[i : i + 1], 0.3, 10)[0] for i in (0, 1)]
    loss = ohem_cross_entropy(logits, label, 0.3, 10).item()
    assert loss == pytest.approx(sum(alone) / 2, rel=3e-6)


def test_ohem_keeps_all_pixels_tied_with_the_last_one():
    logits = torch.zeros(1, 2, 8, 8)
    logits[:, 0, :2] = -2.0  # 16 hard pixels; 32 tied; 16 easy ones
    logits[:, 0, 6:] = 3.0
    label = torch.zeros(1, 8, 8, dtype=torch.int64)
    for min_kept, kept in [(16, 16), (17, 48), (48, 48), (49, 64)]:
        assert check_ohem(logits.requires_grad_(), label, 0.0, min_kept) == [kept]


def test_ohem_counts_an_image_without_labels_as_zero():
    logits, label = pixels(8)
    label[1] = 255
    assert check_ohem(logits, label, 0.0, 10) == [10, 0]
    first = scalar_ohem(logits[:1], label[:1], 0.0, 10)[0]
    loss = ohem_cross_entropy(logits, label, 0.0, 10).item()
    assert loss == pytest.approx(first / 2, rel=3e-6)


# ---- supervised_loss ----


def outputs(seed):
    """Returns a network's dict with an auxiliary head, and a label; most pixels are easy."""
    logits, label = pixels(seed, classes=4, side=16, spread=1.0)
    easy = 6.0 * torch.eye(4)[label.clamp(max=3)].permute(0, 3, 1, 2)
    aux, _ = pixels(seed + 100, classes=4, side=16, spread=1.0)
    out = {"logits": logits.detach() + easy, "aux": aux.detach() + easy}
    return {name: x.requires_grad_() for name, x in out.items()}, label


U2PL = 50_000 / 769**2  # the share of a crop that U2PL's released OHEM keeps at least


@pytest.mark.parametrize("ohem", [0.0, U2PL])
@pytest.mark.parametrize("aux", [False, True])
def test_supervised_loss_is_main_plus_weighted_auxiliary(ohem, aux):
    out, label = outputs(0)
    args = Args(aux_weight=0.4 if aux else 0.0, ohem_kept=ohem, crop_size=16)
    out = out if aux else {"logits": out["logits"]}
    kept = 22  # 50,000 of 769^2, as a share of 16^2: 21.6
    parts = [
        scalar_ohem(x, label, 0.7, kept)[0] if ohem else scalar_cross_entropy(x, label)
        for x in out.values()
    ]
    expected = parts[0] + 0.4 * parts[1] if aux else parts[0]
    assert supervised_loss(out, label, args).item() == pytest.approx(expected, rel=3e-6)


CPS = 50_000 / 800**2  # CPS's
COUNTS = [(U2PL, 16, 22), (U2PL, 32, 87), (U2PL, 40, 135), (CPS, 16, 20), (CPS, 40, 125)]


@pytest.mark.parametrize("share, crop, kept", [*COUNTS, (0.3, 20, 120), (1e-6, 16, 1)])
def test_supervised_loss_keeps_a_share_of_the_pixels_of_a_crop(share, crop, kept):
    out, label = outputs(1)
    args = Args(aux_weight=0.0, ohem_kept=share, crop_size=crop)
    assert all(len(image) > 135 for image in scalar_nll(out["logits"], label))
    loss = supervised_loss({"logits": out["logits"]}, label, args)
    assert [len(p) for p in pixels_with_gradient(loss, out["logits"])] == [kept, kept]


def test_supervised_loss_keeps_the_released_count_at_the_released_crop():
    logits = torch.linspace(1, 9, 60_000).view(1, 1, 200, 300)  # p from 0.73: the count decides
    logits = torch.cat([logits, torch.zeros_like(logits)], 1).requires_grad_()
    label = torch.zeros(1, 200, 300, dtype=torch.int64)
    args = Args(aux_weight=0.0, ohem_kept=U2PL, crop_size=769)
    loss = supervised_loss({"logits": logits}, label, args)
    (kept,) = pixels_with_gradient(loss, logits)
    # 100,000 on two crops; near p = 1 some neighbours are one float32 number, and tie
    assert 50_000 <= len(kept) < 50_100


def test_supervised_loss_takes_every_pixel_up_to_a_probability_of_0_7():
    logits = torch.linspace(-1, 3, 401).view(1, 1, 1, 401)  # p from 0.27 to 0.95 in steps of 1 %
    logits = torch.cat([logits, torch.zeros_like(logits)], 1).requires_grad_()
    label = torch.zeros(1, 1, 401, dtype=torch.int64)
    args = Args(aux_weight=0.0, ohem_kept=U2PL, crop_size=16)
    loss = supervised_loss({"logits": logits}, label, args)
    expected, kept = scalar_ohem(logits, label, 0.7, 22)
    assert len(kept[0]) == 185 and pixels_with_gradient(loss, logits) == kept
    assert loss.item() == pytest.approx(expected, rel=3e-6)


def test_supervised_loss_reaches_both_heads_in_proportion_to_their_weights():
    out, label = outputs(2)
    args = Args(aux_weight=0.25, ohem_kept=0.0, crop_size=16)
    twins = {"logits": out["logits"], "aux": out["logits"].detach().clone().requires_grad_()}
    main_grad, aux_grad = torch.autograd.grad(supervised_loss(twins, label, args), twins.values())
    assert main_grad.abs().sum() > 0
    # one multiplication by 1/4, exact in binary
    assert torch.equal(aux_grad, 0.25 * main_grad)


# ---- optimizer ----


def small_network(**flags):
    """Returns the resolved flags and a network that holds no memory (meta device)."""
    args = resolve(Args(**{"weight_decay": 0.125, "lr": 0.5, "lr_head": 4.0, **flags}), preset)
    with torch.device("meta"):
        return args, Network(args, 3, DeepLabV3Plus)


@pytest.mark.smoke
@pytest.mark.parametrize("decay_on", ["all", "weights"])
@pytest.mark.parametrize("aux_weight", [0.0, 0.4])
def test_every_parameter_is_in_one_group_with_its_scale_and_decay(decay_on, aux_weight):
    args, net = small_network(decay_on=decay_on, aux_weight=aux_weight)
    optimizer = make_optimizer([net], args)
    where = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            where.setdefault(p, []).append(group)
    assert set(where) == set(net.parameters())
    for path, module in net.named_modules():
        for name, p in module.named_parameters(recurse=False):
            (group,) = where[p]
            assert group["scale"] == (4.0 if path.startswith("head.") else 1.0), path
            spared = isinstance(module, nn.BatchNorm2d) or name == "bias"
            decay = 0.0 if spared and decay_on == "weights" else 0.125
            assert group["weight_decay"] == decay, f"{path}.{name}"


def test_the_optimizer_is_sgd_with_momentum_and_nothing_else():
    args, net = small_network()
    optimizer = make_optimizer([net], args)
    assert type(optimizer) is torch.optim.SGD
    for group in optimizer.param_groups:
        assert group["momentum"] == 0.9 and group["lr"] == 0.5
        assert group["dampening"] == 0 and not group["nesterov"] and not group["maximize"]


def test_two_trained_networks_share_one_optimizer():
    args, first = small_network()
    _, second = small_network()
    groups = make_optimizer([first, second], args).param_groups
    seen = Counter(p for group in groups for p in group["params"])
    assert seen == Counter([*first.parameters(), *second.parameters()])


def test_the_learning_rate_falls_from_the_full_rate_by_the_poly_rule(tmp_path):
    for part, count in (("train", 2), ("val", 1), ("test", 1)):  # CamVid's layout
        for folder, mode in ((part, "RGB"), (f"{part}annot", "L")):
            (tmp_path / folder).mkdir()
            for i in range(count):
                Image.new(mode, (32, 24), 3).save(tmp_path / folder / f"{i}.png")
    flags = dict(total_iters=2, crop_size=33, batch_size=2, workers=0, lr=0.02, lr_head=5.0)
    flags |= dict(dataset="camvid", data_root=str(tmp_path), split="all")
    flags |= dict(log_every=1, eval_every=2, save_every=2, pictures_every=0, device="cpu")
    main(resolve(Args(out=str(tmp_path / "run"), **flags), preset))
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    rates = [e["lr"] for e in map(json.loads, log) if e["kind"] == "train"]
    half = 0.5**0.9
    assert rates == pytest.approx([0.02, 0.02 * half], rel=1e-12)
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["optimizer"]
    acted = [group["lr"] for group in saved["param_groups"]]  # in the last step, by group
    # float64 throughout: the order of multiplications alone
    assert acted == pytest.approx([r * half for r in (0.02, 0.02, 0.1, 0.1)], rel=1e-12)


# ---- recipes ----


@pytest.mark.parametrize("dataset, split", STEPS)
def test_steps_of_every_split_are_the_audits(dataset, split):
    paper, matched = STEPS[dataset, split]
    assert resolve(Args(dataset=dataset, split=split), preset).total_iters == paper
    args = Args(dataset=dataset, split=split, schedule="matched")
    assert resolve(args, preset).total_iters == matched


@pytest.mark.parametrize("dataset, split", [("cityscapes", "186"), ("voc_aug", "662")])
def test_a_name_that_nobody_published_has_no_steps(dataset, split):
    with pytest.raises(Refusal, match=f"no preset of {dataset} sets --total-iters"):
        resolve(Args(dataset=dataset, split=split), preset)


def test_the_steps_follow_the_batch_and_the_rates_do_not():
    args = resolve(Args(dataset="voc", split="92", batch_size=8), preset)
    assert args.total_iters == 80 * 12  # 92 labels in 12 batches of 8, the last one not full
    assert (args.lr, args.lr_head, args.weight_decay) == (0.001, 10.0, 1e-4)


@pytest.mark.parametrize("recipe", ["paper", "official"])
@pytest.mark.parametrize(
    "dataset, split, values",
    [
        ("voc", "92", (16, 513, 0.001, 10.0, 1e-4, 0.0, 0.0)),
        ("voc_aug", "1/8", (16, 513, 0.001, 10.0, 1e-4, 0.0, 0.0)),
        ("cityscapes", "1/8", (16, 769, 0.01, 1.0, 5e-4, 0.4, U2PL)),
    ],
)
def test_the_recipes_are_the_audits(recipe, dataset, split, values):
    args = resolve(Args(dataset=dataset, split=split, recipe=recipe), preset)
    names = "batch_size crop_size lr lr_head weight_decay aux_weight ohem_kept".split()
    assert tuple(getattr(args, name) for name in names) == values
    network = (args.backbone, args.stem, args.output_stride, args.decay_on, args.scales)
    assert network == ("resnet101", "v1c", 8, "all", (0.5, 2.0))
    assert args.aspp_rates == (12, 24, 36)


def test_camvid_small_is_the_protocol_of_the_design():
    args = resolve(Args(dataset="camvid"), preset)
    assert (args.split, args.backbone, args.stem, args.weights) == (
        "1/8",
        "resnet18",
        "classic",
        "none",
    )
    assert (args.output_stride, args.crop_size, args.scales) == (16, 128, (0.5, 2.0))
    assert (args.batch_size, args.total_iters, args.protocol) == (4, 600, "whole")


def test_an_explicit_flag_beats_recipe_and_preset():
    def recipe(_):
        return {"lr": 1.0, "ohem_kept": 0.1, "aux_weight": 0.4, "split_seed": 3}

    flags = dict(lr=0.5, ohem_kept=0.0, aux_weight=0.0)  # falsy values are explicit too
    rest = {f: 1 for f in Args.__dataclass_fields__ if getattr(Args(), f) is None}
    args = resolve(Args(**flags), lambda a: rest | {"scales": (1.0,)} | recipe(a))
    assert (args.lr, args.ohem_kept, args.aux_weight) == (0.5, 0.0, 0.0)
    assert (args.batch_size, args.split_seed) == (1, 3)  # the others come from preset and recipe
    args = Args(dataset="cityscapes", split="1/4", ohem_kept=0.0, total_iters=7)
    args = resolve(args, preset)
    assert (args.ohem_kept, args.total_iters, args.aux_weight) == (0.0, 7, 0.4)


def test_a_field_that_nobody_sets_is_refused_by_name():
    for flags, name in (({}, "--split"), ({"split": "92 of them"}, "--total-iters")):
        with pytest.raises(Refusal) as refusal:
            resolve(Args(dataset="voc", **flags), preset)
        message = str(refusal.value)
        assert name in message and "voc" in message
        assert "--lr" not in message and "--split-seed" not in message and "\n" not in message
    assert resolve(Args(dataset="voc", split="92", total_iters=5), preset).total_iters == 5


def test_a_list_in_place_of_a_split_needs_its_steps():
    with pytest.raises(Refusal, match="--total-iters"):
        resolve(Args(dataset="voc", labeled_list="some.txt"), preset)
    args = resolve(Args(dataset="voc", labeled_list="some.txt", total_iters=9), preset)
    assert (args.split, args.total_iters) == ("list", 9)
