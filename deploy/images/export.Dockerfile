# Training, the registry's client, maintenance, and the commands of a person: models, why, audit, backtest. No Spark.
# docker build -f deploy/images/export.Dockerfile -t fraudgate-export .
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm
ARG UV_IMAGE=ghcr.io/astral-sh/uv:0.13.9

FROM ${UV_IMAGE} AS uv

FROM ${PYTHON_IMAGE} AS build
COPY --from=uv /uv /usr/local/bin/uv
ENV UV_PROJECT_ENVIRONMENT=/opt/fraudgate/venv UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
ENV PYC_INVALIDATION_MODE=UNCHECKED_HASH
WORKDIR /build
COPY pyproject.toml uv.lock README.md LICENSE ./
# The gateway's packages too: a decision that is told or made again is made by the gateway's code.
RUN uv sync --frozen --no-dev --no-install-project --extra export --extra gateway
COPY deploy ./deploy
COPY feature_jobs ./feature_jobs
COPY gateway ./gateway
COPY loadtest ./loadtest
COPY model_export ./model_export
RUN uv sync --frozen --no-dev --no-editable --extra export --extra gateway

FROM ${PYTHON_IMAGE}
RUN groupadd --gid 10001 fraudgate && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/fraudgate fraudgate \
    && install -d -o 10001 -g 10001 /var/lib/fraudgate
COPY --from=build /opt/fraudgate /opt/fraudgate
ENV PATH=/opt/fraudgate/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
ENV NUMBA_CACHE_DIR=/tmp/kernels MPLCONFIGDIR=/tmp MLFLOW_DISABLE_TELEMETRY=true GIT_PYTHON_REFRESH=quiet
ENV FRAUDGATE_HOME=/var/lib/fraudgate FRAUDGATE_HOST=0.0.0.0
WORKDIR /var/lib/fraudgate
USER 10001:10001
# Its commands end by themselves, or are watched by who started them.
HEALTHCHECK NONE
ENTRYPOINT ["fraudgate"]
CMD ["--help"]
