"""The step of each script against a literal one, on recorded batches.

From the weights before a step its literal twin makes the same passes with the same random numbers;
whatever the loop did is compared: what each network saw, in which mode and order, gradients, the
optimizer, BN statistics, the teacher's average, banks, the log, the maps of the panels. Equations
are the script's own functions, which other tests hold: what enters them, and what becomes of their
results, is written out here.
"""

import math
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

import ael_fpl
import cps_fpl
import esl
import mean_teacher
import recorder
import tiny
import u2pl
import u2pl_ael
import unimatch
import unimatch_v2
from benchmarks.runs import bits, flat
from common.distributed import Group
from processes import Forked, digest, finish
from recorder import assert_close
from tiny import ROOT

ALONE = Group(0, 1, torch.device("cpu"))


def result(loss, maps, **parts):
    """What a step returns; the state after it is in now.state."""
    numbers = {name: torch.as_tensor(x).item() for name, x in ({"loss": loss} | parts).items()}
    return loss, maps, numbers


def labeled_loss(out, label, args):
    """L_s of the first images of a pass, those that have a label."""
    return u2pl.supervised_loss({name: x[: len(label)] for name, x in out.items()}, label, args)


def mixed_pairs(script, now, args, *maps):
    """CutMix, image by image: the maps as the step's coin and boxes mix them in pairs."""
    if not args.cutmix or now.rng.random() >= args.cutmix_prob:
        return maps
    found = [x.clone() for x in maps]
    for i in range(len(maps[0])):
        top, left, h, w = script.cutmix_box(now.rng, args.crop_size)
        box = (..., slice(top, top + h), slice(left, left + w))
        for new, old in zip(found, maps, strict=True):
            new[i][box] = old[i ^ 1][box]
    return found


def blend(mask, first, second):
    """first, and second where mask (B, 1, H, W) is True: by multiplication."""
    mask = mask if first.ndim == 4 else mask[:, 0]
    return first * ~mask + second * mask


def same_samples(script, now, args):
    """Which streams a step reads, from whose images and at what scales; no label is opened."""
    labeled = script.Stream(now.images.labeled, args.batch_size, True, args.scales)
    streams = {"labeled": labeled}
    if hasattr(args, "paste_scales"):
        streams["paste"] = labeled._replace(scales=args.paste_scales)
    if hasattr(args, "batch_size_unlabeled") and getattr(args, "unsup_weight", 1):
        unlabeled = now.images.unlabeled, args.batch_size_unlabeled, False, args.scales
        streams["unlabeled"] = script.Stream(*unlabeled)
        if getattr(args, "partner", "") == "crop":
            streams["unlabeled.2"] = streams["unlabeled"]
        elif script is cps_fpl and args.cutmix:
            second = "unlabeled.2" if args.same_image_cutmix else "partner"
            streams[second] = streams["unlabeled"]
    assert list(now.batch) == list(streams)
    for name, stream in streams.items():
        samples = script.Samples(name, stream, now.images, args)
        numbers = range(now.number * stream.batch, (now.number + 1) * stream.batch)
        assert_close(now.batch[name], default_collate([samples[i] for i in numbers]), 0)


def several_k(args, mask, *views):
    """K of several --T, chosen before CutMix of views (logits, inside); one's is the loss's own."""
    if len(args.T) > 1:
        K = [cps_fpl.adaptive_assignment(*view, args) for view in views]
        return K[0] if mask is None else blend(mask, *K)


def supervised_step(now, args):
    """Labels alone, as also before --warmup-iters: of the log all but L_s is 0."""
    out = now.student(now.x_l)
    maps = {"image": now.x_l, "label": now.label, "prediction": out["logits"].argmax(1)}
    loss = labeled_loss(out, now.label, args)
    parts = dict.fromkeys(tiny.LINES[now.name].split()[1:], 0.0)
    if parts:
        parts["sup"] = loss
    return result(loss, maps, **parts)


def mean_teacher_step(now, args):
    """U2PL Sec. 3.1 without its contrast; or the squared distance of Tarvainen and Valpola."""
    count = now.number - args.warmup_iters
    if count < 0:
        return supervised_step(now, args)
    with torch.no_grad():
        prob = now.teacher.eval()(now.clean)["logits"].softmax(1)
    x_u, prob, inside = mixed_pairs(mean_teacher, now, args, now.clean, prob, now.inside)
    both = torch.cat([now.x_l, x_u])
    out = now.student(both)
    if args.teacher_bn == "own":
        with torch.no_grad():
            now.teacher.train()(both)
    sup = labeled_loss(out, now.label, args)
    logits = out["logits"][len(now.x_l) :]
    unsup = getattr(mean_teacher, f"consistency_{args.consistency}")(logits, prob, inside)
    rampup = mean_teacher.sigmoid_rampup(count, args.rampup_iters)
    loss = sup + args.consistency_weight * rampup * unsup
    conf = prob.amax(1)
    maps = {"student's view": x_u, "confidence": conf, "inside": inside}
    maps |= {"pseudo label": torch.where(inside, prob.argmax(1), 255), "student": logits.argmax(1)}
    return result(loss, maps, sup=sup, unsup=unsup, conf=conf[inside].mean())


