# Cluster image: AlgoPerf's harness, pinned, with our torch. docs/docker.md says how to use it.
#   make docker-build [TORCH=2.13.0] [CUDA=cu130] [BASE=debian:bookworm-slim]
ARG BASE=debian:bookworm-slim
FROM ${BASE}

# CUDA names a folder of PyTorch's own wheel index (cu126, cu128, cu130, cpu). Empty takes the wheel
# of the default package index, which has CUDA with it. The host needs an NVIDIA driver, no CUDA.
ARG TORCH=2.13.0
ARG CUDA=
ARG UID=1000
# Another commit of AlgoPerf's code than the one in requirements-algoperf-no-deps.txt.
ARG ALGOPERF_COMMIT=

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# gcc and the Python headers are for torch.compile, which AlgoPerf uses on FastMRI.
# hadolint ignore=DL3008
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      ca-certificates gcc g++ git libc6-dev make python3 python3-dev python3-venv util-linux \
 && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# torchvision has no version of its own here: pip takes the one that belongs to the torch asked for.
# hadolint ignore=DL3013
RUN index="${CUDA:+--index-url=https://download.pytorch.org/whl/${CUDA}}" \
 && pip install ${index:+"$index"} "torch==${TORCH}" torchvision

WORKDIR /opt/algoperf-shampoo
COPY requirements-algoperf.txt requirements-algoperf-no-deps.txt ./
RUN echo "torch==${TORCH}" > /tmp/torch.txt \
 && pip install -c /tmp/torch.txt -r requirements-algoperf.txt \
 && if [ -n "${ALGOPERF_COMMIT}" ]; then \
      sed -i "s/@[0-9a-f]*$/@${ALGOPERF_COMMIT}/" requirements-algoperf-no-deps.txt; fi \
 && pip install --no-deps -r requirements-algoperf-no-deps.txt \
 && rm /tmp/torch.txt

COPY . .

# Not root; any other user works too (docker run --user), as cluster engines insist on. Some bases
# have a user of that number already (ubuntu:24.04 has 1000): that one is taken then.
RUN { getent passwd "${UID}" >/dev/null || useradd --uid "${UID}" --create-home runner; } \
 && mkdir /data /results \
 && chown "${UID}" /data /results
USER ${UID}
VOLUME ["/data", "/results"]

# Caches of torch.compile go where any user may write; OUT and RUNS are make's own variables. Some
# engines (enroot) give an image GPUs only if it asks for them by these names.
ENV HOME=/tmp \
    USER=runner \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor \
    ALGOPERF_PYTHON=/opt/venv/bin/python \
    VENV=none \
    PYTHON=/opt/venv/bin/python \
    OUT=/results \
    RUNS=/results \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

ENTRYPOINT ["make", "--no-print-directory"]
CMD ["help"]
