"""A kernel that was asked for by name and cannot run."""


class KernelError(RuntimeError):
    """The message names the kernel, why it cannot run there, and what can."""
