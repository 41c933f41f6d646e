"""A handful of labelled 3D medical scans in, a segmenter that can be trusted on the next patient out.

>>> import fewscan
>>> data = fewscan.open(fewscan.sample_path())
>>> len(data.labelled), len(data.unlabelled)
(5, 13)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewscan.api import (
        Model,
        Prediction,
        Scans,
        check,
        compare,
        draft,
        evaluate,
        export,
        load,
        mesh,
        open,  # noqa: A004
        personalize,
        predict,
        register,
        register_config,
        report,
        train,
        view,
    )  # fmt: skip
    from fewscan.data.sample import sample_path
    from fewscan.errors import FewscanError
    from fewscan.runs import crossval, demo
    from fewscan.shifting import shift
    from fewscan.suggesting import suggest
    from fewscan.transferring import transfer

_HOME = {
    "crossval": "fewscan.runs",
    "demo": "fewscan.runs",
    "FewscanError": "fewscan.errors",
    "sample_path": "fewscan.data.sample",
    "shift": "fewscan.shifting",
    "suggest": "fewscan.suggesting",
    "transfer": "fewscan.transferring",
}

__all__ = [
    "FewscanError",
    "Model",
    "Prediction",
    "Scans",
    "check",
    "compare",
    "crossval",
    "demo",
    "draft",
    "evaluate",
    "export",
    "load",
    "mesh",
    "open",
    "personalize",
    "predict",
    "register",
    "register_config",
    "report",
    "sample_path",
    "shift",
    "suggest",
    "train",
    "transfer",
    "view",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``fewscan --help`` does not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'fewscan' has no attribute {name!r}")
    return getattr(import_module(_HOME.get(name, "fewscan.api")), name)
