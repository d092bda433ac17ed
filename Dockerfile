# One image for the webserver, the daemon, the code location and the runs. Python is the version that the lock files were made with.
# No HEALTHCHECK: each of them is probed in its own way, see infra/modules/container-apps.bicep and Dagster's chart.
FROM python:3.11-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build
RUN python -m venv --without-pip /opt/venv
COPY requirements.lock requirements-image.lock ./
# wheels of exactly these versions: nothing is compiled, and nothing else is fetched
RUN pip --python /opt/venv/bin/python install --no-deps --only-binary :all: --requirement requirements.lock --requirement requirements-image.lock
COPY pyproject.toml README.md LICENSE ./
COPY aoai_usage_pipeline aoai_usage_pipeline
RUN pip --python /opt/venv/bin/python install --no-deps . && pip --python /opt/venv/bin/python check

FROM python:3.11-slim
# what runs needs no installer
RUN pip uninstall --yes --quiet --root-user-action ignore setuptools wheel pip
RUN groupadd --gid 1000 dagster && useradd --uid 1000 --gid 1000 --home-dir /opt/dagster --no-create-home dagster \
    && install --directory --owner 1000 --group 1000 /opt/dagster /opt/dagster/dagster_home
COPY --from=build /opt/venv /opt/venv
COPY infra/dagster/dagster.yaml /opt/dagster/dagster_home/
COPY infra/dagster/workspace.yaml /opt/dagster/
# PostgreSQL is spoken to over TLS, and its certificate is checked
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 DAGSTER_HOME=/opt/dagster/dagster_home \
    PGSSLMODE=verify-full PGSSLROOTCERT=/etc/ssl/certs/ca-certificates.crt
# the published DuckDB file is in data/ below, and is made anew from the lake wherever the image starts
WORKDIR /opt/dagster
USER 1000:1000
EXPOSE 3000 4000
CMD ["dagster", "code-server", "start", "--host", "0.0.0.0", "--port", "4000", "--module-name", "aoai_usage_pipeline.definitions"]
