# Three images from one file:
#   client   what a researcher installs
#   gateway  the gateway and the `interpose` command; no torch
#   worker   what runs models: torch, and Ray
# docker build --target gateway -t interpose-gateway .
# docker build --target worker -t interpose-worker --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .

ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

# What each image needs, as files that change only when that changes: torch is not fetched anew for another line.
FROM ${PYTHON_IMAGE} AS requirements
WORKDIR /requirements
COPY pyproject.toml constraints.txt ./
COPY scripts/requirements.py scripts/
RUN python3 scripts/requirements.py >client.txt \
    && python3 scripts/requirements.py gateway s3 >gateway.txt \
    && python3 scripts/requirements.py cluster quantized s3 >worker.txt \
    && grep '^torch==' constraints.txt >torch.txt

FROM ${PYTHON_IMAGE} AS base
# The folders that volumes are mounted on belong to the user, and so do new volumes.
RUN groupadd --gid 10001 interpose \
    && useradd --uid 10001 --gid 10001 --home-dir /home/interpose --create-home --shell /usr/sbin/nologin interpose \
    && install -d -o interpose -g interpose -m 0700 /data \
    && install -d -o interpose -g interpose /cache \
    && python3 -m venv /opt/interpose
ENV PATH=/opt/interpose/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    INTERPOSE_SERVER_DATA_DIR=/data \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache
WORKDIR /home/interpose
STOPSIGNAL SIGTERM

FROM base AS wheel
WORKDIR /build
COPY --from=requirements /requirements/constraints.txt ./
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY server server
RUN pip wheel -q -c constraints.txt --no-deps --wheel-dir /wheel .

# In each image the packages come before the source: a change of the source moves a megabyte, not gigabytes.

FROM base AS client
COPY --from=requirements /requirements/constraints.txt /requirements/client.txt /opt/requirements/
RUN pip install -q -c /opt/requirements/constraints.txt -r /opt/requirements/client.txt
COPY --from=wheel /wheel /opt/wheel
RUN pip install -q --no-deps --no-index --find-links /opt/wheel interpose
LABEL org.opencontainers.image.title="Interpose, the client" org.opencontainers.image.licenses="Apache-2.0"
USER 10001:10001
CMD ["python"]

FROM base AS torch
# Empty: pip's own choice, which on Linux carries CUDA. https://download.pytorch.org/whl/cpu: without it.
ARG TORCH_INDEX=
COPY --from=requirements /requirements/torch.txt /opt/requirements/
RUN pip install -q --no-deps ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} -r /opt/requirements/torch.txt

FROM torch AS worker
COPY --from=requirements /requirements/constraints.txt /requirements/worker.txt /opt/requirements/
RUN pip install -q -c /opt/requirements/constraints.txt -r /opt/requirements/worker.txt
COPY --from=wheel /wheel /opt/wheel
RUN pip install -q --no-deps --no-index --find-links /opt/wheel interpose
COPY --chmod=755 deploy/ray-head /opt/interpose/bin/interpose-ray-head
# Threads of torch that spin while they wait for one another stall on a busy machine. What GPUs' compilers keep goes
# where the rest is kept: the home folder is read-only.
ENV OMP_WAIT_POLICY=passive \
    CUDA_CACHE_PATH=/cache/cuda \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton
LABEL org.opencontainers.image.title="Interpose, the worker" org.opencontainers.image.licenses="Apache-2.0"
USER 10001:10001
CMD ["interpose", "--help"]

FROM base AS gateway
COPY --from=requirements /requirements/constraints.txt /requirements/gateway.txt /opt/requirements/
RUN pip install -q -c /opt/requirements/constraints.txt -r /opt/requirements/gateway.txt
COPY --from=wheel /wheel /opt/wheel
RUN pip install -q --no-deps --no-index --find-links /opt/wheel interpose
LABEL org.opencontainers.image.title="Interpose, the gateway" org.opencontainers.image.licenses="Apache-2.0"
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
CMD ["interpose", "gateway", "--host", "0.0.0.0", "--port", "8000"]
