#!/bin/sh
# Writes the secrets of the stack into a folder, random ones, a file each. What is there already stays.
#
#     sh infra/compose/secrets.sh [FOLDER]      the folder is infra/secrets without one
#
# The folder is for its owner alone; the files in it are open, for containers read them as a user of their own.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-$here/../secrets}
mkdir -p "$folder"
chmod 700 "$folder"
cd "$folder"

put() { # put NAME: what standard input says, unless it is there
    if [ ! -s "$1" ]; then
        cat > "$1.new"
        chmod 644 "$1.new"
        mv "$1.new" "$1"
    fi
}
random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }

for name in postgres mlflow_db mlflow_auth_db prefect_db ledger_db ledger_reader_db \
    mlflow_admin mlflow_reader mlflow_worker mlflow_promoter; do
    random | put "${name}_password"
done
for name in mlflow_flask_secret_key s3_root_secret_key s3_server_secret_key s3_worker_secret_key s3_people_secret_key; do
    random | put "$name"
done
[ -s prefect_auth_string ] || printf 'copal:%s' "$(random)" | put prefect_auth_string
for name in git_credentials webhook_url; do # https://USER:TOKEN@HOST for private repositories; who is told of failed gates
    [ -e "$name" ] || { : > "$name"; chmod 644 "$name"; }
done

sed -e "s/@MLFLOW_AUTH_DB_PASSWORD@/$(cat mlflow_auth_db_password)/" \
    -e "s/@MLFLOW_ADMIN_PASSWORD@/$(cat mlflow_admin_password)/" "$here/auth.ini.template" | put mlflow_auth.ini
sed -e "s/@S3_SERVER_SECRET_KEY@/$(cat s3_server_secret_key)/" -e "s/@S3_WORKER_SECRET_KEY@/$(cat s3_worker_secret_key)/" \
    -e "s/@S3_PEOPLE_SECRET_KEY@/$(cat s3_people_secret_key)/" "$here/s3-users.json.template" | put s3_users.json
