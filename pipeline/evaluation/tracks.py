"""The models of each track, and which of them are compared."""

MODELS = {
    "baselines": ("simple_cnn", "resnet18"),
    "distillation": ("teacher", "student_distilled", "student_alone"),
}
COMPARISONS = {  # the track's question comes first
    "baselines": (("resnet18", "simple_cnn"),),
    "distillation": (
        ("student_distilled", "student_alone"),
        ("teacher", "student_distilled"),
        ("teacher", "student_alone"),
    ),
}
