"""The step of each script against a literal one, on recorded batches.

A recorded run leaves networks, batches and what came of every step. From the weights before a step
its literal twin makes the same passes with the same random numbers, in one graph; whatever the loop
did is compared: which network saw what in which mode and order, bit for bit, gradients, SGD, BN
statistics, the teacher's average, banks, the numbers of the log, and the maps of the panels.
The equations are the script's own functions, which test_equations.py and test_borders.py hold:
what enters them, and what becomes of their results, is written out here. At the end: what one
script's loop has and others have not.
"""

import itertools
import math
import zlib
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ael_fpl
import cps_fpl
import esl
import mean_teacher
import processes
import recorder
import tiny
import u2pl
import u2pl_ael
from benchmarks import runs
from common import Refusal, run
from common.distributed import Group

UNEVEN = "--batch-size-unlabeled 3 "  # no count of labelled images can pass for the other
HAND = "--lr-head 3 --weight-decay 0.1 "


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return tiny.draw_tree(tmp_path_factory.mktemp("steps") / "data")


def result(loss, state=None, maps=None, **parts):
    numbers = {name: torch.as_tensor(x).item() for name, x in parts.items()}
    return SimpleNamespace(loss=loss, parts={"loss": loss.item()} | numbers, state=state, maps=maps)


def labeled_loss(out, label, args):
    """L_s of the first images of a pass, those that have a label."""
    return u2pl.supervised_loss({name: x[: len(label)] for name, x in out.items()}, label, args)


def mixed_pairs(script, args, number, *maps):
    """CutMix, image by image: the maps as the step's coin and boxes mix them in pairs."""
    rng = np.random.default_rng([args.seed, zlib.crc32(b"mix"), number])
    if not args.cutmix or rng.random() >= args.cutmix_prob:
        return maps
    boxes = [script.cutmix_box(rng, args.crop_size) for _ in maps[0]]
    found = [x.clone() for x in maps]
    for i, (top, left, h, w) in enumerate(boxes):
        for new, old in zip(found, maps, strict=True):
            box = (..., slice(top, top + h), slice(left, left + w))
            new[i][box] = old[i ^ 1][box]
    return found


def blend(mask, first, second):
    """first, and second where mask is True: by multiplication."""
    return first * ~mask + second * mask


def stacked(samples):
    """A batch of samples, each as test_pictures.py holds it."""
    return {key: torch.stack([one[key] for one in samples]) for key in samples[0]}


def same_samples(name, args, images, number, batch):
    """Which streams a step reads, from whose images and at what scales; no label is opened."""
    streams = dict.fromkeys(("ael_fpl", "u2pl_ael"), ["labeled", "paste", "unlabeled"])
    streams["supervised"] = ["labeled"]
    found = streams.get(name, ["labeled", "unlabeled"])
    if name == "cps_fpl" and args.cutmix:
        found.append("unlabeled.2" if args.same_image_cutmix else "partner")
    if name == "cps_fpl" and not args.unsup_weight:
        found = ["labeled"]
    assert list(batch) == found
    for stream, own in batch.items():
        labeled = stream in ("labeled", "paste")
        items = images.labeled if labeled else images.unlabeled
        scales = args.paste_scales if stream == "paste" else args.scales
        script = tiny.script(name)
        samples = script.Samples(stream, script.Stream(items, 0, labeled, scales), images, args)
        count = args.batch_size if labeled else args.batch_size_unlabeled
        expected = stacked([samples[number * count + i] for i in range(count)])
        assert own.keys() == expected.keys()
        assert all(torch.equal(own[key], x) for key, x in expected.items()), (number, stream)


def supervised_step(nets, state, batch, args, number, images):
    x, y = batch["labeled"]["image"], batch["labeled"]["label"]
    out = nets["student"](x)
    maps = {"image": x, "label": y, "prediction": out["logits"].argmax(1)}
    return result(labeled_loss(out, y, args), {}, maps)


def mean_teacher_step(nets, state, batch, args, number, images):
    """U2PL Sec. 3.1 without its contrast; or the squared distance of Tarvainen and Valpola."""
    student, teacher = nets["student"], nets["teacher"]
    x_l, y_l = batch["labeled"]["image"], batch["labeled"]["label"]
    count = number - args.warmup_iters
    if count < 0:
        warm = supervised_step(nets, state, batch, args, number, images)
        return result(warm.loss, {}, warm.maps, sup=warm.loss, unsup=0.0, conf=0.0)
    if count == 0:
        teacher.load_state_dict(student.state_dict())
    clean, inside = batch["unlabeled"]["image"], batch["unlabeled"]["inside"]
    with torch.no_grad():
        prob = teacher.eval()(clean)["logits"].softmax(1)
    x_u, prob, inside = mixed_pairs(mean_teacher, args, number, clean, prob, inside)
    both = torch.cat([x_l, x_u])
    out = student(both)
    if args.teacher_bn == "own":
        with torch.no_grad():
            teacher.train()(both)
    sup = labeled_loss(out, y_l, args)
    logits = out["logits"][len(x_l) :]
    distances = {"ce": mean_teacher.consistency_ce, "mse": mean_teacher.consistency_mse}
    unsup = distances[args.consistency](logits, prob, inside)
    t = min(count / args.rampup_iters, 1) if args.rampup_iters else 1
    loss = sup + args.consistency_weight * math.exp(-5 * (1 - t) ** 2) * unsup
    conf = prob.amax(1)
    maps = {"student's view": x_u, "confidence": conf, "inside": inside}
    maps |= {"pseudo label": torch.where(inside, prob.argmax(1), 255), "student": logits.argmax(1)}
    return result(loss, {}, maps, sup=sup, unsup=unsup, conf=conf[inside].mean())


