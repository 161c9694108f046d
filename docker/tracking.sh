#!/usr/bin/env bash
# Starts the MLflow server with passwords, its records in a database, and artifacts through it (no client sees the
# store). Settings, none of them secret:
#
#   TRACKING_DATABASE        postgresql+psycopg2://USER@HOST:PORT/NAME, without a password
#   TRACKING_AUTH_DATABASE   the same for users and permissions, another database
#   TRACKING_ARTIFACTS       s3://BUCKET/FOLDER (made where it is missing), or a folder
#   TRACKING_HOST            127.0.0.1 unless set; the port is TRACKING_PORT, 5000 unless set
#   TRACKING_ALLOWED_HOSTS   names by which clients call it, with ports: "tracking.example.com:*"
#   TRACKING_SECRETS         folder with postgres_password, admin_password and flask_key, /run/secrets unless set
#   MLFLOW_S3_ENDPOINT_URL, AWS_SHARED_CREDENTIALS_FILE   of an S3 that is not Amazon's
set -euo pipefail

secrets=${TRACKING_SECRETS:-/run/secrets}
# Neither the command line nor a database's address holds a password, since other users and logs may see those.
private=$(mktemp -d)
umask 077
printf '*:*:*:*:%s\n' "$(cat "$secrets/postgres_password")" > "$private/pgpass"
printf '[mlflow]\ndefault_permission = EDIT\ndatabase_uri = %s\nadmin_username = admin\nadmin_password = %s\n' \
    "$TRACKING_AUTH_DATABASE" "$(cat "$secrets/admin_password")" > "$private/auth.ini"
printf 'authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n' >> "$private/auth.ini"
export PGPASSFILE=$private/pgpass
export MLFLOW_AUTH_CONFIG_PATH=$private/auth.ini
MLFLOW_FLASK_SERVER_SECRET_KEY=$(cat "$secrets/flask_key")
export MLFLOW_FLASK_SERVER_SECRET_KEY

if [[ $TRACKING_ARTIFACTS == s3://* ]]; then
    bucket=${TRACKING_ARTIFACTS#s3://}
    python - "${bucket%%/*}" << 'PYTHON'
import os
import sys

import boto3

client = boto3.client("s3", endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL"))
if sys.argv[1] not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
    client.create_bucket(Bucket=sys.argv[1])
PYTHON
fi

exec mlflow server --app-name basic-auth --serve-artifacts --workers "${TRACKING_WORKERS:-2}" \
    --host "${TRACKING_HOST:-127.0.0.1}" --port "${TRACKING_PORT:-5000}" \
    --allowed-hosts "${TRACKING_ALLOWED_HOSTS:-localhost:*,127.0.0.1:*}" \
    --backend-store-uri "$TRACKING_DATABASE" --artifacts-destination "$TRACKING_ARTIFACTS"
