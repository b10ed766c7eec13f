"""The step of each script against a literal one: the papers' algorithms on recorded batches.

A recorded run leaves networks, batches and what came of every step. From the weights before a step
its literal twin makes the same passes with the same random numbers, in one graph; whatever the loop
did is compared: which network saw what in which mode and order, bit for bit, gradients, SGD, BN
statistics, the teacher's average, banks, the numbers of the log, and the maps of the panels.
"""

import math
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ael_fpl
import cps_fpl
import esl
import recorder
import tiny
import u2pl
from benchmarks import runs
from common import run
from oracles import u2pl as oracle

UNEVEN = "--batch-size-unlabeled 3 "  # no count of labelled images can pass for the other
HAND = "--lr-head 3 --weight-decay 0.1 "


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return tiny.draw_tree(tmp_path_factory.mktemp("steps") / "data")


# ---- what the steps share ----


def labeled_loss(out, label, args):
    """U2PL Eq. (2), or with --ohem-kept the mean over each image's hard pixels; main head, aux."""
    losses = []
    for logits in (out["logits"], out.get("aux")):
        if logits is None:
            continue
        nll = F.cross_entropy(logits, label, ignore_index=255, reduction="none")
        if args.ohem_kept:
            kept = round(args.ohem_kept * args.crop_size**2)
            means = []
            for values, valid in zip(nll, label != 255, strict=True):
                values = values[valid]
                p = torch.exp(-values.detach())
                limit = max(0.7, p.sort().values[min(kept, len(p)) - 1].item())
                means.append(values[p <= limit].mean())
            losses.append(sum(means) / len(means))
        else:
            losses.append(nll.sum() / max(int((label != 255).sum()), 1))
    return losses[0] + (args.aux_weight * losses[1] if len(losses) > 1 else 0)


def mixed_pairs(script, args, number, *maps):
    """CutMix, image by image: the maps as the step's coin and boxes mix them in pairs."""
    rng = np.random.default_rng([args.seed, number])
    if not args.cutmix or rng.random() >= args.cutmix_prob:
        return maps
    boxes = [script.cutmix_box(rng, args.crop_size) for _ in maps[0]]
    found = [x.clone() for x in maps]
    for i, (top, left, h, w) in enumerate(boxes):
        for new, old in zip(found, maps, strict=True):
            box = (..., slice(top, top + h), slice(left, left + w))
            new[i][box] = old[i ^ 1][box]
    return found


def positives(prob, args, progress=0.0):
    """FPL Alg. 1 and supplement Table 5: K of each pixel."""
    C = prob.shape[1]
    V = prob.sort(dim=1, descending=True, stable=True).values.cumsum(1)
    n = (1 + (V <= args.T if args.strict else V < args.T).sum(1)).clamp(max=C)
    strategy = getattr(args, "k_strategy", "n-1")
    if strategy == "n-1":
        K = (n - 1).clamp(min=1)
    elif strategy == "n":
        K = n
    else:
        fixed = {"fixed2": 2, "fixed3": 3}.get(strategy) or 3 - min(int(3 * progress), 2)
        K = torch.full_like(n, min(fixed, C))
    return K.clamp(max=args.k_max) if args.k_max else K


def fuzzy_loss(logits, prob, K, args):
    """FPL Eq. (7) and its weight, Eq. (11) or (16), of each pixel."""
    rank = prob.argsort(dim=1, descending=True, stable=True).argsort(1)
    Y = rank < K[:, None]
    pull = (logits.neg().exp() * Y).sum(1)
    push = (logits.exp() * ~Y).sum(1)
    rest = (prob * ~Y).amax(1)
    mean = (prob * Y).sum(1) / K
    if args.mean_over == "positives_and_next":
        mean = ((prob * Y).sum(1) + rest) / (K + 1)
    gap = (mean - rest).clamp(min=0)
    weight = {
        "concave": torch.log(1 + 50 * gap) / torch.log(1 + 50 * mean),
        "linear": gap / mean,
        "convex": gap / (mean + 4 * rest),
        "none": torch.ones_like(gap),
    }[args.weight]
    return torch.log(1 + pull * push), weight


def sampled(x):
    """Every fourth pixel of every fourth row."""
    return x[..., ::4, ::4]


def result(loss, state=None, maps=None, **parts):
    numbers = {name: torch.as_tensor(x).item() for name, x in parts.items()}
    return SimpleNamespace(loss=loss, parts={"loss": loss.item()} | numbers, state=state, maps=maps)


# ---- supervised, Mean Teacher ----


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
    x_u, prob, inside = mixed_pairs(tiny.script("mean_teacher"), args, number, clean, prob, inside)
    both = torch.cat([x_l, x_u])
    out = student(both)
    if args.teacher_bn == "own":
        with torch.no_grad():
            teacher.train()(both)
    n = len(x_l)
    sup = labeled_loss({name: x[:n] for name, x in out.items()}, y_l, args)
    logits = out["logits"][n:]
    each = F.cross_entropy(logits, prob.argmax(1), reduction="none")
    if args.consistency == "mse":
        each = (logits.softmax(1) - prob).square().sum(1)
    unsup = each[inside].mean()
    t = min(count / args.rampup_iters, 1) if args.rampup_iters else 1
    loss = sup + args.consistency_weight * math.exp(-5 * (1 - t) ** 2) * unsup
    conf = prob.amax(1)
    maps = {"student's view": x_u, "confidence": conf, "inside": inside}
    maps |= {"pseudo label": torch.where(inside, prob.argmax(1), 255), "student": logits.argmax(1)}
    return result(loss, {}, maps, sup=sup, unsup=unsup, conf=conf[inside].mean())