def cps_fpl_step(nets, state, batch, args, number, images):
    """CPS: both networks teach each other; clean views teach on the mixed one, with CutMix."""
    pair = list(nets.values())
    x_l, label = batch["labeled"]["image"], batch["labeled"]["label"]
    maps = {"image": x_l, "truth": label}
    progress = number / args.total_iters
    if args.unsup_weight and args.cutmix:
        first, second = (batch[name] for name in list(batch)[1:])
        rng = np.random.default_rng([args.seed, zlib.crc32(b"mix"), number])
        masks = [cps_fpl.toggled_mask(rng, args.crop_size) for _ in first["image"]]
        mask = torch.stack(masks)
        with torch.no_grad():
            views = [[net(view["image"])["logits"] for view in (first, second)] for net in pair]
        teachers = [blend(mask, *view) for view in views]
        own, other = first["inside"], second["inside"]
        K = [cps_fpl.mixed_k(mask, (z1, own), (z2, other), args) for z1, z2 in views]
        mixed = blend(mask, first["image"], second["image"])
        inside = blend(mask[:, 0], first["inside"], second["inside"])
        students = [net(mixed)["logits"] for net in pair]
        maps |= {"mixed": mixed, "its pseudo label": teachers[1].argmax(1)}
    labeled = [net(x_l)["logits"] for net in pair]
    if args.unsup_weight and not args.cutmix:  # labelled images teach as well
        others = [net(batch["unlabeled"]["image"])["logits"] for net in pair]
        students = teachers = [torch.cat(logits) for logits in zip(labeled, others, strict=True)]
        inside = torch.cat([batch["labeled"]["inside"], batch["unlabeled"]["inside"]])
        K = [cps_fpl.mixed_k(inside[:, None], *2 * [(z, inside)], args) for z in teachers]
    sup = sum(labeled_loss({"logits": logits}, label, args) for logits in labeled)
    loss, parts = sup, {"sup": sup}
    if args.unsup_weight:
        cross, more = cps_fpl.cross_loss(students, teachers, inside, progress, args, K)
        loss = sup + args.unsup_weight * cross  # FPL Eq. (1)
        parts |= more | cps_fpl.teacher_statistics(teachers, inside, progress, args, K)
    parts |= cps_fpl.label_statistics(labeled, label, progress, args)
    prob = labeled[1].detach().softmax(1)
    p, _ = cps_fpl.by_rank(prob)
    K = cps_fpl.k_maps(labeled[1], batch["labeled"]["inside"], progress, args)
    maps |= {"pseudo label": prob.argmax(1), "branch 1": labeled[0].argmax(1)}
    maps["K: 1, 2, 3 or more"] = (K - 1) / 2
    maps["weight"] = cps_fpl.adaptive_weight(p, K, args.weight, args.mean_over)
    return result(loss, {}, maps, **parts)


def ael_partners(state, args, number, images):
    """The partners, drawn four steps before [D26]; which images these and the first ones are."""
    B = args.batch_size_unlabeled
    indices = state["draws"][0][:, 1].tolist()
    stream = ael_fpl.Stream(images.unlabeled, B, False, args.scales)
    partners = ael_fpl.Samples("unlabeled.partner", stream, images, args)
    numbers = range(number * B, number * B + B)
    samples = [partners.sample(*pair) for pair in zip(indices, numbers, strict=True)]
    return stacked(samples), [*map(partners.which, numbers), *indices]


