# The gateway and the case service: no Spark, no MLflow, no XGBoost. docker build -f deploy/images/gateway.Dockerfile -t fraudgate-gateway .
# Base images are arguments, for a build that must be the same tomorrow names digests: --build-arg PYTHON_IMAGE=...@sha256:...
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm
ARG UV_IMAGE=ghcr.io/astral-sh/uv:0.13.9

FROM ${UV_IMAGE} AS uv

FROM ${PYTHON_IMAGE} AS build
COPY --from=uv /uv /usr/local/bin/uv
ENV UV_PROJECT_ENVIRONMENT=/opt/fraudgate/venv UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
# Bytecode is right whatever the times of the files say.
ENV PYC_INVALIDATION_MODE=UNCHECKED_HASH
# Machine code for any x86-64 machine since 2013, not for the one that builds. For arm64: generic.
ARG NUMBA_CPU_NAME=x86-64-v3
ENV NUMBA_CPU_NAME=${NUMBA_CPU_NAME} NUMBA_CPU_FEATURES="" NUMBA_CACHE_DIR=/opt/fraudgate/kernels
WORKDIR /build
COPY pyproject.toml uv.lock README.md LICENSE ./
RUN uv sync --frozen --no-dev --no-install-project --extra gateway
COPY deploy ./deploy
COPY feature_jobs ./feature_jobs
COPY gateway ./gateway
COPY loadtest ./loadtest
COPY model_export ./model_export
RUN uv sync --frozen --no-dev --no-editable --extra gateway
# Numba knows a source by its size and time: the time must not be that of the build.
RUN find /opt/fraudgate/venv/lib -path '*/site-packages/gateway/*' -name '*.py' -exec touch -d '2020-01-01T00:00:00Z' {} +
# Of what is installed, not of the sources here: they are known by their place too.
RUN /opt/fraudgate/venv/bin/python -P -m gateway.warm

FROM ${PYTHON_IMAGE}
RUN groupadd --gid 10001 fraudgate && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/fraudgate fraudgate \
    && install -d -o 10001 -g 10001 /var/lib/fraudgate
COPY --from=build /opt/fraudgate /opt/fraudgate
ARG NUMBA_CPU_NAME=x86-64-v3
ENV NUMBA_CPU_NAME=${NUMBA_CPU_NAME} NUMBA_CPU_FEATURES="" NUMBA_CACHE_DIR=/opt/fraudgate/kernels
ENV PATH=/opt/fraudgate/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
ENV FRAUDGATE_HOME=/var/lib/fraudgate FRAUDGATE_HOST=0.0.0.0
WORKDIR /var/lib/fraudgate
USER 10001:10001
EXPOSE 18080
# For engines that look; Kubernetes asks by its own probes.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:18080/readyz', timeout=2)"]
ENTRYPOINT ["fraudgate"]
CMD ["serve"]
