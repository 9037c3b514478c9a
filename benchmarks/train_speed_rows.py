"""The rows of `train_speed.py`: recipe settings, and features of the loop that a row switches off."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

QUICK = ("prune.criterion=magnitude", "prune.calibration=0", "prune.events=1", "prune.first=none", "prune.ramp=1e-9")
LOGITS = ("prune.loss.hidden=0.0",)
BF16 = ("precision=bf16",)
DENSE = ("sparse_products=false",)
PUBLISHED = ("unfused", "masks every step", "torch products")

# name: (recipe, stage, --set assignments, what is patched)
ROWS: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "published": ("reference", "prune", DENSE, PUBLISHED),
    "fp32": ("default", "prune", (), ()),
    "fp32, dense products": ("default", "prune", DENSE, ()),
    "bf16": ("default", "prune", ("precision=bf16",), ()),
    "fp32, teacher stage": ("default", "teacher", (), ()),
    "fp32, finetune stage": ("default", "finetune", (), ()),
    "fp32, teacher looks at each batch": ("default", "prune", (), ("teacher looks",)),
    "bf16, teacher looks at each batch": ("default", "prune", ("precision=bf16",), ("teacher looks",)),
    "fp32, logits alone": ("default", "prune", LOGITS, ()),
    "fp32, logits alone, teacher looks at each batch": ("default", "prune", LOGITS, ("teacher looks",)),
    "fp32, layers and head alone": ("default", "prune", ("prune.train=layers+head",), ()),
    "fp32 without bucketing": ("default", "prune", (), ("random order",)),
    "fp32 padded to max_length": ("default", "prune", ("bucketing=false",), ()),
    "fp32, AdamW unfused": ("default", "prune", (), ("unfused",)),
    "fp32, attention maps kept": ("default", "prune", (), ("attention maps",)),
    "fp32, torch's products": ("default", "prune", DENSE, ("torch products",)),
    "fp32, masks after every step": ("default", "prune", (), ("masks every step",)),
    "fp32, sdpa": ("default", "prune", (), ("sdpa",)),
    "bf16, sdpa": ("default", "prune", ("precision=bf16",), ("sdpa",)),
    "fp32, with a sync in every step": ("default", "prune", (), ("sync",)),
    "bf16, with a sync in every step": ("default", "prune", BF16, ("sync",)),
    "bf16, compiled": ("default", "prune", (*BF16, "compile=true"), ()),
    "bf16, no prefetching": ("default", "prune", BF16, ("no prefetching",)),
    "bf16, AdamW unfused": ("default", "prune", BF16, ("unfused",)),
    "bf16, masks after every step": ("default", "prune", BF16, ("masks every step",)),
    "bf16, attention maps kept": ("default", "prune", BF16, ("attention maps",)),
    "bf16, 128 tokens": ("default", "prune", (*BF16, "bucketing=false"), ()),
    "bf16, 128 tokens, compiled": ("default", "prune", (*BF16, "bucketing=false", "compile=true"), ()),
    "bf16, teacher stage": ("default", "teacher", BF16, ()),
}
GPU_ALONE = (
    "bf16, compiled", "bf16, no prefetching", "bf16, AdamW unfused", "bf16, masks after every step",
    "bf16, attention maps kept", "bf16, 128 tokens", "bf16, 128 tokens, compiled", "bf16, teacher stage",
)  # fmt: skip
ON_GPU = ("published", "fp32", "bf16", "bf16, with a sync in every step", *GPU_ALONE)
ON_CPU = tuple(row for row in ROWS if row not in GPU_ALONE)


def find_attribute(owner: Any, name: str) -> Any:
    """Return what a module or a class calls `name`; raises AttributeError where it was renamed."""
    return getattr(owner, name)


def substitute(owner: Any, name: str, replacement: object) -> None:
    """Replace what a module or a class calls `name`; raises AttributeError where nothing is called so any more."""
    find_attribute(owner, name)
    setattr(owner, name, replacement)


def patch(patches: tuple[str, ...]) -> None:
    """Switch off features of the training loop."""
    import torch

    from spdtool.distillation import lesson
    from spdtool.models import onednn, padding
    from spdtool.pruning import masks
    from spdtool.stages import phase
    from spdtool.training import loop, prefetch

    if "torch products" in patches:
        substitute(onednn, "is_faster", lambda: False)
    if "unfused" in patches:
        adamw = torch.optim.AdamW
        slow = lambda *args, **options: adamw(*args, **options | {"fused": False, "foreach": False})  # noqa: E731
        substitute(torch.optim, "AdamW", slow)
    if "masks every step" in patches:
        substitute(masks, "clear_dead", lambda tensor, dead: tensor.masked_fill_(dead, 0.0))
        substitute(masks.Masks, "_after_step", lambda self, *_: self.apply())
    if "random order" in patches:
        batches = find_attribute(loop, "training_batches")
        substitute(loop, "training_batches", lambda *args, **options: batches(*args, **options | {"pool": None}))
    if "attention maps" in patches:
        compute_outputs = find_attribute(lesson, "compute_outputs")
        keep = lambda *args, **options: compute_outputs(*args, **options | {"attention": "probabilities"})  # noqa: E731
        substitute(lesson, "compute_outputs", keep)
    if "sdpa" in patches:
        load = find_attribute(phase, "load_model")
        fused = lambda *args, **options: load(*args, **options | {"eager": False})  # noqa: E731
        substitute(phase, "load_model", fused)
    if "sync" in patches:
        add = find_attribute(loop, "LossWindow").add

        def reading(window: Any, terms: Any) -> None:
            float(terms["loss"])
            add(window, terms)

        substitute(find_attribute(loop, "LossWindow"), "add", reading)
        substitute(padding.PaddingMask, "of", lambda mask, **_: mask)
    if "no prefetching" in patches:
        substitute(prefetch, "prefetch_batches", lambda batches, _: nullcontext(batches))
    if "teacher looks" in patches:
        substitute(phase, "is_worth_caching", lambda *_: False)
