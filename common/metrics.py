"""The confusion matrix and what follows from it."""

import numpy as np
import torch
from scipy import ndimage


def confusion_matrix(pred, label, num_classes):
    """Returns the (C, C) int64 counts of (true class, predicted class) over pixels with label < C.

    pred: int64 of any shape, values in [0, C). label: same shape, ignored where it is >= C.
    """
    index = label.clamp(max=num_classes).long()  # no class: one more row, that is left out
    index.mul_(num_classes).add_(pred)  # in place: one map of int64, not three
    counts = torch.bincount(index.flatten(), minlength=(num_classes + 1) * num_classes)
    return counts.view(num_classes + 1, num_classes)[:num_classes]


def iou_per_class(confusion):
    """Returns (C,) float64 intersection / union in [0, 1]; NaN for a class without any pixel."""
    m = confusion.double()
    hit = m.diag()
    return hit / (m.sum(0) + m.sum(1) - hit)


def scores(confusion):
    """Returns miou (mean over classes present), accuracy, constant, iou (list, None if absent).

    constant is the mIoU of the best constant prediction: the largest class frequency over the
    number of classes that occur in the labels. confusion: the counts, a row a true class.
    """
    iou = iou_per_class(confusion)
    truth = confusion.sum(1).double()
    pixels = truth.sum().clamp(min=1)
    return {
        "miou": float(iou.nanmean().nan_to_num()),
        "accuracy": float(confusion.diag().sum() / pixels),
        "constant": float(truth.max() / pixels / max(int((truth > 0).sum()), 1)),
        "iou": [None if x != x else round(x, 6) for x in iou.tolist()],
        "confusion": confusion.tolist(),
    }


# ---- boundaries ----


def boundary_confusion(pred, label, num_classes, share=0.02):
    """Returns the (C + 1, C + 1) int64 counts of Boundary IoU (Cheng et al., CVPR 2021).

    As confusion_matrix has them, of the pixels near a boundary of their own class: at most share of
    the image's diagonal from another class or the image's edge, in rows and in columns. Class C is
    "not near", in truth or prediction; its row and column are counted for the unions of the others.
    pred, label: (H, W) arrays of integers; label >= C: not counted, a class of its own for the
    boundaries of both. iou_per_class gives the IoU, summed over images or not.
    """
    width = max(round(share * np.hypot(*label.shape)), 1)
    counted = label < num_classes
    truth = near_boundary(label.astype(np.int16), width, num_classes)
    found = near_boundary(np.where(counted, pred, label).astype(np.int16), width, num_classes)
    truth[~counted] = num_classes + 1
    found[~counted] = num_classes
    pair = [torch.from_numpy(classes.astype(np.int64)) for classes in (found, truth)]
    return confusion_matrix(*pair, num_classes + 1)


def near_boundary(classes, width, far):
    """Returns classes, (H, W) int16, with far where no other class and no edge is within width."""
    size = 2 * width + 1
    least = ndimage.minimum_filter(classes, size, mode="constant", cval=-1)
    most = ndimage.maximum_filter(classes, size, mode="constant", cval=-1)
    return np.where(least == most, far, classes)
