"""Global batch sizes, of every variant alike. Needs no torch, so that a login node can ask."""

from __future__ import annotations

# Of the paper's runs; of the published Shampoo in AlgoPerf's v0.6 elsewhere (finewebedu_lm, which
# is younger: of the entries of 2026); and of the minis on a CPU.
BATCH_SIZES = {
    "fastmri": 32,
    "imagenet_vit": 1024,
    "ogbg": 512,
    "criteo1tb": 262144,
    "imagenet_resnet": 1024,
    "librispeech_conformer": 200,
    "librispeech_deepspeech": 224,
    "wmt": 128,
    "finewebedu_lm": 64,
    "mnist": 64,
    "fastmri_mini": 4,
    "imagenet_vit_mini": 64,
    "ogbg_mini": 64,
}


def of(workload_name: str) -> int:
    """Global batch size of a workload.

    Raises:
        ValueError: unknown workload (AlgoPerf then asks again with the base workload's name).
    """
    if workload_name not in BATCH_SIZES:
        known = ", ".join(BATCH_SIZES)
        raise ValueError(f"no batch size for workload {workload_name!r}; known: {known}")
    return BATCH_SIZES[workload_name]
