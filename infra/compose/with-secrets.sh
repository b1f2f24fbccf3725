#!/bin/sh
# Runs its arguments with secrets from files in their environment, for programs that look for them nowhere else:
# NAME_FILE=/run/secrets/name becomes NAME, the file's content. Other files (SSL_CERT_FILE, say) are left alone.
set -eu
for pair in $(env | grep -E '^[A-Z][A-Z0-9_]*_FILE=/[^ ]*/secrets/[^ ]+$' || true); do
    name=${pair%%_FILE=*}
    file=${pair#*=}
    if [ ! -r "$file" ]; then
        echo "with-secrets: $file, for $name, cannot be read: it must be there and open to user $(id -u)" >&2
        exit 2
    fi
    export "$name=$(cat "$file")"
    unset "${name}_FILE"
done
exec "$@"
