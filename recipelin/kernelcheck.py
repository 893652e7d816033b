"""A kernel that a recipe names and that cannot run where the run is to be: said before any work."""

import torch

from recipelin_kernels import KernelError

from . import lookup
from .load import Loaded
from .plan import Plan, refusal
from .steps import Swap, first


def refuse_kernel(loaded: Loaded, planned: Plan, device: str) -> None:
    """Raises PlanError at the recipe's `kernel` (of `auto` every device has one), or at the student that brings it."""
    swap = first([p.step for p in planned.steps], Swap)
    if swap is None:
        return
    form, model = lookup.implementation("attention", swap.form).FORM, loaded.recipe.model
    try:
        form.kernel_on(swap.config, planned.architecture, device, getattr(torch, model.dtype))
    except KernelError as error:
        if model.student:
            text = f"model.student: {error} (the student's config.json names it)"
            raise refusal(loaded, ("model", "student"), text) from error
        raise refusal(loaded, ("method", "form", "kernel"), f"method.form: {error}") from error
