#!/bin/sh
# Makes the databases of a team in PostgreSQL, each with a role of its own that nobody else's password opens:
#
#     mlflow, mlflow_auth, prefect, ledger      and ledger_reader, who may look at the ledger and no more
#
# PostgreSQL's image runs it once, when its volume is new. On a server of your own: PGHOST=... PGUSER=... (a superuser)
# SECRETS=folder sh databases.sh; it may be run again, and sets the passwords anew.
set -eu
secrets=${SECRETS:-/run/secrets}
sql() { psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --username "${POSTGRES_USER:-${PGUSER:-postgres}}" "$@"; }

role() {
    SECRET="$secrets/$1_db_password" sql --dbname postgres --set name="$1" <<'SQL'
\set password `cat "$SECRET"`
SELECT format('CREATE ROLE %I LOGIN', :'name') WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :'name') \gexec
ALTER ROLE :"name" PASSWORD :'password';
SQL
}

for name in mlflow mlflow_auth prefect ledger; do
    role "$name"
    sql --dbname postgres --set name="$name" <<'SQL'
SELECT format('CREATE DATABASE %I OWNER %I', :'name', :'name')
WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = :'name') \gexec
REVOKE ALL ON DATABASE :"name" FROM PUBLIC;
SQL
done

role ledger_reader
sql --dbname ledger <<'SQL'
GRANT CONNECT ON DATABASE ledger TO ledger_reader;
GRANT USAGE ON SCHEMA public TO ledger_reader;
GRANT SELECT ON ALL TABLES IN SCHEMA public TO ledger_reader;
ALTER DEFAULT PRIVILEGES FOR ROLE ledger IN SCHEMA public GRANT SELECT ON TABLES TO ledger_reader;
SQL