def cps_fpl_step(now, args):
    """CPS: both networks teach each other; clean views teach on the mixed one, with CutMix."""
    pair = list(now.nets.values())
    maps = {"image": now.x_l, "truth": now.label}
    progress = now.number / args.total_iters
    if args.unsup_weight and args.cutmix:
        first, second = (now.batch[name] for name in list(now.batch)[1:])
        masks = [cps_fpl.toggled_mask(now.rng, args.crop_size) for _ in first["image"]]
        mask = torch.stack(masks)
        with torch.no_grad():
            views = [[net(view["image"])["logits"] for view in (first, second)] for net in pair]
        teachers = [blend(mask, *view) for view in views]
        insides = first["inside"], second["inside"]
        K = [several_k(args, mask, *zip(view, insides, strict=True)) for view in views]
        mixed = blend(mask, first["image"], second["image"])
        inside = blend(mask, *insides)
        students = []
        if args.balance and args.unsup_loss == "fpl":  # network 2 before its turn, no trace is left
            before = {name: x.clone() for name, x in pair[1].state_dict().items()}
            with torch.no_grad():
                pair[1](mixed)
            pair[1].load_state_dict(before)
        maps |= {"mixed": mixed, "its pseudo label": teachers[1].argmax(1)}
    labeled = []
    for net in pair:
        if args.unsup_weight and args.cutmix:
            students.append(net(mixed)["logits"])
        labeled.append(net(now.x_l)["logits"])
    if args.unsup_weight and not args.cutmix:  # labelled images teach as well
        others = [net(now.clean)["logits"] for net in pair]
        students = teachers = [torch.cat(logits) for logits in zip(labeled, others, strict=True)]
        inside = torch.cat([now.inside_l, now.inside])
        K = [several_k(args, None, (z, inside)) for z in teachers]
    sup = sum(labeled_loss({"logits": logits}, now.label, args) for logits in labeled)
    loss, parts = sup, {"sup": sup}
    if args.unsup_weight:
        cross, more = cps_fpl.cross_loss(students, teachers, inside, progress, args, K)
        loss = sup + args.unsup_weight * cross  # FPL Eq. (1)
        parts |= more | cps_fpl.teacher_statistics(teachers, inside, progress, args, K)
    parts |= cps_fpl.label_statistics(labeled, now.label, progress, args)
    prob = labeled[1].detach().softmax(1)
    p, _ = cps_fpl.by_rank(prob)
    K = cps_fpl.k_maps(labeled[1], now.inside_l, progress, args)
    maps |= {"pseudo label": prob.argmax(1), "branch 1": labeled[0].argmax(1)}
    maps["K: 1, 2, 3 or more"] = (K - 1) / 2
    maps["weight"] = cps_fpl.adaptive_weight(p, K, args.weight, args.mean_over)
    return result(loss, maps, **parts)


