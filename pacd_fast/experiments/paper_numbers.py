"""What the papers print, to stand beside what is measured (Mehra et al. 2021)."""

from __future__ import annotations

# Tables 2 to 4: (clean, watermarked, poisoned) ACR and ACA in per cent, by data and sigma.
RADIUS_TABLES = {
    "gaussian": {
        ("mnist", 0.25): ((0.896, 98.92), (0.908, 99.24), (0.325, 71.96)),
        ("mnist", 0.5): ((1.481, 99.16), (1.514, 99.12), (0.733, 90.68)),
        ("mnist", 0.75): ((1.549, 98.48), (1.566, 98.36), (0.698, 84.92)),
        ("cifar10", 0.25): ((0.521, 85.76), (0.470, 83.22), (0.059, 26.84)),
        ("cifar10", 0.5): ((0.634, 75.04), (0.611, 74.01), (0.221, 42.28)),
    },
    "macer": {
        ("mnist", 0.25): ((0.915, 99.64), (0.894, 98.84), (0.431, 79.81)),
        ("mnist", 0.5): ((1.484, 98.56), (1.475, 98.68), (0.685, 84.36)),
        ("mnist", 0.75): ((1.353, 93.81), (1.415, 94.52), (1.008, 88.41)),
        ("cifar10", 0.25): ((0.593, 83.84), (0.486, 77.01), (0.379, 72.41)),
        ("cifar10", 0.5): ((0.759, 72.92), (0.811, 75.66), (0.521, 65.24)),
    },
    "smoothadv": {
        ("mnist", 0.25): ((0.896, 99.16), (0.906, 99.28), (0.672, 93.21)),
        ("mnist", 0.5): ((1.408, 99.21), (1.401, 98.01), (1.037, 93.81)),
        ("mnist", 0.75): ((1.262, 95.68), (1.433, 97.21), (0.924, 88.88)),
        ("cifar10", 0.25): ((0.504, 78.76), (0.441, 70.16), (0.271, 55.78)),
        ("cifar10", 0.5): ((0.479, 65.84), (0.473, 62.51), (0.277, 49.11)),
    },
}

# The standard deviations of the clean ACR and ACA in tables 2 to 4.
CLEAN_DEVIATIONS = {
    "mnist": {
        ("gaussian", 0.25): (0.01, 0.32), ("gaussian", 0.5): (0.02, 0.34), ("gaussian", 0.75): (0.11, 0.35),
        ("macer", 0.25): (0.01, 0.21), ("macer", 0.5): (0.11, 0.41), ("macer", 0.75): (0.13, 2.08),
        ("smoothadv", 0.25): (0.01, 0.45), ("smoothadv", 0.5): (0.05, 0.25), ("smoothadv", 0.75): (0.05, 0.47),
    },
    "cifar10": {
        ("gaussian", 0.25): (0.05, 3.31), ("gaussian", 0.5): (0.04, 1.65),
        ("macer", 0.25): (0.05, 2.26), ("macer", 0.5): (0.11, 5.06),
        ("smoothadv", 0.25): (0.02, 0.81), ("smoothadv", 0.5): (0.07, 4.81),
    },
}  # fmt: skip

# Table 1: base accuracy of the target class in per cent, clean and poisoned by the standard attack.
STANDARD_POISON = {
    "mnist": {
        "standard": (99.28, 60.08), "gaussian": (98.99, 98.31), "smoothadv": (99.18, 99.31), "macer": (99.21, 98.31),
    },
    "cifar10": {
        "standard": (92.71, 0.36), "gaussian": (88.84, 88.38), "smoothadv": (79.48, 74.95), "macer": (87.12, 88.54),
    },
}  # fmt: skip

# Figure 3, as far as other tables print it: ACR by epsilon.
EPSILON = {0.0: "0.896", 0.1: "0.325"}

# Table 5: the l2 distortion that PGD needs, clean and poisoned.
DISTORTION = {
    ("mnist", 0.25): (3.271, 1.339), ("mnist", 0.5): (3.637, 2.170), ("mnist", 0.75): (3.961, 2.213),
    ("cifar10", 0.25): (1.754, 0.132), ("cifar10", 0.5): (1.996, 0.367),
}  # fmt: skip

# Table 6: ACR and ACA in per cent, clean and poisoned, by sigma.
GAUSSIANS = {0.25: (0.4047, 90.0, 0.3585, 88.0), 0.5: (0.4139, 90.0, 0.3587, 87.6), 0.75: (0.4123, 90.0, 0.3544, 87.6)}

# Table 7: ACR clean and poisoned by weight decay, without and with Gaussian augmentation.
WEIGHT_DECAY = {
    "standard": {0.0: (0.95, 0.01), 1e-4: (0.89, 0.03), 1e-2: (0.87, 0.37), 1e-1: (0.82, 0.68)},
    "gaussian": {0.0: (1.48, 0.73), 1e-4: (1.49, 0.62), 1e-2: (1.29, 0.58), 1e-1: (0.85, 0.72)},
}

# D.6: the mean radius of single birds, clean and with 1 % of poison.
SINGLE_TARGETS = (0.63, 0.26)
