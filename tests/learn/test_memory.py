"""Logits are streamed: a small sibling of benchmarks/memory.py that fails when they are held as a whole."""

import subprocess
import sys

import pytest

CHILD = """
import dataclasses, resource
import numpy as np
import torch
from fewscan.learn import infer
from fewscan.learn.checkpoint import Model, build_segmenter
from fewscan.learn.config import NetworkConfig, Settings
from fewscan.learn.hardware import pick
from fewscan.learn.intensity import Scaling
from fewscan.learn.plan import Plan
from fewscan.space.geometry import Geometry
from fewscan.space.volume import Volume
torch.set_num_threads(2)
names = {i: str(i) for i in range(1, 41)}
plan = Plan(names=names, channels=("a",), scaling=(Scaling(kind="scan"),), spacing=(1.0, 1.0, 1.0), patch=(32, 32, 32),
            batch=1, widths=(8, 16), kernels=((3, 3, 3),) * 2, strides=((1, 1, 1), (2, 2, 2)), mirror=False, pairs=(),
            sole=())
settings = Settings(network=NetworkConfig(widths=(8, 16)))
model = Model(segmenter=build_segmenter(plan, settings, seed=0), plan=plan, settings=settings, provenance={})
predictor = infer.torch_predictor(model, pick("cpu"))

def scan(*shape):
    geometry = Geometry(shape, np.eye(4))
    data = np.random.default_rng(0).integers(0, 100, (1, *shape)).astype(np.int16)
    return Volume(data, geometry, geometry)

infer.segment(model, scan(40, 40, 40), predictor=predictor)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
infer.segment(model, scan(224, 128, 128), predictor=predictor, memory=64 << 20)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux reports it")
@pytest.mark.slow
def test_predicting_a_large_scan_with_forty_labels_stays_small():
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    mib = float(done.stdout)
    whole = 41 * 224 * 128 * 128 * 4 / 2**20
    assert mib < 260 < whole / 2, f"{mib:.0f} MiB; all logits at once would be {whole:.0f} MiB"
