"""The confusion matrix and what follows from it."""

import torch


def confusion_matrix(pred, label, num_classes):
    """Returns the (C, C) int64 counts of (true class, predicted class) over pixels with label < C.

    pred: int64 of any shape, values in [0, C). label: same shape, ignored where it is >= C.
    """
    truth = label.clamp(max=num_classes).long()  # no class: one more row, that is left out
    index = (truth * num_classes + pred).flatten()
    counts = torch.bincount(index, minlength=(num_classes + 1) * num_classes)
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
        "miou": float(iou.nanmean()) if bool((~iou.isnan()).any()) else 0.0,
        "accuracy": float(confusion.diag().sum() / pixels),
        "constant": float(truth.max() / pixels / max(int((truth > 0).sum()), 1)),
        "iou": [None if x != x else round(x, 6) for x in iou.tolist()],
        "confusion": confusion.tolist(),
    }