# ---- CPS and FPL+CPS ----


def whole_mask(args, number):
    """The masks of the whole batch of a step, whatever the number of processes."""
    rng = np.random.default_rng([args.seed, number])
    masks = [cps_fpl.toggled_mask(rng, args.crop_size) for _ in range(args.batch_size_unlabeled)]
    return torch.stack(masks)


def blend(mask, first, second):
    """first, and second where mask is True: by multiplication."""
    return first * ~mask + second * mask


def cps_fpl_step(nets, state, batch, args, number, images):
    """CPS: both networks teach each other; clean views teach on the mixed one, with CutMix."""
    pair = list(nets.values())
    x_l, label = batch["labeled"]["image"], batch["labeled"]["label"]
    maps = {"image": x_l, "truth": label}
    progress = number / args.total_iters
    if not args.unsup_weight:
        teachers = []
        labeled = [net(x_l)["logits"] for net in pair]
    elif args.cutmix:
        first, second = (batch[name] for name in list(batch)[1:])
        mask = whole_mask(args, number)
        with torch.no_grad():
            views = [[net(view["image"])["logits"] for view in (first, second)] for net in pair]
        teachers = [blend(mask, *view) for view in views]
        mixed = blend(mask, first["image"], second["image"])
        inside = blend(mask[:, 0], first["inside"], second["inside"])
        students = [net(mixed)["logits"] for net in pair]
        labeled = [net(x_l)["logits"] for net in pair]
        maps |= {"mixed": mixed, "its pseudo label": teachers[1].argmax(1)}
    else:  # labelled images teach as well
        labeled = [net(x_l)["logits"] for net in pair]
        others = [net(batch["unlabeled"]["image"])["logits"] for net in pair]
        students = [torch.cat(logits) for logits in zip(labeled, others, strict=True)]
        teachers = [logits.detach() for logits in students]
        inside = torch.cat([batch["labeled"]["inside"], batch["unlabeled"]["inside"]])
    sup = sum(labeled_loss({"logits": logits}, label, args) for logits in labeled)
    loss, parts = sup, {"sup": sup}
    if teachers:
        cross, balance, unsup = cps_cross(students, teachers, inside, progress, args)
        loss = sup + args.unsup_weight * cross  # FPL Eq. (1)
        prob = sampled(torch.cat(teachers)).softmax(1)
        seen = sampled(torch.cat([inside, inside]))
        K = positives(prob, args, progress)
        weight = fuzzy_loss(prob, prob, K, args)[1]
        parts |= {"unsup": unsup, "balance": balance, "K": K[seen].float().mean()}
        parts |= {"K_gt_1": (K[seen] > 1).float().mean(), "weight": weight[seen].mean()}
    prob = sampled(torch.cat(labeled).detach()).softmax(1)
    truth = sampled(torch.cat([label, label]))
    valid = truth != 255
    order = prob.argsort(dim=1, descending=True, stable=True)
    rank = (order == truth[:, None]).int().argmax(1)[valid]
    parts["pseudo_acc"] = (rank == 0).float().mean()
    parts["coverage"] = (rank < positives(prob, args, progress)[valid]).float().mean()
    prob = labeled[1].detach().softmax(1)
    K = positives(prob, args, progress)
    maps |= {"pseudo label": prob.argmax(1), "branch 1": labeled[0].argmax(1)}
    maps |= {"K: 1, 2, 3 or more": (K - 1) / 2, "weight": fuzzy_loss(prob, prob, K, args)[1]}
    return result(loss, {}, maps, **parts)


def cps_cross(students, teachers, inside, progress, args):
    """L12 + L21: what is minimized, the balance, and the sum as it is logged."""
    unsup = ce = 0
    for student, teacher in ((0, 1), (1, 0)):  # network 1 learns from 2, 2 from 1
        logits, prob = students[student], teachers[teacher].softmax(1)
        plain = F.cross_entropy(logits, prob.argmax(1), reduction="none")
        ce = ce + plain[inside].mean()
        if args.unsup_loss == "fpl":
            loss, weight = fuzzy_loss(logits, prob, positives(prob, args, progress), args)
            plain = loss * weight
        elif args.unsup_loss == "soft":
            plain = (prob * (prob.log() - logits.log_softmax(1))).sum(1)
        elif args.unsup_loss == "negative":
            plain = (-torch.log(1 - logits.softmax(1)) * (prob < 0.2)).sum(1)
        unsup = unsup + plain[inside].mean()
    balance = (ce / unsup).detach() if unsup > 0 else torch.tensor(1.0)
    factor = balance if args.balance and args.unsup_loss == "fpl" else 1
    return unsup * factor, balance, unsup


# ---- AEL and FPL+AEL ----


