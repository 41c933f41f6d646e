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
