"""Everything fewscan raises on purpose.

::

    FewscanError(ValueError)   one sentence for the user: what is wrong, both values, what to do; exit code 2
    ├── DataError              a file or a folder of cases cannot be used as it is
    ├── GeometryError          two grids that must agree do not
    ├── ConfigError            a setting is unknown, or its value impossible
    ├── ModelError             a model folder is damaged, foreign or does not fit the request
    └── ResourceError          memory, disk or time would not suffice

Anything else that escapes is a defect of fewscan.
"""

from __future__ import annotations


class FewscanError(ValueError):
    """Base of all errors that fewscan raises on purpose."""


class DataError(FewscanError):
    """A file or a folder of cases cannot be used as it is."""


class GeometryError(FewscanError):
    """Two grids that must agree do not."""


class ConfigError(FewscanError):
    """A setting is unknown, or its value impossible."""


class ModelError(FewscanError):
    """A model folder is damaged, foreign or does not fit the request."""


class ResourceError(FewscanError):
    """Memory, disk or time would not suffice."""


def out_of_memory(error: BaseException, *, fix: str) -> ResourceError | None:
    """The sentence for an allocation that failed; None of any other error.

    Parameters
    ----------
    error : BaseException
        Of Python, NumPy or PyTorch, which is not imported for it.
    fix : str
        What to do about it.

    Examples
    --------
    >>> print(out_of_memory(MemoryError(), fix="take a smaller scan"))
    this machine ran out of memory; take a smaller scan, or close other programs
    >>> print(out_of_memory(RuntimeError("shapes differ"), fix="take a smaller scan"))
    None
    """
    text = str(error) if isinstance(error, RuntimeError) else ""
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:  # PyTorch's own word for it
        return ResourceError(f"this machine ran out of memory; {fix}, or close other programs")
    if type(error).__name__ == "OutOfMemoryError" or "backend out of memory" in text:  # the latter of Apple's GPUs
        return ResourceError(f"the GPU ran out of memory; {fix}, or use --device cpu")
    return None