def stream_of(args, count, name, numbers):
    """Returns which of count images the samples of a stream show: rounds, each in a new order."""
    order = [args.seed, zlib.crc32(name.encode()), 0]
    laps = [np.random.default_rng([*order, n // count]).permutation(count) for n in numbers]
    return [int(lap[n % count]) for lap, n in zip(laps, numbers, strict=True)]


def shown(script, args, images, items, stream, numbers, indices, scales, with_label):
    """Returns image, inside and label of samples: each a given image, augmented by its number."""
    found = {"image": [], "inside": [], "label": []}
    for number, index in zip(numbers, indices, strict=True):
        rng = np.random.default_rng([args.seed, zlib.crc32(stream.encode()), 1, number])
        pair = images.read(items[index], with_label)
        image, label, inside = script.augment(*pair, rng, args.crop_size, scales)
        for key, x in zip(found, (image, inside, label), strict=True):
            if x is not None:
                found[key].append(torch.from_numpy(x))
    return {key: torch.stack(parts) for key, parts in found.items() if parts}


def pasted(args, confidence, batch, rng):
    """Adaptive Copy-Paste: the labelled images with what is pasted, pixels by a mask in numpy."""
    classes = [c for c in range(len(confidence)) if c not in args.paste_not]
    score = np.exp([(1 - float(confidence[c])) ** args.paste_power for c in classes])
    u = rng.random((args.batch_size, args.paste_draws + 1))
    ends = np.cumsum(score) / score.sum()
    found = recorder.copied(batch["labeled"])
    for i, (coin, *_) in enumerate(u):
        draws = u[i // args.pooled * args.pooled, 1:]  # one set of classes for a group
        drawn = [classes[int((ends <= x).sum())] for x in draws]
        hit = np.isin(batch["paste"]["label"][i].numpy(), drawn) & (coin < args.paste_prob)
        for key, x in found.items():
            x[i] = torch.where(torch.from_numpy(hit), batch["paste"][key][i], x[i])
    return found


def moved_confidence(logits, label, bank, args):
    """AEL Eq. (4), (7): per class the mean over groups of the mean p of the true class."""
    prob, new = logits.detach().double().softmax(1), bank.double().clone()
    for c in range(len(bank)):
        values = []
        for at in range(0, len(label), args.pooled):
            hit = label[at : at + args.pooled] == c
            if hit.any() or not args.skip_absent:
                p = prob[at : at + args.pooled, c][hit]
                values.append(p.mean().item() if hit.any() else 0.0)
        if values:
            mean = sum(values) / len(values)
            new[c] = args.bank_momentum * bank[c] + (1 - args.bank_momentum) * mean
    return new.float()


def ael_consistency(student, teacher, inside, confidence, pooled, args):
    """AEL Eq. (12), (13), group by group; returns what is minimized and the numbers of the log."""
    prob = teacher.softmax(1)
    conf, pseudo = prob.amax(1), prob.argmax(1)
    gap = 1 - confidence
    rate = (gap / gap.max()) ** args.beta
    keep = torch.rand_like(conf) >= 1 - rate[student.detach().argmax(1)]
    ce = loss = F.cross_entropy(student, pseudo, reduction="none")
    if args.unsup_loss == "fpl":
        loss = torch.mul(*fuzzy_loss(student, prob, positives(prob, args), args))
    minimized, unsup, balance = [], [], []
    for at in range(0, len(student), pooled):
        good = inside[at : at + pooled]
        w, k, plain, cross = (x[at : at + pooled][good] for x in (conf, keep, loss, ce))
        w = w**args.gamma * k
        certain = conf[at : at + pooled][good] >= args.threshold
        unsup.append((w * plain * certain).sum() / w.sum().clamp(min=1e-12))
        total = plain.sum()
        balance.append((cross.sum() / total).detach() if total > 0 else torch.tensor(1.0))
        minimized.append(unsup[-1] * (balance[-1] if args.balance else 1))
    K = positives(sampled(prob), args)[sampled(inside)]
    numbers = {"unsup": sum(unsup) / len(unsup), "balance": sum(balance) / len(balance)}
    numbers |= {"kept": keep[inside].float().mean(), "conf_t": conf[inside].mean()}
    return sum(minimized) / len(minimized), numbers | {"K_gt_1": (K > 1).float().mean()}


def ael_fpl_step(nets, state, batch, args, number, images):
    student, teacher = nets["student"], nets["teacher"]
    B, C, size = args.batch_size_unlabeled, len(state["confidence"]), args.crop_size
    rng = np.random.default_rng([args.seed, number])
    first = batch["unlabeled"]
    classes, indices = state["draws"][0].T.tolist()  # drawn four steps before [D26]
    numbers = range(number * B, number * B + B)
    given = images.unlabeled, "unlabeled.partner", numbers, indices, args.scales, False
    second = shown(ael_fpl, args, images, *given)
    labeled = pasted(args, state["confidence"], batch, rng)
    x_l, label = labeled["image"], labeled["label"]
    out = student(x_l)
    with torch.no_grad():
        on_labels = teacher(x_l)["logits"] if args.consistency_on == "all" else None
        views = teacher(torch.cat([first["image"], second["image"]]))["logits"]
    # banks
    draws = ael_fpl.draw_partners(state["confidence"], state["present"], B, rng)
    new = {"draws": torch.cat([state["draws"][1:], draws[None]])}
    new["confidence"] = moved_confidence(out["logits"], label, state["confidence"], args)
    new["present"] = state["present"].clone()
    seen = sampled(views.argmax(1))
    seen[~sampled(torch.cat([first["inside"], second["inside"]]))] = 255
    rounds = stream_of(args, len(images.unlabeled), "unlabeled", numbers)
    for image, cells in zip(rounds + indices, seen, strict=True):  # partners after first images
        for c in range(C):
            new["present"][c, image] = (cells == c).sum() >= args.bank_area * cells.numel()
    # boxes
    mask, boxes = torch.zeros(B, size, size, dtype=torch.bool), 0
    rngs = np.random.default_rng([args.seed, number]).spawn(B)
    for i, (cells, c, own) in enumerate(zip(seen[B:], classes, rngs, strict=True)):
        box = ael_fpl.component_box(cells.byte().numpy(), c, args.region_area, size, own)
        boxes += box is not None
        top, left, h, w = box or ael_fpl.half_area_box(own, size)
        mask[i, top : top + h, left : left + w] = True
    # losses
    x_u = blend(mask[:, None], first["image"], second["image"])
    inside = blend(mask, first["inside"], second["inside"])
    teachers = torch.where(mask[:, None], views[B:], views[:B])
    logits = student(x_u)["logits"]
    sup = labeled_loss(out, label, args)
    bank = new["confidence"]
    whole, parts = ael_consistency(logits, teachers, inside, bank, 1, args)
    if args.consistency_on == "all":
        given = out["logits"], on_labels, labeled["inside"], bank, args.pooled, args
        more, parts_l = ael_consistency(*given)
        whole = whole + more
        parts["unsup_l"] = parts_l["unsup"]
    loss = sup + args.unsup_weight * whole
    maps = {"labelled, pasted": x_l, "label": label, "mixed": x_u, "box": mask}
    maps |= {"pseudo label": teachers.argmax(1), "student": logits.argmax(1), "weight": None}
    return result(loss, new, maps, sup=sup, **parts, bank=bank.mean(), regions=boxes / B)


# ---- U2PL ----


def pushed_keys(bank, pushed, sizes, keys):
    """Alg. 1: the keys of each class enter its ring, the oldest go."""
    bank, pushed = bank.clone(), pushed.clone()
    starts = [sum(sizes[:c]) for c in range(len(sizes))]
    for c, own in enumerate(keys):
        for key in own:
            bank[starts[c] + int(pushed[c]) % sizes[c]] = key
            pushed[c] += 1
    return bank, pushed


def anchor_contrast(rep_s, rep_t, A_c, bank, pushed, sizes, u, args):
    """U2PL Eq. (4) or (A1): the mean over the classes with an anchor and a key; how many these."""
    M, losses = args.anchors, []
    for c, mask in enumerate(A_c):
        pixels, filled = mask.nonzero()[:, 0], min(int(pushed[c]), sizes[c])
        if not len(pixels) or not filled:
            continue
        z = F.normalize(rep_s[pixels[(u[c, :M] * len(pixels)).long()]], dim=1)
        center = F.normalize(rep_t[pixels].mean(0), dim=0)
        places = (u[c, M:].view(M, args.negatives) * filled).long() + sum(sizes[:c])
        positive = (z @ center)[:, None] / args.tau
        negative = (z[:, None] * bank[places].float()).sum(2) / args.tau
        if args.unreliable_loss == "contrastive":
            each = torch.cat([positive, negative], 1).logsumexp(1) - positive[:, 0]
        else:
            each = F.softplus(negative - positive).mean(1)
        losses.append(each.mean())
    return sum(losses) / max(len(losses), 1), len(losses)


def u2pl_step(nets, state, batch, args, number, images):
    student, teacher = nets["student"], nets["teacher"]
    x_l, y_l = batch["labeled"]["image"], batch["labeled"]["label"]
    n, count, C = len(x_l), number - args.warmup_iters, images.num_classes
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
    p = out_t["logits"][n:].softmax(1)
    H = torch.special.entr(p).sum(1)
    t = math.floor(args.epochs * number / args.total_iters) if args.dpa else 0
    alpha = args.alpha_0 * (1 - t / args.epochs)
    shares = [100 * (1 - alpha), 100 * alpha]
    gamma, lower = (
        np.percentile(H[inside].double().numpy(), shares) if inside.any() else [math.inf] * 2
    )
    y_u = torch.where(H < np.float32(gamma), pseudo, 255)
    weight = args.eta * int(inside.sum()) / max(int((y_u != 255).sum()), 1)
    nll = F.cross_entropy(out["logits"][n:], y_u, ignore_index=255, reduction="none")
    unsup = nll.sum() / max(int((y_u != 255).sum()), 1)
    sup = labeled_loss({name: x[:n] for name, x in out.items()}, y_l, args)
    contrast, classes, new = 0.0, 0, state
    if args.unreliable_loss != "none":
        H_classes = {"unreliable": H > np.float32(gamma), "reliable": H < np.float32(lower)}
        chosen = H_classes.get(args.negatives_from, inside) & inside
        contrast, classes, new = u2pl_contrast(state, out, out_t, y_l, y_u, chosen, C, args)
    loss = sup + weight * unsup + args.contrast_weight * contrast  # Eq. (1)
    maps = {"student's view": x_u, "pseudo label": pseudo, "reliable": y_u}
    maps |= {"entropy": H / math.log(C), "student": out["logits"][n:].argmax(1)}
    values = unsup, weight, contrast, classes, H[inside].mean() if inside.any() else 0.0
    return result(loss, new, maps, sup=sup, **dict(zip(names, values, strict=True)))


def u2pl_contrast(state, out, out_t, y_l, y_u, chosen, C, args):
    """Eq. (9) to (16) and Alg. 1: masks of anchors and negatives, the bank, the loss."""
    h, w = out["rep"].shape[2:]
    rows, columns = torch.arange(h) * 32 // h, torch.arange(w) * 32 // w
    label = torch.cat([y_l, y_u])[:, rows[:, None], columns].flatten()
    candidate = torch.cat([torch.zeros_like(y_l, dtype=torch.bool), chosen])
    candidate = candidate[:, rows[:, None], columns].flatten()
    unlabeled = torch.arange(len(label)) >= len(label) // 2
    prob, rep_s, rep_t = (
        x.movedim(1, -1).flatten(0, 2)
        for x in (out_t["coarse"].softmax(1), out["rep"].float(), out_t["rep"].float())
    )
    rank = prob.argsort(dim=1, descending=True, stable=True).argsort(1)
    own = label[:, None] == torch.arange(C)
    r_l, r_h = min(args.ranks[0], C - 1), min(args.ranks[1], C)
    A_c = (own & (prob > args.delta_p)).T
    of_labeled = ~own & (label != 255)[:, None] & (rank < r_l) & ~unlabeled[:, None]
    N_c = (of_labeled | candidate[:, None] & (r_l <= rank) & (rank < r_h)).T
    u = torch.rand(C, args.keys + 1, dtype=torch.float64)
    v = torch.rand(C, args.anchors * (args.negatives + 1), dtype=torch.float64)
    drawn = [
        oracle.keys(mask, chances) for mask, chances in zip(N_c.tolist(), u.tolist(), strict=True)
    ]
    keys = [F.normalize(rep_t[pixels], dim=1) for pixels in drawn]
    sizes = [args.bank_sizes[0]] + [args.bank_sizes[1]] * (C - 1)
    pushed = state["pushed"] if args.bank else torch.zeros_like(state["pushed"])
    bank, pushed = pushed_keys(state["bank"], pushed, sizes, keys)
    contrast, classes = anchor_contrast(rep_s, rep_t, A_c, bank, pushed, sizes, v, args)
    return contrast, classes, {"bank": bank, "pushed": pushed}


# ---- ESL ----


def nearest_of(count, full):
    """The nearest of `full` pixels to each of `count`, corners on corners; halves go up."""
    return torch.tensor(
        [(2 * i * (full - 1) + count - 1) // (2 * (count - 1)) for i in range(count)]
    )


def aligned(x, size):
    """(B, M, N) at (m, n) of its pixels."""
    rows, columns = (nearest_of(m, M) for m, M in zip(size, x.shape[1:], strict=True))
    return x[:, rows[:, None], columns]


def esl_step(nets, state, batch, args, number, images):
    student, teacher = nets["student"], nets["teacher"]
    x_l, y_l = batch["labeled"]["image"], batch["labeled"]["label"]
    clean, inside = batch["unlabeled"]["image"], batch["unlabeled"]["inside"]
    n, new = len(x_l), {}
    none = images.num_classes * args.parts
    teacher.eval()
    teacher.head.training = args.contrast  # it returns its features; BN and dropout as they are
    if args.contrast and number == 0:  # K-means before the teacher has seen anything
        group = run.Group(0, 1, torch.device("cpu"))
        first = esl.first_prototypes(teacher, images, teacher.head.width, args, group)
        state = state | {"prototypes": first}
    with torch.no_grad():
        out_t = teacher(torch.cat([x_l, clean]) if args.contrast else clean)
    prob = out_t["logits"][-len(clean) :].softmax(1)
    ids = []
    if args.contrast:
        label = torch.cat([y_l, torch.where(inside, prob.argmax(1), 255)])
        ids, new, present = esl_parts(out_t, label, state, args, none)
    x_u, target, sure, *ids_u = mixed_pairs(
        esl, args, number, clean, prob, inside, *([ids[n:]] if args.contrast else [])
    )
    # Eq. (2) to (6)
    out = student(torch.cat([x_l, x_u]))
    y_u = esl.soft_label(target, args)
    area = max(int(sure.sum()), 1)
    each = -(y_u * out["logits"][n:].log_softmax(1)).sum(1)
    unsup = (each * sure).sum() / area
    sup = labeled_loss({name: x[:n] for name, x in out.items()}, y_l, args)
    conf, dominant = target.amax(1), (y_u > 0).sum(1)
    maps = {"student's view": x_u, "pseudo label": torch.where(sure, y_u.argmax(1), -1)}
    maps |= {"1 - 1/classes": 1 - 1 / dominant, "student": out["logits"][n:].argmax(1)}
    contrast = anchors = present_parts = 0
    if args.contrast:
        maps["parts"] = None
        chosen = ids_u[0].masked_fill(~(conf > args.zeta), none)  # Eq. (9)
        ids = torch.cat([ids[:n], chosen])
        contrast, anchors = esl.part_contrast(out["rep"], ids, new, args)
        present_parts = present
    loss = sup + args.unsup_weight * unsup + args.contrast_weight * contrast  # Eq. (11)
    parts = dict(sup=sup, unsup=unsup, contrast=contrast, anchors=anchors, parts=present_parts)
    parts |= dict(dominant=(dominant * sure).sum() / area, conf=(conf * sure).sum() / area)
    return result(loss, new, maps, **parts)


def esl_parts(out_t, label, state, args, none):
    """Eq. (7), (8), (12): parts of the pixels, a key of each part and image, the prototypes."""
    E, rep, P = out_t["encoder"].float(), out_t["rep"].float(), state["prototypes"]
    cells = torch.arange(E[0, 0].numel()).view(1, *E.shape[2:])
    cells = aligned(cells, label.shape[1:]).expand_as(label)
    features = torch.stack([e.flatten(1).T[c] for e, c in zip(E, cells, strict=True)])
    known = label != 255
    of_class = F.normalize(P, dim=2)[torch.where(known, label, 0)]
    k = (of_class * features[..., None, :]).sum(-1).argmax(-1)
    ids = torch.where(known, label * args.parts + k, none)
    small, coarse = aligned(ids, rep.shape[2:]), aligned(ids, E.shape[2:])
    keys = [[] for _ in range(none)]
    prototypes, present = P.flatten(0, 1).clone(), 0
    for r in range(none):
        for one, where in zip(rep, small == r, strict=True):
            if where.any():
                keys[r].append(F.normalize(one[:, where].mean(1), dim=0))
        own = E.movedim(1, -1)[coarse == r]
        if len(own):
            present += 1
            prototypes[r] = args.theta * prototypes[r] + (1 - args.theta) * own.mean(0)
    bank, pushed = pushed_keys(state["bank"], state["pushed"], [args.queue] * none, keys)
    return ids, {"prototypes": prototypes.view_as(P), "bank": bank, "pushed": pushed}, present


LITERAL = {name: globals()[f"{name}_step"] for name in tiny.SCRIPTS}


# ---- the comparison ----


def assert_close(mine, theirs, rel):
    """Every tensor equals its namesake up to rel of its largest number."""
    assert mine.keys() == theirs.keys()
    for name, x in mine.items():
        scale = theirs[name].double().abs().max().item()
        distance = (x.double() - theirs[name].double()).abs().max().item()
        assert distance <= rel * scale, f"{name}: {distance} of {scale}"


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


def same_maps(seen, maps):
    """The maps of a panel; None: a map that is looked at elsewhere."""
    assert seen.keys() == maps.keys()
    for name, x in maps.items():
        if x is not None and x.is_floating_point():
            assert torch.allclose(seen[name], x, atol=1e-5), name
        elif x is not None:
            assert torch.equal(seen[name], x), name


def compared(name, argv, monkeypatch):
    """Makes a recorded run and compares each of its steps; returns flags and what was found."""
    script = tiny.script(name)
    with monkeypatch.context() as patch:
        tiny.shrink(script, patch)
        found = recorder.watch(patch, script, argv)
    args = tiny.resolved(script, argv)
    images, nets, state, momentum, passes = script.load(args), found.networks, found.state, {}, []
    recorder.listen(nets, lambda: passes)
    trained = [key for key in nets if key != "teacher"]
    assert len(found.steps) == args.total_iters
    for number, step in enumerate(found.steps):
        passes.clear()
        torch.manual_seed((args.seed * 1_000_003 + number) * 1024)  # dropout, all draws
        literal = LITERAL[name](nets, state, step.batch, args, number, images)
        # what was seen, by which network, in which mode and order: bit for bit
        assert len(step.seen) == len(passes)
        for entry, twin in zip(step.seen, passes, strict=True):
            assert entry.keys() == twin.keys()
            for key, x in entry.items():
                same = torch.equal(x, twin[key]) if torch.is_tensor(x) else x == twin[key]
                assert same, (number, entry["net"], key)
        literal.loss.backward()
        assert step.attached == []
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
        assert step.state.keys() == literal.state.keys()
        for key, x in literal.state.items():
            assert step.state[key].dtype == x.dtype
            if x.is_floating_point():
                assert torch.allclose(step.state[key], x, rtol=1e-5, atol=1e-5), (number, key)
            else:
                assert torch.equal(step.state[key], x), (number, key)
        if step.maps:
            same_maps(step.maps, literal.maps)
        for key, net in nets.items():  # no rounding is carried on
            net.load_state_dict(step.nets[key])
        state = step.state
    return args, found


CPS = "--unsup-weight 2.5 " + HAND + UNEVEN
AEL = UNEVEN + HAND + "--unsup-weight 2.5 --seed 3 --lr 0.05 --bank-momentum 0.7 "
AEL += "--bank-area 0.08 --region-area 0.02 "  # 6 and more than 1 cell of 64
U2PL = tiny.MORE["u2pl"] + " --scales 0.5 1.5 " + HAND
ESL = tiny.MORE["esl"] + " --scales 0.5 1.5 " + HAND
ROWS = {
    "supervised": {"": "", "ohem": "--ohem-kept 0.2 --aux-weight 0.4 --decay-on weights"},
    "mean_teacher": {
        "cutmix": "--cutmix --warmup-iters 1 --cutmix-prob 0.7 --consistency-weight 1.5",
        "squares": "--consistency mse --rampup-iters 4 --teacher-bn average --ema-decay 0.6",
        "plain": "--warmup-iters 0 --aux-weight 0.4 " + UNEVEN,
    },
    "cps_fpl": {
        "ce": "--unsup-loss ce",
        "fpl": "",
        "same image": "--same-image-cutmix --seed 3",
        "official": "--recipe official --T 0.5",
        "ce, plain": "--unsup-loss ce --no-cutmix",
        "official, plain": "--no-cutmix --recipe official --T 0.5",
        "mean over positives": "--no-cutmix --recipe official --mean-over positives --T 0.3",
        "labels": "--unsup-weight 0",
        "labels, plain": "--unsup-weight 0 --no-cutmix",
        "soft": "--unsup-loss soft --balance True",
        "negative": "--unsup-loss negative",
        "negative, plain": "--unsup-loss negative --no-cutmix --balance True",
        "n": "--k-strategy n --T 0.3 --balance True --weight none",
        "2": "--k-strategy fixed2 --weight linear",
        "thirds": "--k-strategy step --weight convex",
        "capped": "--recipe official --balance False --k-max 2 --strict True --ohem-kept 0.2",
    },
    "ael_fpl": {
        "fpl": "--T 0.2 --ema-decay 0.6",
        "ce": "--unsup-loss ce --skip-absent --beta 0.5 --gamma 1 --threshold 0.12",
        "official": "--recipe official --T 0.3",
        "official ce": "--recipe official --unsup-loss ce --pooled 4 --teacher-mode eval",
        "all": "--consistency-on all --pooled 1 --ohem-kept 0.2 --decay-on weights",
        "few pasted": "--paste-draws 1 --paste-prob 0.5 --paste-power 2 --paste-not 3 4",
        "none pasted": "--paste-draws 0 --aux-weight 0.4 --paste-scales 0.2 0.4",
    },
    "u2pl": {
        "paper": "",
        "binary": "--unreliable-loss binary",
        "none": "--unreliable-loss none",
        "reliable": "--negatives-from reliable --no-dpa --alpha-0 0.4",
        "all": "--negatives-from all --ranks 1 20",
        "no bank": "--no-bank --ranks 1 3",
        "no DPA": "--no-dpa --alpha-0 0.4 --no-cutmix",
        "hot": "--tau 0.01 --delta-p 0.05 --eta 2 --contrast-weight 1",
        "other": "--seed 5 --cutmix-prob 1 --aux-weight 0.4 --epochs 5 --alpha-0 0.5",
    },
    "esl": {
        "paper": "",
        "hard": "--label hard",
        "soft": "--label soft --no-contrast",
        "topk": "--label topk --top-k 2 --theta 0.5",
        "eta": "--eta 0.5 --unsup-weight 1 --contrast-weight 2 --aux-weight 0.4",
        "no CutMix": "--no-cutmix --parts 1",
        "other": "--seed 5 --cutmix-prob 0.5",
    },
}
SHARED = {"cps_fpl": CPS, "ael_fpl": AEL, "u2pl": U2PL, "esl": ESL}
NUMBERS = {"ael_fpl": dict(iters=6, batch=4), "u2pl": dict(iters=6), "cps_fpl": dict(iters=3)}


def sight_of_cps(args, found):
    if args.unsup_weight and not args.cutmix:  # padding occurs, and void that is inside
        assert not all(step.batch["unlabeled"]["inside"].all() for step in found.steps)
    if args.unsup_weight and args.unsup_loss == "fpl" and args.k_strategy == "n-1":
        assert all(step.parts["K_gt_1"] > 0 for step in found.steps)


def sight_of_ael(args, found):
    parts = [step.parts for step in found.steps]
    present = [step.state["present"] for step in found.steps]
    assert sum(int(x.any() and not x.all()) for x in present) >= 5  # it tells images apart
    assert any(0 < part["kept"] < 1 for part in parts) and any(part["regions"] for part in parts)
    assert all((part["balance"] == 1) == (args.unsup_loss == "ce") for part in parts)


def sight_of_u2pl(args, found):
    counted = [step.parts["classes"] for step in found.steps[2:]]
    assert any(count > 1 for count in counted) == (args.unreliable_loss != "none")
    for step in found.steps:  # L_c reaches the head's features, and nothing else does
        slopes = [x.any() for key, x in step.grads.items() if ".represent." in key]
        assert len(slopes) == 2 and any(slopes) == (step.parts["classes"] > 0)


def sight_of_esl(args, found):
    assert all((step.parts["anchors"] > 0) == args.contrast for step in found.steps)
    assert all((step.parts["contrast"] > 0) == args.contrast for step in found.steps)


SIGHT = dict(cps_fpl=sight_of_cps, ael_fpl=sight_of_ael, u2pl=sight_of_u2pl, esl=sight_of_esl)


def marked(name, row):
    """The first row of each script runs on the oldest versions too."""
    marks = [pytest.mark.smoke] if row == next(iter(ROWS[name])) else []
    return pytest.param(name, row, marks=marks)


@pytest.mark.parametrize("name, row", [marked(name, row) for name in ROWS for row in ROWS[name]])
def test_every_step_is_the_literal_one(name, row, tree, tmp_path, monkeypatch):
    numbers = dict(log=1, iters=4, evaluate=2, save=9, pictures=3) | NUMBERS.get(name, {})
    argv = tiny.flags(tree, tmp_path / "run", **numbers)
    argv += f"{SHARED.get(name, HAND)} {ROWS[name][row]}".split()
    args, found = compared(name, argv, monkeypatch)
    SIGHT.get(name, lambda *_: None)(args, found)


FEW = {
    "supervised": [""],
    "mean_teacher": ["--cutmix --warmup-iters 1"],
    "cps_fpl": ["", "--recipe official --no-cutmix", "--k-strategy fixed3", "--k-strategy n"],
    "ael_fpl": [
        f"--recipe {r} --unsup-loss {x}" for r in ("paper", "official") for x in ("fpl", "ce")
    ],
    "u2pl": [tiny.MORE["u2pl"]],
    "esl": [tiny.MORE["esl"]],
}
FEW["cps_fpl"] += ["--unsup-loss soft", "--unsup-loss negative"]
SURE = {("u2pl", 2): "--delta-p 0.3", ("u2pl", 81): "--delta-p 0.005"}
SURE |= {("esl", 2): "--zeta 0.5", ("esl", 81): "--zeta 0.01"}


@pytest.mark.parametrize("classes", [2, 81])
@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_steps_of_2_and_of_81_classes_are_the_literal_ones(name, classes, tmp_path, monkeypatch):
    root = tiny.draw_folder(tmp_path / "data", classes)
    for turn, words in enumerate(FEW[name]):
        out = tmp_path / str(turn)
        iters = 4 if name == "u2pl" else 2
        numbers = dict(iters=iters, log=1, evaluate=9, save=9, pictures=2, batch=4)
        argv = tiny.own_folder(root, out, classes, **numbers)
        _, found = compared(
            name, argv + f"{words} {SURE.get((name, classes), '')}".split(), monkeypatch
        )
        assert all(math.isfinite(x) for step in found.steps for x in step.parts.values())
        done = runs.log(out)[-1]
        assert done["kind"] == "done" and len(done["best"]["iou"]) == classes
        last = found.steps[-1].parts
        assert name not in ("u2pl", "esl") or last["contrast"] > 0
        if name == "cps_fpl" and classes == 2 and "fixed3" in words:
            # every class is a positive: nothing to learn
            assert (last["K"], last["unsup"], last["loss"]) == (2, 0, last["sup"])
        elif name == "cps_fpl" and classes == 2 and "strategy" not in words:
            assert (last["K"], last["K_gt_1"]) == (1, 0)
        elif name == "cps_fpl" and classes == 81 and ("n" in words.split() or not words):
            assert last["K"] > 50  # nothing is known: K takes nearly all of T
        elif name == "ael_fpl" and classes == 2:  # FPL is cross-entropy with a weight
            assert last["K_gt_1"] == 0


def test_an_image_that_comes_twice_is_remembered_as_it_was_seen_last(tree, tmp_path, monkeypatch):
    """AEL's image bank: six views of two unlabelled images in every step."""
    (tmp_path / "one.txt").write_text("train/train0.jpg\ntrain/train4.jpg\n")
    (tmp_path / "two.txt").write_text("train/train1.jpg\ntrain/train2.jpg\n")
    argv = tiny.flags(tree, tmp_path / "run", log=1, iters=6, batch=4)
    argv = [word for word in argv if word not in ("--split", "1/4")]
    for kind, name in (("labeled", "one"), ("unlabeled", "two")):
        argv += [f"--{kind}-list", str(tmp_path / f"{name}.txt")]
    _, found = compared(
        "ael_fpl", [*argv, *f"{UNEVEN} --lr 0.1 --bank-area 0.1".split()], monkeypatch
    )
    views = [
        entry["logits"] for step in found.steps for entry in step.seen if len(entry["image"]) == 6
    ]
    shows = [sampled(view).argmax(1).flatten(1) for view in views]
    assert any(len(view.unique(dim=0)) > 2 for view in shows)  # views of one image differed


@pytest.mark.smoke
@pytest.mark.parametrize("name", [*tiny.SCRIPTS, "same image"])
def test_the_streams_are_rounds_of_images_each_at_its_scales(name, tree, tmp_path, monkeypatch):
    """Sample numbers alone decide; "unlabeled.2" has the images of "unlabeled", its own crops."""
    words = ["--seed", "2", *(["--same-image-cutmix"] if name == "same image" else [])]
    name = "cps_fpl" if name == "same image" else name
    words += ["--paste-scales", "0.2", "0.4"] if name == "ael_fpl" else []
    script = tiny.script(name)
    argv = tiny.flags(tree, tmp_path / "run", iters=4, batch=4) + words
    with monkeypatch.context() as patch:
        tiny.shrink(script, patch)
        found = recorder.watch(patch, script, argv)
    args = tiny.resolved(script, argv)
    images = script.load(args)
    kinds = {"supervised": ["labeled"], "ael_fpl": ["labeled", "paste", "unlabeled"]}
    kinds["cps_fpl"] = ["labeled", "unlabeled", "partner"]
    if "--same-image-cutmix" in words:
        kinds["cps_fpl"][2] = "unlabeled.2"
    for number, step in enumerate(found.steps):
        assert list(step.batch) == kinds.get(name, ["labeled", "unlabeled"])
        for stream, batch in step.batch.items():
            items = images.labeled if stream in ("labeled", "paste") else images.unlabeled
            numbers = range(number * 4, number * 4 + 4)
            indices = stream_of(args, len(items), stream.split(".")[0], numbers)
            scales = (0.2, 0.4) if stream == "paste" else args.scales
            given = items, stream, numbers, indices, scales, items is images.labeled
            expected = shown(script, args, images, *given)
            assert batch.keys() == expected.keys()  # no label of an unlabelled image
            for key, x in expected.items():
                assert torch.equal(batch[key], x), (number, stream, key)
