"""The three workloads at two sizes: model, loss, metric and (mini) data."""

from __future__ import annotations

import difflib
from pathlib import Path

from algoperf_shampoo.contract import ForwardPassMode, LossType
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.workloads.base import Workload
from algoperf_shampoo.workloads.config import DEFAULT_VERSION, read_config
from algoperf_shampoo.workloads.fastmri import FastMRI
from algoperf_shampoo.workloads.imagenet_vit import ImagenetViT
from algoperf_shampoo.workloads.ogbg import OGBG

__all__ = ["ForwardPassMode", "LossType", "Workload", "load", "names"]

WORKLOADS: tuple[type[Workload], ...] = (FastMRI, ImagenetViT, OGBG)
MINI_SUFFIX = "_mini"


def names() -> list[str]:
    """Names of all workloads: the full ones, then the minis."""
    full = [workload.full_name for workload in WORKLOADS]
    return full + [name + MINI_SUFFIX for name in full]


def load(
    name: str, config_dir: str | Path | None = None, version: str = DEFAULT_VERSION
) -> Workload:
    """Makes a workload from its configuration. Reads no data yet.

    Args:
      name: one of ``names()``.
      config_dir: folder with <workload>.json; None means the project's own.
      version: AlgoPerf version whose budget, step hint and targets a full workload takes.

    Raises:
      UserError: unknown name, or a mistake in the configuration.
    """
    for workload in WORKLOADS:
        if name in (workload.full_name, workload.full_name + MINI_SUFFIX):
            config = read_config(
                workload.full_name,
                mini=name.endswith(MINI_SUFFIX),
                model=workload.model_schema,
                data=workload.data_schema,
                config_dir=config_dir,
                version=version,
            )
            return workload(config)
    close = difflib.get_close_matches(name, names(), n=1)
    guess = f" (did you mean {close[0]}?)" if close else ""
    raise UserError(f"unknown workload {name!r}{guess}; there are {', '.join(names())}")