def ael_pasted(state, batch, args, rng):
    """Adaptive Copy-Paste: the images of a group share their classes."""
    u = torch.from_numpy(rng.random((args.batch_size, args.paste_draws + 1)))
    allowed = torch.tensor([c not in args.paste_not for c in range(len(state["confidence"]))])
    prob = ael_fpl.sampling_probability(state["confidence"], allowed, args.paste_power)
    groups = [u[i // args.pooled * args.pooled, 1:] for i in range(args.batch_size)]
    drawn = ael_fpl.draw_classes(prob, torch.stack(groups))
    return ael_fpl.copy_paste(batch["labeled"], batch["paste"], drawn, u[:, 0] < args.paste_prob)


def ael_confidence(state, out, label, args):
    """The confidence bank after a step."""
    prob = out["logits"].detach().softmax(1)
    sums = ael_fpl.class_confidence(prob, label, args.pooled, args.skip_absent)
    return ael_fpl.update_confidence(state["confidence"], sums, args.bank_momentum)


def ael_mixing(state, views, inside, shown, rng, args, number):
    """What the other banks become, the boxes, and how many of these are a region."""
    B, C, size = args.batch_size_unlabeled, len(state["confidence"]), args.crop_size
    draws = ael_fpl.draw_partners(state["confidence"], state["present"], B, rng)
    new = {"draws": torch.cat([state["draws"][1:], draws[None]])}
    new["present"] = state["present"].clone()
    seen = views.argmax(1).masked_fill(~inside, 255)[..., ::4, ::4]  # partners after first images
    for image, row in zip(shown, ael_fpl.presence(seen, C, args.bank_area), strict=True):
        new["present"][:, image] = row
    rngs = np.random.default_rng([args.seed, zlib.crc32(b"mix"), number]).spawn(B)
    mask, boxes = torch.zeros(B, size, size, dtype=torch.bool), 0
    classes = state["draws"][0][:, 0].tolist()
    for i, (cells, c, own) in enumerate(zip(seen[B:], classes, rngs, strict=True)):
        box = ael_fpl.component_box(cells.byte().numpy(), c, args.region_area, size, own)
        boxes += box is not None
        top, left, h, w = box or ael_fpl.half_area_box(own, size)
        mask[i, top : top + h, left : left + w] = True
    return new, mask, boxes / B


def ael_fpl_step(nets, state, batch, args, number, images):
    student, teacher = nets["student"], nets["teacher"]
    B = args.batch_size_unlabeled
    rng = np.random.default_rng([args.seed, zlib.crc32(b"mix"), number])
    first = batch["unlabeled"]
    second, shown = ael_partners(state, args, number, images)
    labeled = ael_pasted(state, batch, args, rng)
    x_l, label = labeled["image"], labeled["label"]
    out = student(x_l)
    with torch.no_grad():
        on_labels = teacher(x_l)["logits"] if args.consistency_on == "all" else None
        views = teacher(torch.cat([first["image"], second["image"]]))["logits"]
    both = torch.cat([first["inside"], second["inside"]])
    new, mask, regions = ael_mixing(state, views, both, shown, rng, args, number)
    new["confidence"] = bank = ael_confidence(state, out, label, args)
    x_u = blend(mask[:, None], first["image"], second["image"])
    inside = blend(mask, first["inside"], second["inside"])
    teachers = torch.where(mask[:, None], views[B:], views[:B])
    # losses
    logits = student(x_u)["logits"]
    sup = labeled_loss(out, label, args)
    rate = ael_fpl.equalization_rate(bank, args.beta)
    pair = [(views[:B], first["inside"]), (views[B:], second["inside"])]
    K = ael_fpl.mixed_k(mask[:, None], *pair, args)
    whole, parts = ael_fpl.consistency_loss(logits, teachers, inside, rate, 1, args, K)
    if args.consistency_on == "all":
        pair = 2 * [(on_labels, labeled["inside"])]
        K = ael_fpl.mixed_k(labeled["inside"][:, None], *pair, args)
        given = out["logits"], on_labels, labeled["inside"], rate, args.pooled, args, K
        more, parts_l = ael_fpl.consistency_loss(*given)
        whole = whole + more
        parts["unsup_l"] = parts_l["unsup"]
    loss = sup + args.unsup_weight * whole
    maps = {"labelled, pasted": x_l, "label": label, "mixed": x_u, "box": mask}
    maps |= {"pseudo label": teachers.argmax(1), "student": logits.argmax(1)}
    kept = (
        torch.rand(B, args.crop_size, args.crop_size) >= 1 - rate[logits.argmax(1)]
    )  # drawn anew for the panel
    maps["weight"] = teachers.softmax(1).amax(1) ** args.gamma * kept * inside
    return result(loss, new, maps, sup=sup, **parts, bank=bank.mean(), regions=regions)


def u2pl_step(nets, state, batch, args, number, images):
    student, teacher = nets["student"], nets["teacher"]
    x_l, y_l = batch["labeled"]["image"], batch["labeled"]["label"]
    n, count = len(x_l), number - args.warmup_iters
    names = "unsup unsup_weight contrast classes entropy".split()
    if count < 0:
        warm = supervised_step(nets, state, batch, args, number, images)
        return result(warm.loss, state, warm.maps, sup=warm.loss, **dict.fromkeys(names, 0.0))
    if count == 0:
        teacher.load_state_dict(student.state_dict())
    clean, inside = batch["unlabeled"]["image"], batch["unlabeled"]["inside"]
    with torch.no_grad():
        pseudo = teacher.eval()(clean)["logits"].argmax(1)
    pseudo = torch.where(inside, pseudo, 255)
    x_u, pseudo, inside = mixed_pairs(u2pl, args, number, clean, pseudo, inside)
    both = torch.cat([x_l, x_u])
    out = student(both)
    with torch.no_grad():
        out_t = teacher.train()(both)
    # Eq. (5) to (8)
    H = u2pl.entropy(out_t["logits"][n:].softmax(1))
    t = math.floor(args.epochs * number / args.total_iters) if args.dpa else 0
    alpha = args.alpha_0 * (1 - t / args.epochs)
    gamma, lower = u2pl.quantiles(H, inside, 1 - alpha, alpha)
    y_u = torch.where(H < gamma, pseudo, 255)
    weight = args.eta * int(inside.sum()) / max(int((y_u != 255).sum()), 1)
    unsup = u2pl.cross_entropy(out["logits"][n:], y_u)
    sup = labeled_loss(out, y_l, args)
    contrast, classes, new = 0.0, 0, state
    if args.unreliable_loss != "none":
        of = {"unreliable": H > gamma, "reliable": H < lower, "all": inside}
        chosen = of[args.negatives_from] & inside
        contrast, classes, new = u2pl_contrast(state, out, out_t, y_l, y_u, chosen, args)
    loss = sup + weight * unsup + args.contrast_weight * contrast  # Eq. (1)
    maps = {"student's view": x_u, "pseudo label": pseudo, "reliable": y_u}
    maps |= {"entropy": H / math.log(images.num_classes), "student": out["logits"][n:].argmax(1)}
    values = unsup, weight, contrast, classes, H[inside].mean() if inside.any() else 0.0
    return result(loss, new, maps, sup=sup, **dict(zip(names, values, strict=True)))


def u2pl_contrast(state, out, out_t, y_l, y_u, chosen, args):
    """Eq. (9) to (16), Alg. 1, at stride 4: keys are pushed, then sampled; loss, classes, bank."""
    size = out["rep"].shape[2:]
    label = u2pl.nearest(torch.cat([y_l, y_u]), size)
    rep_s, rep_t, coarse = (u2pl.as_rows(x) for x in (out["rep"], out_t["rep"], out_t["coarse"]))
    prob = coarse.softmax(1)
    C = prob.shape[1]
    ranks = min(args.ranks[0], C - 1), min(args.ranks[1], C)
    N_c = u2pl.negative_masks(u2pl.class_ranks(prob), label, u2pl.nearest(chosen, size), *ranks)
    u = torch.rand(C, args.keys + 1, dtype=torch.float64)
    v = torch.rand(C, args.anchors * (args.negatives + 1), dtype=torch.float64)
    sizes = torch.tensor([args.bank_sizes[0]] + [args.bank_sizes[1]] * (C - 1))
    bank = state["bank"].clone()
    pushed = state["pushed"] * getattr(args, "bank", True)
    offered = u2pl.draw_features(rep_t, N_c, u)
    u2pl.push_features(bank, pushed, sizes, offered)
    A_c = u2pl.anchor_masks(prob, label, args.delta_p)
    loss, counted = u2pl.unreliable_loss(rep_s, rep_t, A_c, bank, pushed, sizes, v, args)
    return loss, counted.sum(), {"bank": bank, "pushed": pushed}


def u2pl_ael_step(nets, state, batch, args, number, images):
    student, teacher = nets["student"], nets["teacher"]
    B, count = args.batch_size_unlabeled, number - args.warmup_iters
    rng = np.random.default_rng([args.seed, zlib.crc32(b"mix"), number])
    labeled = ael_pasted(state, batch, args, rng)
    x_l, y_l = labeled["image"], labeled["label"]
    out_l = student(x_l)
    sup = labeled_loss(out_l, y_l, args)
    confidence = ael_confidence(state, out_l, y_l, args)
    maps = {"labelled, pasted": x_l, "label": y_l}
    names = "unsup unsup_weight kept contrast classes entropy".split()
    parts = dict.fromkeys(names, 0.0) | dict(confidence=confidence.mean(), regions=0.0)
    parts |= {"unsup_l": 0.0} if args.consistency_on == "all" else {}
    new = state | {"confidence": confidence}
    if count < 0:
        maps["prediction"] = out_l["logits"].argmax(1)
        return result(sup, new, maps, sup=sup, **parts)
    if count == 0:
        teacher.load_state_dict(student.state_dict())
    first = batch["unlabeled"]
    second, shown = ael_partners(state, args, number, images)
    with torch.no_grad():
        features = [teacher.train()(x_l)]
        views = teacher.eval()(torch.cat([first["image"], second["image"]]))["logits"]
    both = torch.cat([first["inside"], second["inside"]])
    banks, mask, parts["regions"] = ael_mixing(state, views, both, shown, rng, args, number)
    new |= banks
    x_u = blend(mask[:, None], first["image"], second["image"])
    inside = blend(mask, first["inside"], second["inside"])
    with torch.no_grad():
        features.append(teacher.train()(x_u))
    mixed = torch.where(mask[:, None], views[B:], views[:B])
    prob = mixed.softmax(1)
    # U2PL Eq. (5) to (8), AEL Eq. (12)
    H = u2pl.entropy(prob)
    t = math.floor(args.epochs * number / args.total_iters) if args.dpa else 0
    (gamma,) = u2pl.quantiles(H, inside, 1 - args.alpha_0 * (1 - t / args.epochs))
    pseudo = torch.where(inside, prob.argmax(1), 255)
    y_u = torch.where(H < gamma, pseudo, 255)
    sure = y_u != 255
    out_u = student(x_u)
    rate = ael_fpl.equalization_rate(confidence, args.beta)
    lessons = [(out_u, y_u, prob, inside, 1)]
    if args.consistency_on == "all":  # truth ignored
        on_labels = features[0]["logits"].softmax(1)
        label = torch.where(labeled["inside"], on_labels.argmax(1), 255)
        lessons.append((out_l, label, on_labels, labeled["inside"], args.pooled))
    found = []
    for out, label, p, hit, pooled in lessons:
        given = out["logits"], label, p.amax(1), hit, rate, pooled, args
        found.append(u2pl_ael.equalized_cross_entropy(*given))
    share = int(inside.sum()) / max(int(sure.sum()), 1) if args.divide_by == "reliable" else 1.0
    parts |= dict(unsup=found[0][0], unsup_weight=args.eta * share, entropy=H[inside].mean())
    parts["kept"] = (found[0][1][sure] > 0).float().mean()
    loss = sup + args.eta * (share * found[0][0] + sum(more for more, _ in found[1:]))
    parts |= {"unsup_l": found[1][0]} if args.consistency_on == "all" else {}
    if args.unreliable_loss != "none" and number >= args.contrast_after:
        rep_s, rep_t = (torch.cat([one["rep"] for one in x]) for x in ((out_l, out_u), features))
        logits = torch.cat([features[0]["logits"], mixed])
        out_t = {"rep": rep_t, "coarse": u2pl.upsample(logits, rep_t.shape[2:])}
        rest = y_l, y_u, (H > gamma) & inside, args
        contrast, classes, queues = u2pl_contrast(state, {"rep": rep_s}, out_t, *rest)
        loss = loss + args.contrast_weight * contrast
        parts |= dict(contrast=contrast, classes=classes)
        new |= queues
    maps |= {"mixed": x_u, "box": mask, "pseudo label": pseudo, "reliable": y_u}
    maps |= {"entropy": H / math.log(images.num_classes), "weight": found[0][1]}
    maps["student"] = out_u["logits"].argmax(1)
    return result(loss, new, maps, sup=sup, **parts)


def esl_step(nets, state, batch, args, number, images):
    student, teacher = nets["student"], nets["teacher"]
    x_l, y_l = batch["labeled"]["image"], batch["labeled"]["label"]
    clean, inside = batch["unlabeled"]["image"], batch["unlabeled"]["inside"]
    n, new, ids, present = len(x_l), {}, [], 0
    none = images.num_classes * args.parts
    teacher.eval()
    teacher.head.with_features = args.contrast
    if args.contrast and number == 0:  # K-means before the teacher has seen anything
        group = Group(0, 1, torch.device("cpu"))
        first = esl.first_prototypes(teacher, images, teacher.head.width, args, group)
        state = state | {"prototypes": first}
    with torch.no_grad():
        out_t = teacher(torch.cat([x_l, clean]) if args.contrast else clean)
    prob = out_t["logits"][-len(clean) :].softmax(1)
    if args.contrast:
        label = torch.cat([y_l, torch.where(inside, prob.argmax(1), 255)])
        ids, new, present = esl_parts(out_t, label, state, args, none)
    maps = [clean, prob, inside, *([ids[n:]] if args.contrast else [])]
    x_u, target, sure, *ids_u = mixed_pairs(esl, args, number, *maps)
    # Eq. (2) to (6)
    out = student(torch.cat([x_l, x_u]))
    y_u = esl.soft_label(target, args)
    unsup = esl.soft_cross_entropy(out["logits"][n:], y_u, sure)
    sup = labeled_loss(out, y_l, args)
    conf, dominant = target.amax(1), (y_u > 0).sum(1)
    maps = {"student's view": x_u, "pseudo label": torch.where(sure, y_u.argmax(1), -1)}
    maps |= {"1 - 1/classes": 1 - 1 / dominant, "student": out["logits"][n:].argmax(1)}
    contrast = anchors = 0
    if args.contrast:
        maps["parts"] = None
        chosen = ids_u[0].masked_fill(~(conf > args.zeta), none)  # Eq. (9)
        ids = esl.aligned(torch.cat([ids[:n], chosen]), out["rep"].shape[2:]).flatten()
        u = torch.rand(images.num_classes, args.anchors + 1, dtype=torch.float64)
        v = torch.rand(len(u), args.anchors, 1 + args.negatives, dtype=torch.float64)
        given = esl.as_rows(out["rep"]), ids, new["bank"], new["pushed"], u, v, args
        contrast, anchors = esl.part_contrast(*given)
    loss = sup + args.unsup_weight * unsup + args.contrast_weight * contrast  # Eq. (11)
    parts = dict(sup=sup, unsup=unsup, contrast=contrast, anchors=anchors, parts=present)
    area = max(int(sure.sum()), 1)
    parts |= dict(dominant=(dominant * sure).sum() / area, conf=(conf * sure).sum() / area)
    return result(loss, new, maps, **parts)


def esl_parts(out_t, label, state, args, none):
    """Eq. (7), (8), (12): parts of the pixels, a feature of each part and image, the prototypes."""
    ids = esl.part_ids(out_t["encoder"], state["prototypes"], label)
    mu = esl.part_sums(out_t["rep"], ids, none)
    offered = torch.cat([F.normalize(mu[..., :-1], dim=2), mu[..., -1:]], 2)
    new = {"bank": state["bank"].clone(), "pushed": state["pushed"].clone()}
    sizes = torch.full((none,), args.queue)
    esl.push_features(new["bank"], new["pushed"], sizes, offered.transpose(0, 1))
    sums = esl.part_sums(out_t["encoder"], ids, none).sum(0)
    new["prototypes"] = esl.update_prototypes(state["prototypes"], sums, args.theta)
    return ids, new, (sums[:, -1] > 0).sum()


# unimatch.py's and unimatch_v2.py's stand in files of their own
LITERAL = {name: globals()[f"{name}_step"] for name in tiny.SCRIPTS if "uni" not in name}


def assert_close(mine, theirs, rel):
    """Names, and numbers up to rel of the largest; None: a map that is seen elsewhere."""
    assert mine.keys() == theirs.keys()
    for name, x in mine.items():
        if theirs[name] is not None:
            assert x.dtype == theirs[name].dtype, name
            scale = theirs[name].double().abs().max().item()
            distance = (x.double() - theirs[name].double()).abs().max().item()
            assert distance <= (rel * scale if x.is_floating_point() else 0), name


def sgd(nets, trained, momentum, args, number):
    """SGD by hand: momentum 0.9, poly rate, the head's own, decay on all or not on vectors."""
    for name in trained:
        for key, p in nets[name].named_parameters():
            lr = args.lr * (1 - number / args.total_iters) ** 0.9
            lr *= args.lr_head if key.startswith("head.") else 1
            spared = args.decay_on == "weights" and p.ndim == 1
            push = p.grad + (0 if spared else args.weight_decay) * p.detach()
            before = momentum.get((name, key))
            momentum[name, key] = push if before is None else 0.9 * before + push
            p.data -= lr * momentum[name, key]
            p.grad = None


def move_teacher(name, nets, args, number):
    """The average of weights, for some also of BN's statistics; its first step is a copy."""
    count = number - getattr(args, "warmup_iters", 0)
    if "teacher" not in nets or count < 0:
        return
    average = name == "esl" or getattr(args, "teacher_bn", "") == "average"
    average |= getattr(args, "teacher_mode", "") == "eval"
    keep = min(1 - 1 / (count + 1), args.ema_decay)
    mine, weights = nets["student"].state_dict(), dict(nets["teacher"].named_parameters())
    for key, x in nets["teacher"].state_dict().items():
        if key in weights or average and key.endswith(("_mean", "_var")):
            x.copy_(keep * x + (1 - keep) * mine[key])


def compared(name, argv, monkeypatch):
    """Makes a recorded run and compares each of its steps; returns flags and what was found."""
    script = tiny.script(name)
    found = watched(script, argv, monkeypatch)
    args = tiny.resolved(script, argv)
    images, nets, state, momentum, passes = script.load(args), found.networks, found.state, {}, []
    recorder.listen(nets, passes.append)
    trained = [key for key in nets if key != "teacher"]
    assert len(found.steps) == args.total_iters
    for key, net in nets.items():
        assert all(p.requires_grad == (key in trained) for p in net.parameters())
    for number, step in enumerate(found.steps):
        same_samples(name, args, images, number, step.batch)
        for own in step.batch.values():
            own.update({key: x.long() for key, x in own.items() if key == "label"})
        passes.clear()
        torch.manual_seed(zlib.crc32(b"%d %d 0" % (args.seed, number)))  # dropout, all draws
        literal = LITERAL[name](nets, state, step.batch, args, number, images)
        # what was seen, by which network, in which mode and order: bit for bit
        assert len(step.seen) == len(passes)
        for entry, twin in zip(step.seen, passes, strict=True):
            assert entry.keys() == twin.keys()
            for key, x in entry.items():
                same = torch.equal(x, twin[key]) if torch.is_tensor(x) else x == twin[key]
                assert same, (number, entry["net"], key)
        literal.loss.backward()
        own = {}
        for key in trained:
            for part, p in nets[key].named_parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # DDP: all have one
                own[f"{key}.{part}"] = p.grad
        # float32: sums of 3,000 pixels in another order, through six layers; 1e-5 of the largest
        assert_close(step.grads, own, 5e-5)
        sgd(nets, trained, momentum, args, number)
        move_teacher(name, nets, args, number)
        for key, net in nets.items():
            assert_close(step.nets[key], net.state_dict(), 1e-5)
        assert list(step.parts) == list(literal.parts)
        # means over 4,000 numbers or fewer in float32: a few 1e-7 relative
        assert step.parts == pytest.approx(literal.parts, rel=1e-5, abs=1e-6)
        assert_close(step.state, literal.state, 1e-5)
        if step.maps:
            assert_close(step.maps, literal.maps, 1e-5)
        for key, net in nets.items():  # no rounding is carried on
            net.load_state_dict(step.nets[key])
        state = step.state
    return args, found


ALONE = HAND + " "  # in place of what its script's rows share: flags that would not act there
SHARED = {
    "cps_fpl": "--unsup-weight 2.5 " + HAND + UNEVEN,
    # areas: 6 and more than 1 cell of 64
    "ael_fpl": "--unsup-weight 2.5 --seed 3 --lr 0.05 --bank-momentum 0.7 --bank-area 0.08 "
    "--region-area 0.02 " + HAND + UNEVEN,
    "u2pl": tiny.MORE["u2pl"] + " --scales 0.5 1.5 " + HAND,
    "u2pl_ael": tiny.OF_U2PL + " --seed 3 --lr 0.05 --bank-momentum 0.7 --bank-area 0.08 "
    "--region-area 0.02 --warmup-iters 1 " + HAND + UNEVEN,
    "esl": tiny.MORE["esl"] + " --scales 0.5 1.5 " + HAND,
}
ROWS = {
    "supervised": ["", "--ohem-kept 0.2 --aux-weight 0.4 --decay-on weights"],
    "mean_teacher": [
        "--cutmix --warmup-iters 1 --cutmix-prob 0.7 --consistency-weight 1.5 --pictures-every 1",
        "--consistency mse --rampup-iters 4 --teacher-bn average --ema-decay 0.6",
        "--warmup-iters 0 --aux-weight 0.4 " + UNEVEN,
    ],
    "cps_fpl": [
        "",
        "--same-image-cutmix --seed 3 --k-strategy step --weight convex",
        "--no-cutmix --recipe official --T 0.5 --ohem-kept 0.2",
        "--no-cutmix --T 0.2 0.3 0.5",
        "--recipe official --T 0.2 0.3 0.5",
        ALONE + "--unsup-weight 0",
    ],
    "ael_fpl": [
        "--T 0.2 --ema-decay 0.6",
        "--unsup-loss ce --skip-absent --beta 0.5 --gamma 1 --threshold 0.12",
        "--recipe official --unsup-loss ce --pooled 4 --teacher-mode eval",
        "--recipe official --T 0.2 0.3 0.5 --consistency-on all --pooled 1 --ohem-kept 0.2",
        "--paste-draws 1 --paste-prob 0.5 --paste-power 2 --paste-not 3 4 --paste-scales 0.2 0.4",
        "--paste-draws 0 --aux-weight 0.4 --decay-on weights",
    ],
    "u2pl": [
        "",
        ALONE + "--unreliable-loss none --warmup-iters 2 --scales 0.5 1.5",
        "--negatives-from reliable --no-dpa --alpha-0 0.4",
        "--no-bank --ranks 15 20 --no-cutmix --fused off",
        "--seed 5 --cutmix-prob 1 --aux-weight 0.4 --epochs 5 --eta 2 --contrast-weight 1",
    ],
    "u2pl_ael": [
        "",
        "--recipe official --contrast-after 2 --fused off --paste-prob 0.8",
        "--no-dpa --gamma 1 --eta 2 --contrast-weight 1 --aux-weight 0.4 --ranks 15 20",
    ],
    "esl": [
        "",
        ALONE + "--label soft --no-contrast --scales 0.5 1.5",
        "--label topk --top-k 2 --theta 0.5 --unsup-weight 1 --contrast-weight 2 --aux-weight 0.4",
        "--no-cutmix --parts 1 --fused off --seed 5",
    ],
}
NUMBERS = dict.fromkeys(("ael_fpl", "u2pl_ael"), dict(iters=6, batch=4))
NUMBERS |= {"u2pl": dict(iters=6), "cps_fpl": dict(iters=3)}


def see_all_parts_at_work(name, args, found):
    """What a row is there for does occur in its steps."""
    parts = [step.parts for step in found.steps]
    if "ael" in name:  # it tells images apart
        present = [step.state["present"] for step in found.steps]
        assert sum(int(x.any() and not x.all()) for x in present) >= 5
        assert any(0 < one["kept"] < 1 for one in parts) and any(one["regions"] for one in parts)
    if "u2pl" in name:
        assert any(one["classes"] > 1 for one in parts) == (args.unreliable_loss != "none")
    if name == "esl":
        assert all((one["anchors"] > 0) == (one["contrast"] > 0) == args.contrast for one in parts)


FIRST = {name: [pytest.mark.smoke] for name in ROWS}  # the oldest versions run a row of each script
CASES = [pytest.param(n, row, marks=FIRST.pop(n, [])) for n, rows in ROWS.items() for row in rows]


@pytest.mark.parametrize("name, row", CASES)
def test_every_step_is_the_literal_one(name, row, tree, tmp_path, monkeypatch):
    numbers = dict(log=1, iters=4, evaluate=2, save=9, pictures=3) | NUMBERS.get(name, {})
    argv = tiny.flags(tree, tmp_path / "run", **numbers)
    argv += f"{'' if row.startswith(ALONE) else SHARED.get(name, HAND)} {row}".split()
    args, found = compared(name, argv, monkeypatch)
    see_all_parts_at_work(name, args, found)


def small(name, tree, out, *words, **numbers):
    """Flags of a run of a few steps in which a method does all that it does."""
    numbers = dict(iters=4, log=1, evaluate=9, save=9) | numbers
    return [*tiny.flags(tree, out, **numbers), *tiny.MORE.get(name, "").split(), *words]


def watched(script, argv, monkeypatch):
    with monkeypatch.context() as patch:
        tiny.shrink(script, patch)
        return recorder.watch(patch, script, argv)


KINDS = {"branch1": ["branch1"], "branch2": ["branch2"], "mean": ["branch1", "branch2"]}


def bits(kind, networks):
    """The digest of what --evaluate names: one network, or both in a list."""
    states = [networks[name] for name in KINDS[kind]]
    if len(states) == 1:
        return processes.digest({"": states[0]})
    both = {f"{i}.{key}": x for i, state in enumerate(states) for key, x in state.items()}
    return processes.digest({"": both})


def test_the_network_that_evaluate_names_is_scored_and_best_follows_it(tree, tmp_path, monkeypatch):
    """[D19]; scoring changes nothing of the training; a checkpoint knows what was scored.

    No two networks of two seeds begin equal.
    """
    trained, begun = [], []
    for kind, seed in itertools.product(KINDS, "01"):
        out = tmp_path / kind / seed
        words = f"--evaluate {kind} --seed {seed} --lr 0.1 --batch-size-unlabeled 3".split()
        argv = small("cps_fpl", tree, out, *words, evaluate=1)
        found = watched(cps_fpl, argv, monkeypatch)
        lines = [line["miou"] for line in runs.log(out) if line["kind"] == "eval"]
        best = 1 + lines.index(max(lines))
        assert runs.log(out)[-1]["best_step"] == best
        order = [*found.steps, found.steps[-1], found.steps[best - 1]]
        assert found.scored == [(bits(kind, step.nets), {False}) for step in order]
        begun += [processes.digest({"": net}) for net in found.networks.values()]
        trained += [bits(branch, found.steps[-1].nets) for branch in ("branch1", "branch2")]
    assert len(set(begun[:4])) == 4 and begun == begun[:4] * 3
    assert len(set(trained[:4])) == 4 and trained == trained[:4] * 3
    path = tmp_path / "branch2/0/best.pt"
    saved = torch.load(path, weights_only=True)["networks"]
    for words in ([], ["--evaluate", "mean"]):
        argv = ["--eval-only", "--checkpoint", str(path), *words]
        ((scored, _),) = watched(cps_fpl, argv, monkeypatch).scored
        assert scored == bits((words or ["branch2"])[-1], saved)


@pytest.mark.parametrize("name", ["mean_teacher", "u2pl", "esl"])
def test_every_process_mixes_pairs_of_its_own(name, tree, tmp_path, monkeypatch):
    """8 unlabelled images are enough for 4 processes, and too few for 8."""
    script = tiny.script(name)
    tiny.shrink(script, monkeypatch)
    words = ["--cutmix", "--batch-size-unlabeled", "8"]
    args = tiny.resolved(script, small(name, tree, tmp_path / "run", *words, batch=8))

    begin = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(script, "Run", begin)
    monkeypatch.setattr(script, "parallel", lambda net, *_: net)
    for world, error in ((4, KeyboardInterrupt), (8, Refusal)):
        group = Group(0, world, torch.device("cpu"))
        monkeypatch.setattr(script.distributed, "setup", lambda device, group=group: group)
        with pytest.raises(error):
            script.main(args)


@pytest.mark.parametrize("words, cut", [("", "(3, 20)"), ("12 20", "(12, 20)"), ("3 11", "")])
def test_ranks_beyond_the_classes_are_cut_with_one_line(words, cut, tree, tmp_path, capsys):
    """r_l is at most 10 of 11 classes, r_h 11; so the last rank remains."""
    words = ["--ranks", *words.split()] if words else []
    with pytest.MonkeyPatch.context() as patch:
        tiny.shrink(u2pl, patch)
        tiny.train(u2pl, small("u2pl", tree, tmp_path / "run", *words))
    printed = capsys.readouterr().out.splitlines()
    to = "(10, 11)" if "12" in cut else "(3, 11)"
    said = [f"--ranks {cut}: cut to {to}, as there are 11 classes"] if cut else []
    assert [line for line in printed if "--ranks" in line] == said
    lines = [line for line in runs.log(tmp_path / "run") if line["kind"] == "train"]
    assert lines[-1]["contrast"] > 0


@pytest.mark.smoke
def test_the_banks_of_a_run_begin_as_functions_of_the_seed(tree, tmp_path, monkeypatch):
    """Random confidences; four steps' partners by Eq. (9), any image, as none has been seen."""
    words = ["--batch-size-unlabeled", "3", "--seed", "8"]
    state = watched(ael_fpl, small("ael_fpl", tree, tmp_path / "run", *words), monkeypatch).state
    rng = np.random.default_rng([8, zlib.crc32(b"bank")])
    confidence = rng.random(11, np.float32)
    assert state["confidence"].tolist() == confidence.tolist()
    assert state["present"].tolist() == [[False] * 6] * 11
    score = np.exp(1 - confidence.astype(float))
    chances = np.cumsum(score) / score.sum()
    expected = []
    for _ in range(4):
        classes = [int((chances <= u).sum()) for u in rng.random(3)]
        expected.append([[c, int(rng.integers(6))] for c in classes])
    assert state["draws"].tolist() == expected


def test_a_damaged_partner_is_refused_by_name_in_one_line(tmp_path, monkeypatch, capsys):
    """Of seed 1 a first partner is none of the first images; threads do not hold up the end."""
    rng = np.random.default_rng([1, zlib.crc32(b"bank")])
    bank, empty = rng.random(11, np.float32), torch.zeros(11, 6, dtype=torch.bool)
    drawn = ael_fpl.draw_partners(torch.from_numpy(bank), empty, 2, rng)[:, 1].tolist()
    order = np.random.default_rng([1, zlib.crc32(b"unlabeled"), 0, 0]).permutation(6)
    partner = (set(drawn) - set(order[:2].tolist())).pop()
    tree = tiny.draw_tree(tmp_path / "data")
    path = tree / f"train/train{(1, 2, 3, 5, 6, 7)[partner]}.jpg"  # the unlabelled ones, at 1/4
    path.write_bytes(path.read_bytes()[:200])
    argv = small("ael_fpl", tree, tmp_path / "run", *"--batch-size-unlabeled 2 --seed 1".split())
    tiny.shrink(ael_fpl, monkeypatch)
    ended = Mock()
    monkeypatch.setattr(run.os, "_exit", ended)
    monkeypatch.setattr(run.signal, "signal", Mock())
    with run.refusals():
        tiny.train(ael_fpl, argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}: not readable as an image" in line
    ended.assert_called_once_with(2)
    assert run.holds_nothing(tmp_path / "run")
