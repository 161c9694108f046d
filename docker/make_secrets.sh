#!/usr/bin/env bash
# Makes the passwords and keys of compose.yaml, new and random, in a folder that git does not see; keeps existing ones.
#
#   docker/make_secrets.sh [FOLDER]     docker/secrets unless given
set -euo pipefail

folder=${1:-$(dirname "${BASH_SOURCE[0]}")/secrets}
random() { head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n'; }

# Only the owner may enter the folder; the containers' users read the files that Docker hands them.
umask 022
mkdir -p "$folder"
chmod 700 "$folder"
for name in postgres_password admin_password flask_key; do
    [[ -e $folder/$name ]] || random > "$folder/$name"
done
if [[ ! -e $folder/s3.json ]]; then
    key=$(random)
    secret=$(random)
    printf '{"identities": [{"name": "mlflow", "credentials": [{"accessKey": "%s", "secretKey": "%s"}],' \
        "$key" "$secret" > "$folder/s3.json"
    printf ' "actions": ["Admin", "Read", "Write", "List"]}]}\n' >> "$folder/s3.json"
    printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n' "$key" "$secret" \
        > "$folder/s3_credentials"
fi
printf 'MLflow: user admin, password in %s/admin_password\n' "$folder"
