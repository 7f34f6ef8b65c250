"""Figures that others reported: the paper's own, and those that it quotes. None of them was measured here."""

from __future__ import annotations

from dgate_rt.experiments.experiment import Table

AS_REPORTED = "as reported"
_COLUMNS = ("Model", "Accuracy", "FLOPs (G)", "FLOPs reduction", "ms", "Speed-up")
RESNET_101 = Table(
    "ResNet-101 on CIFAR-10, the paper's Table 1 (one Titan Xp)",
    _COLUMNS,
    (
        ("dg(1.0, 0.6, 1.5)", "91.99%", "2.22", "55.77%", "6.39", "55.71%"),
        ("dg(1.0, 1.8, 1.5)", "92.97%", "2.82", "43.82%", "8.18", "43.31%"),
        ("dg(1.5, 1.7, 1.0)", "93.99%", "3.20", "36.25%", "9.24", "35.96%"),
        ("dg(2.4, 2.4, 1.5)", "94.70%", "3.93", "21.71%", "11.23", "22.17%"),
        ("original", "94.71%", "5.02", "–", "14.43", "–"),
    ),
    AS_REPORTED,
)
DENSENET_201 = Table(
    "DenseNet-201 on CIFAR-10, what the paper's text says of its Table 2",
    ("Model", "Accuracy", "FLOPs", "Speed-up"),
    (
        ("no meaningful drop", "–", "460 MFLOPs fewer", "28%"),
        ("dg(1.1, 1.7, 1.0)", "about 2 points lower", "39% fewer", "2 times; 55% in the abstract"),
    ),
    AS_REPORTED,
)
IMAGENET = Table(
    "ResNet-101 on ImageNet, section 3.4 of the paper",
    ("Method", "Top-1 accuracy", "FLOPs (G)", "FLOPs reduction"),
    (
        ("ResNet-101", "76.4%", "15.6", "–"),
        ("ACT", "75.3%", "13.4", "14.1%"),
        ("SACT", "75.8%", "14.4", "7.7%"),
        ("BlockDrop", "76.8%", "14.7", "5.7%"),
        ("decision gates", "76.8%", "14.1", "9.6%"),
    ),
    f"{AS_REPORTED}; the reductions of ACT and SACT follow from their FLOPs. Ours, where ImageNet lies as folders of "
    "images: dgate experiment points --data folder --root IMAGENET --backbone resnet101 -o results/. That network has "
    "the CIFAR stem, so its FLOPs are more than 15.6 G; shares can be compared, FLOPs cannot.",
)
TABLES = (RESNET_101, DENSENET_201, IMAGENET)
