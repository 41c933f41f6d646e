"""Everything fewscan raises on purpose.

::

    FewscanError(ValueError)   one sentence for the user: what is wrong, both values, what to do; exit code 2
    ├── DataError              a file or a folder of cases cannot be used as it is
    │   └── ScansError         some of several scans could not be; the others are done
    ├── GeometryError          two grids that must agree do not
    ├── ConfigError            a setting is unknown, or its value impossible
    │   └── TakenError         a file of somebody else lies where one would be written
    ├── ModelError             a model folder is damaged, foreign or does not fit the request
    └── ResourceError          memory, disk or time would not suffice

Anything else that escapes is a defect of fewscan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MOST_TOLD = 10  # scans that a sentence names with their reasons


class FewscanError(ValueError):
    """Base of all errors that fewscan raises on purpose."""


class DataError(FewscanError):
    """A file or a folder of cases cannot be used as it is."""


class ScansError(DataError):
    """Some of several scans could not be used; raised when the others are done.

    Parameters
    ----------
    sentence : str
        How many of how many.
    done : sequence
        What came of the others.
    failed : mapping of str to str
        Why, by the ids of the scans.

    Examples
    --------
    >>> print(ScansError("1 of 5 scans could not be predicted", done=[], failed={"p3": "p3.nii: 2 slices"}))
    1 of 5 scans could not be predicted: p3 (p3.nii: 2 slices)
    """

    def __init__(self, sentence: str, *, done: Sequence[Any], failed: Mapping[str, str]) -> None:
        told = [f"{name} ({why})" for name, why in failed.items()]
        more = f", and {len(told) - MOST_TOLD} more" if len(told) > MOST_TOLD else ""
        super().__init__(f"{sentence}: {', '.join(told[:MOST_TOLD])}{more}")
        self.done, self.failed = done, failed


class GeometryError(FewscanError):
    """Two grids that must agree do not."""


class ConfigError(FewscanError):
    """A setting is unknown, or its value impossible."""


class TakenError(ConfigError):
    """A file of somebody else, or of another scan, lies where one would be written."""


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


def lacking_on_mps(error: BaseException) -> ConfigError | None:
    """The sentence for what PyTorch cannot do on an Apple GPU; None of any other error.

    Parameters
    ----------
    error : BaseException
        Of PyTorch, which is not imported for it.

    Examples
    --------
    >>> print(lacking_on_mps(NotImplementedError("'aten::erfinv' is missing on the MPS device. If you")))
    this cannot be computed on an Apple GPU ('aten::erfinv' is missing on the MPS device); use --device cpu
    >>> print(lacking_on_mps(RuntimeError("shapes differ")))
    None
    """
    text = str(error)
    if not isinstance(error, (RuntimeError, TypeError)) or "MPS" not in text:  # NotImplementedError is a RuntimeError
        return None
    first = text.splitlines()[0].partition(". ")[0].rstrip(".")
    return ConfigError(f"this cannot be computed on an Apple GPU ({first}); use --device cpu")
