# Three images from one file:
#   client   what a researcher installs
#   gateway  the gateway and the `interpose` command; no torch
#   worker   what runs models: torch, and Ray
# docker build --target gateway -t interpose-gateway .
# docker build --target worker -t interpose-worker --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .

ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=1
RUN python3 -m venv /opt/interpose
ENV PATH=/opt/interpose/bin:$PATH
WORKDIR /build
# What is needed comes before the source: a change of the source rebuilds the last layers alone.
COPY pyproject.toml constraints.txt ./
COPY scripts/requirements.py scripts/

FROM build AS wheel
COPY README.md LICENSE ./
COPY client client
COPY server server
RUN pip wheel -q -c constraints.txt --no-deps --wheel-dir /wheel .

FROM build AS client-packages
RUN python scripts/requirements.py >client.txt && pip install -q -c constraints.txt -r client.txt

FROM client-packages AS gateway-packages
RUN python scripts/requirements.py gateway s3 >gateway.txt && pip install -q -c constraints.txt -r gateway.txt

FROM gateway-packages AS worker-packages
# Empty: pip's own choice, which on Linux carries CUDA. https://download.pytorch.org/whl/cpu: without it.
ARG TORCH_INDEX=
RUN pip install -q --no-deps ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "$(grep '^torch==' constraints.txt)"
RUN python scripts/requirements.py cluster s3 >worker.txt && pip install -q -c constraints.txt -r worker.txt

FROM ${PYTHON_IMAGE} AS base
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="Interpose" \
    org.opencontainers.image.description="Read and change the inside of a neural network that runs somewhere else" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}"
# The folders that volumes are mounted on belong to the user, and so do new volumes.
RUN groupadd --gid 10001 interpose \
    && useradd --uid 10001 --gid 10001 --home-dir /home/interpose --create-home --shell /usr/sbin/nologin interpose \
    && install -d -o interpose -g interpose -m 0700 /data \
    && install -d -o interpose -g interpose /cache
ENV PATH=/opt/interpose/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_ROOT_USER_ACTION=ignore \
    INTERPOSE_SERVER_DATA_DIR=/data \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache
WORKDIR /home/interpose
STOPSIGNAL SIGTERM
# Packages and source are layers of their own: an upgrade of the source moves a megabyte, not gigabytes.
COPY --from=wheel /wheel /opt/wheel

FROM base AS client
COPY --from=client-packages /opt/interpose /opt/interpose
RUN pip install -q --no-cache-dir --no-deps --no-index --find-links /opt/wheel interpose
USER 10001:10001
CMD ["python"]

FROM base AS worker
COPY --from=worker-packages /opt/interpose /opt/interpose
RUN pip install -q --no-cache-dir --no-deps --no-index --find-links /opt/wheel interpose
USER 10001:10001
COPY --chmod=755 deploy/ray-head /opt/interpose/bin/interpose-ray-head
# Threads of torch that spin while they wait for one another stall on a busy machine.
ENV OMP_WAIT_POLICY=passive
CMD ["interpose", "--help"]

FROM base AS gateway
COPY --from=gateway-packages /opt/interpose /opt/interpose
RUN pip install -q --no-cache-dir --no-deps --no-index --find-links /opt/wheel interpose
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
CMD ["interpose", "gateway", "--host", "0.0.0.0", "--port", "8000"]
