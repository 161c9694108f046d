# The MLflow server of constraints.txt, with what it needs for PostgreSQL, S3 and passwords. No GPU, no PyTorch.
FROM python:3.11-slim-bookworm

RUN useradd --create-home --home-dir /srv/mlflow --uid 1000 --shell /usr/sbin/nologin mlflow
WORKDIR /srv/mlflow
COPY docker/install.sh docker/tracking.txt ./docker/
COPY constraints.txt ./
RUN docker/install.sh tracking-python
COPY docker/tracking.sh ./docker/

USER 1000
ENV HOME=/srv/mlflow \
    MLFLOW_DISABLE_TELEMETRY=true \
    PYTHONUNBUFFERED=1
EXPOSE 5000
ENTRYPOINT ["docker/tracking.sh"]
