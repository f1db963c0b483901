"""Parameter shapes of AlgoPerf's models, from AlgoPerf's own code: run with its Python.

``.venv-algoperf/bin/python scripts/data/algoperf_shapes.py`` builds the model of each workload of
the installed AlgoPerf and writes ``algoperf_shampoo/workloads/data/algoperf_shapes.json``: for
each workload every shape and how many parameters have it. The language model came after that
version: its shapes are those of its description. Needs 5 GB of memory (criteo1tb's embedding).
"""

from __future__ import annotations

import collections
import importlib
import json
import math
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
OUT = ROOT / "algoperf_shampoo" / "workloads" / "data" / "algoperf_shapes.json"
WORKLOADS = (
    "criteo1tb fastmri imagenet_resnet imagenet_vit librispeech_conformer librispeech_deepspeech "
    "ogbg wmt"
).split()

# Imported by workloads, and used for their data and metrics alone.
DATA_ONLY = ("tensorflow_text", "sacrebleu", "sentencepiece", "pydub")


def built(name: str) -> list[list[int]]:
    """Shapes of one workload's parameters, as AlgoPerf initialises them."""
    registry: Any = importlib.import_module("algoperf.workloads.workloads")
    entry = registry.WORKLOADS[name]
    path = os.path.join(
        registry.BASE_WORKLOADS_DIR, entry["workload_path"] + "_pytorch", "workload.py"
    )
    workload = registry.import_workload(
        workload_path=path,
        workload_class_name=entry["workload_class_name"],
        workload_init_kwargs={},
    )
    model, _ = workload.init_model_fn([0, 0])
    return [list(parameter.shape) for parameter in model.parameters()]


def language_model(
    vocabulary: int = 50257, width: int = 1024, layers: int = 12, hidden: int = 4096
) -> list[list[int]]:
    """finewebedu_lm: embeddings tied, no biases, a GLU, a scale of attention in each layer."""
    layer = [[3 * width, width], [width, width], [], [2 * hidden, width], [width, hidden]]
    return [[vocabulary, width], *(layer + [[width], [width]]) * layers, [width]]


def main() -> None:
    from algoperf_shampoo.harness.algoperf import cpu_compat

    cpu_compat.apply()
    for name in DATA_ONLY:
        sys.modules[name] = mock.MagicMock()
    found = {name: built(name) for name in WORKLOADS}
    found["finewebedu_lm"] = language_model()
    direct = json.loads(metadata.distribution("algoperf").read_text("direct_url.json") or "{}")
    record = {
        "source": "scripts/data/algoperf_shapes.py; finewebedu_lm from its description",
        "algoperf_commit": direct.get("vcs_info", {}).get("commit_id"),
        "shapes": {
            name: [
                {"shape": list(shape), "count": count}
                for shape, count in sorted(collections.Counter(map(tuple, shapes)).items())
            ]
            for name, shapes in sorted(found.items())
        },
    }
    text = json.dumps(record)
    # One shape a line.
    text = text.replace('}, {"shape"', '},\n   {"shape"').replace('[{"shape"', '[\n   {"shape"')
    OUT.write_text(text.replace('}], "', '}],\n  "') + "\n", encoding="utf-8")
    for name, shapes in sorted(found.items()):
        total = sum(math.prod(shape) for shape in shapes)
        print(f"{name}: {len(shapes)} parameters, {total} numbers")


if __name__ == "__main__":
    main()