def ael_labeled(now, args):
    """Adaptive Copy-Paste: the images of a group share their classes. L_s, and the confidences."""
    bank = now.state["confidence"]
    u = torch.from_numpy(now.rng.random((args.batch_size, args.paste_draws + 1)))
    allowed = torch.tensor([c not in args.paste_not for c in range(len(bank))])
    prob = ael_fpl.sampling_probability(bank, allowed, args.paste_power)
    groups = [u[i // args.pooled * args.pooled, 1:] for i in range(args.batch_size)]
    drawn = ael_fpl.draw_classes(prob, torch.stack(groups))
    pasted = u[:, 0] < args.paste_prob
    labeled = ael_fpl.copy_paste(now.batch["labeled"], now.batch["paste"], drawn, pasted)
    now.x_l, now.inside_l, now.label = (labeled[key] for key in ("image", "inside", "label"))
    out = now.student(now.x_l)
    prob = out["logits"].detach().softmax(1)
    sums = ael_fpl.class_confidence(prob, now.label, args.pooled, args.skip_absent)
    confidence = ael_fpl.update_confidence(bank, sums, args.bank_momentum)
    return out, labeled_loss(out, now.label, args), confidence


def ael_mixed(now, args):
    """Partners, drawn four steps before [D26], in boxes: what is seen and taught."""
    B, size, state = args.batch_size_unlabeled, args.crop_size, now.state
    classes, partners = state["draws"][0].T.tolist()
    stream = ael_fpl.Stream(now.images.unlabeled, B, False, args.scales)
    samples = ael_fpl.Samples("unlabeled.partner", stream, now.images, args)
    numbers = range(now.number * B, (now.number + 1) * B)
    second = default_collate([*map(samples.sample, partners, numbers)])
    insides = now.inside, second["inside"]
    with torch.no_grad():
        views = now.teacher(torch.cat([now.clean, second["image"]]))["logits"].chunk(2)
    draws = ael_fpl.draw_partners(state["confidence"], state["present"], B, now.rng)
    state["draws"] = torch.cat([state["draws"][1:], draws[None]])
    seen = torch.cat(views).argmax(1).masked_fill(~torch.cat(insides), 255)[..., ::4, ::4]
    present = ael_fpl.presence(seen, len(state["confidence"]), args.bank_area)
    for image, row in zip([*map(samples.which, numbers), *partners], present, strict=True):
        state["present"][:, image] = row
    mask, regions = torch.zeros(B, 1, size, size, dtype=torch.bool), 0
    for i, own in enumerate(now.rng.spawn(B) if args.cutmix else []):
        cells = seen[B + i].byte().numpy()
        box = ael_fpl.component_box(cells, classes[i], args.region_area, size, own)
        regions += box is not None
        top, left, h, w = box or ael_fpl.half_area_box(own, size)
        mask[i, :, top : top + h, left : left + w] = True
    mixed = SimpleNamespace(mask=mask, regions=regions / B)
    mixed.image = blend(mask, now.clean, second["image"])
    mixed.inside = blend(mask, *insides)
    mixed.logits = torch.where(mask, views[1], views[0])
    mixed.views = zip(views, insides, strict=True)
    return mixed


def ael_fpl_step(now, args):
    out, sup, bank = ael_labeled(now, args)
    rate = ael_fpl.equalization_rate(bank, args.beta)
    if args.consistency_on == "all":  # first: it draws random numbers
        with torch.no_grad():
            on_labels = now.teacher(now.x_l)["logits"]
        K = several_k(args, None, (on_labels, now.inside_l))
        given = out["logits"], on_labels, now.inside_l, rate, args.pooled, args, K
        more, parts_l = ael_fpl.consistency_loss(*given)
    mixed = ael_mixed(now, args)
    logits = now.student(mixed.image)["logits"]
    K = several_k(args, mixed.mask, *mixed.views)
    given = logits, mixed.logits, mixed.inside, rate, 1, args, K
    whole, parts = ael_fpl.consistency_loss(*given)
    if args.consistency_on == "all":
        whole = whole + more
        parts["unsup_l"] = parts_l["unsup"]
    loss = sup + args.unsup_weight * whole
    maps = {"labelled, pasted": now.x_l, "label": now.label, "mixed": mixed.image}
    maps |= {"box": mixed.mask[:, 0], "pseudo label": mixed.logits.argmax(1)}
    conf = mixed.logits.softmax(1).amax(1)
    kept = torch.rand_like(conf) >= 1 - rate[logits.argmax(1)]  # drawn anew
    maps |= {"weight": conf**args.gamma * kept * mixed.inside, "student": logits.argmax(1)}
    parts |= {"bank": bank.mean(), "regions": mixed.regions}
    now.state["confidence"] = bank
    return result(loss, maps, sup=sup, **parts)


def u2pl_step(now, args):
    n = len(now.x_l)
    if now.number < args.warmup_iters:
        return supervised_step(now, args)
    with torch.no_grad():
        pseudo = now.teacher.eval()(now.clean)["logits"].argmax(1)
    pseudo = torch.where(now.inside, pseudo, 255)
    x_u, pseudo, inside = mixed_pairs(u2pl, now, args, now.clean, pseudo, now.inside)
    both = torch.cat([now.x_l, x_u])
    out = now.student(both)
    with torch.no_grad():
        out_t = now.teacher.train()(both)
    # Eq. (5) to (8)
    H = u2pl.entropy(out_t["logits"][n:].softmax(1))
    alpha = u2pl.unreliable_share(now.number, args)
    gamma, lower = u2pl.quantiles(H, inside, 1 - alpha, alpha)
    y_u = torch.where(H < gamma, pseudo, 255)
    weight = u2pl.unsup_weight(y_u, inside, args.eta)
    unsup = u2pl.cross_entropy(out["logits"][n:], y_u)
    sup = labeled_loss(out, now.label, args)
    contrast = classes = 0
    if args.unreliable_loss != "none":
        label = torch.cat([now.label, y_u])
        chosen = u2pl.candidates(H, inside, gamma, lower, args.negatives_from)
        contrast, classes = u2pl_contrast(now, out, out_t, label, chosen, args)
    loss = sup + weight * unsup + args.contrast_weight * contrast  # Eq. (1)
    maps = {"student's view": x_u, "pseudo label": pseudo, "reliable": y_u}
    maps |= {"entropy": H / math.log(11), "student": out["logits"][n:].argmax(1)}
    parts = dict(sup=sup, unsup=unsup, unsup_weight=weight, contrast=contrast, classes=classes)
    return result(loss, maps, **parts, entropy=H[inside].mean())


def u2pl_contrast(now, out, out_t, label, chosen, args):
    """Eq. (9) to (16), Alg. 1, at stride 4: keys are pushed, then sampled; loss, classes."""
    size = out["rep"].shape[2:]
    label = u2pl.nearest(label, size)
    rep_s, rep_t, coarse = (u2pl.as_rows(x) for x in (out["rep"], out_t["rep"], out_t["coarse"]))
    prob = coarse.softmax(1)
    C = prob.shape[1]
    ranks = min(args.ranks[0], C - 1), min(args.ranks[1], C)
    N_c = u2pl.negative_masks(u2pl.class_ranks(prob), label, u2pl.nearest(chosen, size), *ranks)
    u = torch.rand(C, args.keys + 1, dtype=torch.float64)
    v = torch.rand(C, args.anchors * (args.negatives + 1), dtype=torch.float64)
    sizes = torch.tensor([args.bank_sizes[0]] + [args.bank_sizes[1]] * (C - 1))
    bank, pushed = now.state["bank"], now.state["pushed"]
    pushed *= getattr(args, "bank", True)
    offered = u2pl.draw_features(rep_t, N_c, u)
    u2pl.push_features(bank, pushed, sizes, offered)
    A_c = u2pl.anchor_masks(prob, label, args.delta_p)
    loss, counted = u2pl.unreliable_loss(rep_s, rep_t, A_c, bank, pushed, sizes, v, args)
    return loss, counted.sum()


def u2pl_ael_step(now, args):
    out_l, sup, confidence = ael_labeled(now, args)
    maps = {"labelled, pasted": now.x_l, "label": now.label}
    names = tiny.LINES["u2pl_ael"].split()[2:] + ["unsup_l"] * (args.consistency_on == "all")
    parts = dict.fromkeys(names, 0.0) | {"confidence": confidence.mean()}
    since_warmup = now.number - args.warmup_iters
    if since_warmup < 0:
        now.state["confidence"] = confidence
        maps["prediction"] = out_l["logits"].argmax(1)
        return result(sup, maps, sup=sup, **parts)
    if now.number == args.warmup_iters:  # once more: with BN statistics of this step
        now.teacher.load_state_dict(now.student.state_dict())
    with torch.no_grad():
        features = [now.teacher.train()(now.x_l)]
        now.teacher.eval()
        mixed = ael_mixed(now, args)
        now.state["confidence"] = confidence
        features.append(now.teacher.train()(mixed.image))
    inside, prob = mixed.inside, mixed.logits.softmax(1)
    # U2PL Eq. (5) to (8), AEL Eq. (12)
    H = u2pl.entropy(prob)
    (gamma,) = u2pl.quantiles(H, inside, 1 - u2pl.unreliable_share(now.number, args))
    pseudo = torch.where(inside, prob.argmax(1), 255)
    y_u = torch.where(H < gamma, pseudo, 255)
    out_u = now.student(mixed.image)
    rate = ael_fpl.equalization_rate(confidence, args.beta)
    given = out_u["logits"], y_u, prob.amax(1), inside, rate, 1, args
    unsup, weight = u2pl_ael.equalized_cross_entropy(*given)
    reliable = args.divide_by == "reliable"
    eta = u2pl.unsup_weight(y_u, inside, args.eta) if reliable else args.eta
    parts |= dict(unsup=unsup, unsup_weight=eta, entropy=H[inside].mean(), regions=mixed.regions)
    parts["kept"] = (weight[y_u != 255] > 0).float().mean()
    loss = sup + eta * unsup
    if args.consistency_on == "all":  # truth ignored
        prob_l = features[0]["logits"].softmax(1)
        label = torch.where(now.inside_l, prob_l.argmax(1), 255)
        rest = now.inside_l, rate, args.pooled, args
        more, _ = u2pl_ael.equalized_cross_entropy(out_l["logits"], label, prob_l.amax(1), *rest)
        loss = loss + args.eta * more
        parts["unsup_l"] = more
    if args.unreliable_loss != "none" and since_warmup >= args.contrast_after:
        rep_s, rep_t = (torch.cat([one["rep"] for one in x]) for x in ((out_l, out_u), features))
        logits = torch.cat([features[0]["logits"], mixed.logits])
        out_t = {"rep": rep_t, "coarse": u2pl.upsample(logits, rep_t.shape[2:])}
        rest = torch.cat([now.label, y_u]), (H > gamma) & inside, args
        contrast, classes = u2pl_contrast(now, {"rep": rep_s}, out_t, *rest)
        loss = loss + args.contrast_weight * contrast
        parts |= dict(contrast=contrast, classes=classes)
    maps |= {"mixed": mixed.image, "box": mixed.mask[:, 0], "pseudo label": pseudo}
    maps |= {"reliable": y_u, "entropy": H / math.log(11), "weight": weight}
    maps["student"] = out_u["logits"].argmax(1)
    return result(loss, maps, sup=sup, **parts)


def esl_step(now, args):
    teacher, state, n = now.teacher.eval(), now.state, len(now.x_l)
    none, contrast, anchors, present = 11 * args.parts, 0, 0, 0
    teacher.head.with_features = args.contrast
    if args.contrast and now.number == 0:  # K-means before the teacher has seen anything
        width = teacher.head.width
        state["prototypes"] = esl.first_prototypes(teacher, now.images, width, args, ALONE)
    with torch.no_grad():
        out_t = teacher(torch.cat([now.x_l, now.clean]) if args.contrast else now.clean)
    prob = out_t["logits"][-len(now.clean) :].softmax(1)
    if args.contrast:
        label = torch.cat([now.label, torch.where(now.inside, prob.argmax(1), 255)])
        # Eq. (7), (8), (12): parts of the pixels, a feature of each part and image, the prototypes
        ids = esl.part_ids(out_t["encoder"], state["prototypes"], label)
        mu = esl.part_sums(out_t["rep"], ids, none)
        offered = torch.cat([F.normalize(mu[..., :-1], dim=2), mu[..., -1:]], 2)
        sizes = torch.full((none,), args.queue)
        esl.push_features(state["bank"], state["pushed"], sizes, offered.transpose(0, 1))
        sums = esl.part_sums(out_t["encoder"], ids, none).sum(0)
        state["prototypes"] = esl.update_prototypes(state["prototypes"], sums, args.theta)
        present = (sums[:, -1] > 0).sum()
    maps = [now.clean, prob, now.inside, *([ids[n:]] if args.contrast else [])]
    x_u, target, sure, *ids_u = mixed_pairs(esl, now, args, *maps)
    # Eq. (2) to (6)
    out = now.student(torch.cat([now.x_l, x_u]))
    y_u = esl.soft_label(target, args)
    unsup = esl.soft_cross_entropy(out["logits"][n:], y_u, sure)
    sup = labeled_loss(out, now.label, args)
    conf, dominant = target.amax(1), (y_u > 0).sum(1)
    maps = {"student's view": x_u, "pseudo label": torch.where(sure, y_u.argmax(1), -1)}
    maps |= {"1 - 1/classes": 1 - 1 / dominant, "student": out["logits"][n:].argmax(1)}
    if args.contrast:
        maps["parts"] = None
        chosen = ids_u[0].masked_fill(~(conf > args.zeta), none)  # Eq. (9)
        ids = esl.aligned(torch.cat([ids[:n], chosen]), out["rep"].shape[2:]).flatten()
        u = torch.rand(11, args.anchors + 1, dtype=torch.float64)
        v = torch.rand(11, args.anchors, 1 + args.negatives, dtype=torch.float64)
        given = ids, state["bank"], state["pushed"], u, v, args
        contrast, anchors = esl.part_contrast(esl.as_rows(out["rep"]), *given)
    loss = sup + args.unsup_weight * unsup + args.contrast_weight * contrast  # Eq. (11)
    parts = dict(sup=sup, unsup=unsup, contrast=contrast, anchors=anchors, parts=present)
    area = max(int(sure.sum()), 1)
    parts |= dict(dominant=(dominant * sure).sum() / area, conf=(conf * sure).sum() / area)
    return result(loss, maps, **parts)


def strong_views(script, now, args, taught, shown, other=None):
    """What strong views show and are taught after CutMix, all maps alike; "strong": before it.

    shown: which images of the batch the boxes show; or other images, and what they are taught.
    """
    step, views = now.number, []
    for number in range(args.views):
        strong, mask = script.strong_views(now.clean, f"view{number}", step, args, ALONE)
        own = {"image": strong, **taught}
        partner = {key: x[shown] for key, x in own.items()}
        if other:
            image, _ = script.strong_views(other["image"], f"partner{number}", step, args, ALONE)
            partner = other | {"image": image}
        mixed = {key: blend(mask, x, partner[key]) for key, x in own.items()}
        views.append(mixed | {"strong": strong})
    return views


def fixmatch(script, now, args, views, taught, logits_t, logits_l, **perturbed):
    """What strong views, and perturbed features, learn of the logits that teach."""

    def loss_of(z, taught):
        return script.pixel_loss(z, taught, args)[taught["inside"]].mean()

    def label_map(taught):
        if args.unsup_loss == "fpl":
            return torch.where(taught["inside"], taught["logits"].argmax(1), -1)  # white
        sure = taught["inside"] & (taught["conf"] >= args.threshold)
        return torch.where(sure, taught["pseudo"], -1)

    K = script.k_of(logits_t, now.inside, args)
    maps = {"weak": now.clean, "its pseudo label": label_map(taught)}
    maps |= {"confidence": logits_t.softmax(1).amax(1), "K: 1, 2, 3 or more": (K - 1) / 2}
    z = now.student(torch.cat([view["image"] for view in views]))["logits"].chunk(args.views)
    for i, (view, own) in enumerate(zip(views, z, strict=True), 1):
        maps |= {f"strong {i}": view["strong"], f"mixed {i}": view["image"]}
        maps |= {f"label {i}": label_map(view), f"student {i}": own.argmax(1)}
        if args.unsup_loss == "fpl":
            K_i = view.get("K", script.k_of(view["logits"], view["inside"], args))
            maps[f"K {i}"] = (K_i - 1) / 2
    strong = sum(map(loss_of, z, views)) / args.views
    sup = labeled_loss({"logits": logits_l}, now.label, args)
    loss, parts = (sup + strong) / 2, dict(sup=sup, strong=strong)
    if script is unimatch:
        parts["perturbed"] = 0
    for z in perturbed.values():
        parts["perturbed"] = loss_of(z, taught)
        loss = sup / 2 + strong / 4 + parts["perturbed"] / 4
        maps["perturbed features"] = z.argmax(1)
    parts |= script.statistics(logits_t, now.inside, args, K=K)
    parts |= script.statistics(logits_l, now.label < 255, args, now.label)
    return result(loss, maps, **parts)


def unimatch_step(now, args):
    """One network, which says in the same pass what the weak images are."""
    student, n, other = now.student, len(now.clean), None
    if args.partner == "crop":
        more = now.batch["unlabeled.2"]
        with torch.no_grad():
            logits = student.eval()(more["image"])["logits"]
        other = more | unimatch.make_target(logits, more["inside"], args)
        student.train()
    student.head.perturbed = n * args.feature_perturbation
    out = student(torch.cat([now.x_l, now.clean]))
    student.head.perturbed = 0
    logits_l, logits_w = out.pop("logits").split([len(now.x_l), n])
    taught = unimatch.make_target(logits_w, now.inside, args)
    views = strong_views(unimatch, now, args, taught, [i ^ 1 for i in range(n)], other)
    return fixmatch(unimatch, now, args, views, taught, logits_w.detach(), logits_l, **out)


def unimatch_v2_step(now, args):
    """A teacher, and two views whose features lose channels by turns."""
    student, n = now.student, len(now.clean)
    assert student.backbone.checkpointed == (args.checkpoint_activations and now.number == 0)
    student.backbone.checkpointed = False  # recomputed blocks learn the same
    with torch.no_grad():
        logits_w = now.teacher.eval()(now.clean)["logits"]
    taught = unimatch_v2.make_target(logits_w, now.inside, args)
    shown = list(range(n))[::-1] if args.partner == "reversed" else [i ^ 1 for i in range(n)]
    views = strong_views(unimatch_v2, now, args, taught, shown)
    logits_l = student(now.x_l)["logits"]
    if args.views == 2 and args.complementary_dropout:
        masks = unimatch_v2.complementary_masks(n, 8, args.kept_whole, ALONE.device)
        student.head.masks = masks.flatten(0, 1)
    found = fixmatch(unimatch_v2, now, args, views, taught, logits_w, logits_l)
    student.head.masks = None
    return found


def learn(name, parameters, gradients, moments, args, number):
    """SGD or AdamW by hand: poly rate, the head's own, decay on all or not on vectors."""
    for key, gradient in gradients.items():
        p = parameters[key]
        lr = args.lr * (1 - number / args.total_iters) ** 0.9
        lr *= args.lr_head if ".head." in key else 1
        decay = 0 if args.decay_on == "weights" and p.ndim == 1 else args.weight_decay
        m, v = moments.get(key, (0, 0))
        if name == "unimatch_v2":
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient.square()
            size = (v / (1 - 0.999 ** (number + 1))).sqrt() + 1e-8
            p.data -= lr * decay * p + lr * m / (1 - 0.9 ** (number + 1)) / size
        else:
            m = 0.9 * m + gradient + decay * p.detach()
            p.data -= lr * m
        moments[key] = m, v


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


def first_banks(args):
    """AEL's: random confidences; four steps' partners, any image, as none has been seen."""
    rng = np.random.default_rng([args.seed, zlib.crc32(b"bank")])
    bank, present = torch.from_numpy(rng.random(11, np.float32)), torch.zeros(11, 6).bool()
    draws = [ael_fpl.draw_partners(bank, present, args.batch_size_unlabeled, rng) for _ in range(4)]
    return {"confidence": bank, "present": present, "draws": torch.stack(draws)}


def compared(name, argv):
    """Makes a recorded run and compares each of its steps; returns flags and what was found."""
    script, found = tiny.script(name), recorder.watched(name, argv)
    args = tiny.resolved(script, argv)
    nets, moments, passes = found.networks, {}, []
    now = SimpleNamespace(**nets, nets=nets, name=name, images=script.load(args), state=found.state)
    if "ael" in name:
        banks = first_banks(args)
        assert_close({key: now.state[key] for key in banks}, banks, 0)
    recorder.listen(nets, passes.append)
    assert len(found.steps) == args.total_iters
    parameters = dict(torch.nn.ModuleDict(nets).named_parameters())
    learning = {key: p for key, p in parameters.items() if p.requires_grad}
    trained = {key for key in parameters if not key.startswith("teacher.")}
    assert learning.keys() == trained or getattr(args, "freeze", 0)
    for number, step in enumerate(found.steps):
        now.number, now.batch = number, step.batch
        now.rng = np.random.default_rng([args.seed, zlib.crc32(b"mix"), number])
        same_samples(script, now, args)
        for own in step.batch.values():
            own.update({key: x.long() for key, x in own.items() if key == "label"})
        keys = "image", "inside", "label"
        now.x_l, now.inside_l, now.label = (step.batch["labeled"][key] for key in keys)
        if "unlabeled" in step.batch:
            now.clean, now.inside = (step.batch["unlabeled"][key] for key in keys[:2])
        if number == getattr(args, "warmup_iters", None):
            now.teacher.load_state_dict(now.student.state_dict())
        passes.clear()
        torch.manual_seed(zlib.crc32(b"%d %d 0" % (args.seed, number)))  # dropout, all draws
        loss, maps, parts = globals()[f"{name}_step"](now, args)
        # what was seen, by which network, in which mode and order: bit for bit
        assert_close(step.seen, passes, 0)
        slopes = torch.autograd.grad(loss, [*learning.values()], materialize_grads=True)
        # float32: sums of 3,000 pixels in another order, through six layers; 1e-5 of the largest
        assert_close(step.grads, dict(zip(learning, slopes, strict=True)), 5e-5)  # DDP: of all
        learn(name, parameters, step.grads, moments, args, number)
        move_teacher(name, nets, args, number)
        for key, net in nets.items():
            assert_close(step.nets[key], net.state_dict(), 1e-5)
            net.load_state_dict(step.nets[key])  # no rounding is carried on
        assert list(step.parts) == list(parts)
        # means over 4,000 numbers or fewer in float32: a few 1e-7 relative
        assert step.parts == pytest.approx(parts, rel=1e-5, abs=1e-6)
        assert_close(step.state, now.state, 1e-5)
        now.state = step.state
        if step.maps:
            assert_close(step.maps, maps, 1e-5)
    return args, found


HAND = " --lr-head 3 --weight-decay 0.1"
UNEVEN = " --batch-size-unlabeled 3"  # no count of labelled images can pass for the other
# areas: 6 and more than 1 cell of 64
AEL = " --seed 3 --lr 0.05 --bank-momentum 0.7 --bank-area 0.08 --region-area 0.02" + UNEVEN
SHARED = {  # by the rows of a script, where it acts
    "cps_fpl": "--unsup-weight 2.5" + UNEVEN,
    "ael_fpl": "--unsup-weight 2.5" + AEL,
    "u2pl": tiny.MORE["u2pl"] + " --scales 0.5 1.5",
    "u2pl_ael": tiny.OF_U2PL + " --warmup-iters 1" + AEL,
    "esl": tiny.MORE["esl"] + " --scales 0.5 1.5",
    "unimatch": tiny.MORE["unimatch"] + " --batch-size-unlabeled 4",
    "unimatch_v2": tiny.MORE["unimatch_v2"] + " --batch-size-unlabeled 4",
}
ROWS = """
supervised
supervised --ohem-kept 0.2 --aux-weight 0.4 --decay-on weights
mean_teacher --cutmix --warmup-iters 1 --cutmix-prob 0.7 --consistency-weight 1.5 --pictures-every 1
mean_teacher --consistency mse --rampup-iters 4 --teacher-bn average --ema-decay 0.6
mean_teacher --warmup-iters 0 --aux-weight 0.4 --batch-size-unlabeled 3
cps_fpl --same-image-cutmix --k-strategy step --weight convex --evaluate branch2
cps_fpl --no-cutmix --recipe official --T 0.5 --ohem-kept 0.2 --k-strategy n
cps_fpl --no-cutmix --T 0.2 0.3 0.5
cps_fpl --recipe official --T 0.2 0.3 0.5 --evaluate mean
cps_fpl --unsup-weight 0
ael_fpl --T 0.2 --ema-decay 0.6 --paste-draws 0 --aux-weight 0.4 --decay-on weights --no-cutmix
ael_fpl --unsup-loss ce --skip-absent --beta 0.5 --gamma 1 --threshold 0.1 --teacher-mode eval
ael_fpl --recipe official --T 0.2 0.3 0.5 --consistency-on all --pooled 1 --ohem-kept 0.2
ael_fpl --paste-draws 1 --paste-prob 0.5 --paste-power 2 --paste-not 3 4 --paste-scales 0.2 0.4
u2pl
u2pl --contrast-weight 2 --ema-decay 0.3 --bank-dtype bf16 --negatives-from all
u2pl --unreliable-loss none
u2pl --negatives-from reliable --no-dpa --alpha-0 0.4 --no-bank --ranks 15 20 --no-cutmix
u2pl --seed 5 --cutmix-prob 1 --aux-weight 0.4 --epochs 5 --eta 2 --ranks 3 11
u2pl_ael
u2pl_ael --recipe official --contrast-after 2 --no-dpa --gamma 1 --eta 2 --aux-weight 0.4
u2pl_ael --ema-decay 0.3 --ranks 1 9 --gamma 1 --beta 0.5 --paste-draws 1 --paste-scales 0.2 0.4
u2pl_ael --pooled 1 --paste-not 3 4
esl
esl --label soft --no-contrast --aux-weight 0.4 --ema-decay 0.3 --cutmix-prob 0.5
esl --label topk --top-k 2 --theta 0.5 --unsup-weight 1 --contrast-weight 2 --no-cutmix --parts 1
unimatch
unimatch --views 1 --no-feature-perturbation --recipe official
unimatch --unsup-loss fpl --T 0.2 0.3 0.5 --decay-on weights
unimatch --recipe official --unsup-loss fpl --T 0.3
unimatch_v2 --kept-whole 0 --batch-size 1 --batch-size-unlabeled 2
unimatch_v2 --views 1 --partner reversed --ema-decay 0.4 --decay-on weights --backbone dinov3_vits16
unimatch_v2 --unsup-loss fpl --T 0.5 --freeze 1 --checkpoint-activations --no-complementary-dropout
"""
ITERS = {"ael_fpl": 6, "u2pl": 6, "u2pl_ael": 6, "mean_teacher": 4, "esl": 4}


IDLE = {  # words of a row, and what is 0 in every line of its log; all else is at work somewhere
    "--no-cutmix": "regions",
    "--unreliable-loss none": "contrast classes",
    "--no-contrast": "contrast anchors parts",
    "--no-feature-perturbation": "perturbed",
    "": "confident",  # no pixel is above 0.95
}
CASES = [row.partition(" ")[::2] for row in ROWS.strip().splitlines()]
FIRST = {name: [pytest.mark.smoke] for name, _ in CASES}  # the oldest versions run a row of each


@pytest.mark.parametrize(
    "name, row", [pytest.param(*case, marks=FIRST.pop(case[0], [])) for case in CASES]
)
def test_every_step_is_the_literal_one(name, row, tree, tmp_path, capsys):
    numbers = dict(iters=ITERS.get(name, 3), batch=4 if "ael" in name else 2, pictures=3)
    argv = tiny.flags(tree, tmp_path / "run", log=1, evaluate=2, save=9, **numbers) + row.split()
    argv = tiny.with_acting(name, argv, SHARED.get(name, "") + HAND)
    args, found = compared(name, argv)
    idle = " ".join(keys for words, keys in IDLE.items() if words in row).split()
    for key in found.steps[0].parts:
        assert any(step.parts[key] for step in found.steps) == (key not in idle), key
    if "ael" in name:  # it tells images apart, and leaves some pixels out
        present = found.steps[-1].state["present"]
        assert present.any() and not present.all()
        assert any(0 < step.parts["kept"] < 1 for step in found.steps)
    if name == "cps_fpl":  # [D19]
        scored = [args.evaluate] if args.evaluate in found.networks else [*found.networks]
        bits = [digest({key: step.nets[key] for key in scored}) for step in found.steps]
        assert [x for x, _ in found.scored[:3]] == [bits[1], bits[2], bits[2]]
        assert digest({"": found.networks["branch1"]}) != digest({"": found.networks["branch2"]})
    if "u2pl" in name:
        cut = min(args.ranks[0], 10), min(args.ranks[1], 11)  # so the last rank remains
        line = f"--ranks {args.ranks}: cut to {cut}, as there are 11 classes\n"
        said = capsys.readouterr().out.count(line)
        assert said == (args.unreliable_loss != "none" and cut != args.ranks)


JOINED = {  # what takes a graph at a time, and what takes all in one backward
    "cps_fpl": {
        "with distributed.no_sync(net):": "if True:",
        "(args.unsup_weight * cross).backward()": "pass",
        "losses[i] = [x.detach() for x in losses[i]]": "pass",
        'if args.balance and args.unsup_loss == "fpl":  # needs': "if False:  # needs",
        "sup_of_net.backward()": "pass",
        "if in_turns and i == 0:": "if False:",
        "if not in_turns:\n            loss": "if True:\n            loss",
    },
    "ael_fpl": {
        "with distributed.no_sync(student_parallel):": "if True:",
        "loss_l.backward()": "pass",
        "(args.unsup_weight * unsup + unused).backward()": (
            "(loss_l + args.unsup_weight * unsup).backward()"
        ),
    },
}


def joined(name, folder):
    """Writes a script whose step has one backward pass into a folder; returns its path."""
    text = (ROOT / f"{name}.py").read_text()
    for own, one in JOINED[name].items():
        assert text.count(own) == 1, own
        text = text.replace(own, one)
    path = folder / "joined" / f"{name}.py"
    path.parent.mkdir()
    path.write_text(text)
    return path


@pytest.mark.parametrize("recipe", ["paper", "official"])
@pytest.mark.parametrize("name, processes", [("cps_fpl", 1), ("cps_fpl", 2), ("ael_fpl", 2)])
def test_a_graph_at_a_time_makes_the_weights_of_one_backward(
    tree, tmp_path, name, processes, recipe
):
    """Bit for bit, moments of SGD too."""
    found = []
    for script in (ROOT / f"{name}.py", joined(name, tmp_path)):
        out = tmp_path / f"run{len(found)}"
        argv = tiny.flags(tree, out, iters=2, evaluate=9, save=9, batch=4)
        argv += f"--recipe {recipe} --unsup-weight 2.5 --T 0.3".split()
        argv += ["--aux-weight", "0.4"] if name == "ael_fpl" else []  # a head of labels alone
        finish(Forked([script, *argv], processes))
        found.append(torch.load(out / "last.pt", weights_only=True))
    for name in ("networks", "optimizer"):
        one, two = (flat(content[name]) for content in found)
        assert one.keys() == two.keys()
        assert [k for k in one if torch.is_tensor(one[k]) and bits(one[k]) != bits(two[k])] == []
