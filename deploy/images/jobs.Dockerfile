# The feature jobs: Spark with its connectors, and Java. docker build -f deploy/images/jobs.Dockerfile -t fraudgate-jobs .
# Java comes from a wheel of the lock file too, the connectors by deploy/jars.lock, which has the SHA-256 of each.
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm
ARG UV_IMAGE=ghcr.io/astral-sh/uv:0.13.9

FROM ${UV_IMAGE} AS uv

FROM ${PYTHON_IMAGE} AS build
COPY --from=uv /uv /usr/local/bin/uv
ENV UV_PROJECT_ENVIRONMENT=/opt/fraudgate/venv UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
ENV PYC_INVALIDATION_MODE=UNCHECKED_HASH
ENV FRAUDGATE_CACHE_DIR=/opt/fraudgate/cache
# A mirror of Maven Central, where that can't be reached.
ARG FRAUDGATE_MAVEN_URL=""
WORKDIR /build
COPY pyproject.toml uv.lock README.md LICENSE ./
# With what fetches the connectors (extra local), which the last sync takes away.
RUN uv sync --frozen --no-dev --no-install-project --extra jobs --extra java --extra local
COPY deploy ./deploy
COPY feature_jobs ./feature_jobs
COPY gateway ./gateway
COPY loadtest ./loadtest
COPY model_export ./model_export
RUN /opt/fraudgate/venv/bin/python -m deploy.jars spark spark-s3a
RUN uv sync --frozen --no-dev --no-editable --extra jobs --extra java
# The Java home of the wheel's runtime, which Spark's launcher can use; no other's, whatever is installed here.
RUN /opt/fraudgate/venv/bin/python -c "from pathlib import Path; from deploy.toolchain import java_home; java_home(Path('/opt/fraudgate/cache'), {'PATH': ''})"

FROM ${PYTHON_IMAGE}
# Hadoop asks for the user's name.
RUN groupadd --gid 10001 fraudgate && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/fraudgate fraudgate \
    && install -d -o 10001 -g 10001 /var/lib/fraudgate
COPY --from=build /opt/fraudgate /opt/fraudgate
ENV PATH=/opt/fraudgate/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
ENV JAVA_HOME=/opt/fraudgate/cache/java-home FRAUDGATE_CACHE_DIR=/opt/fraudgate/cache
ENV FRAUDGATE_HOME=/var/lib/fraudgate FRAUDGATE_HOST=0.0.0.0
WORKDIR /var/lib/fraudgate
USER 10001:10001
EXPOSE 18090
HEALTHCHECK --interval=30s --timeout=5s --start-period=180s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:18090/readyz', timeout=4)"]
ENTRYPOINT ["fraudgate"]
CMD ["jobs"]
