#!/usr/bin/env bash
# A team's MLflow tracking server on this machine: PostgreSQL holds the runs, the server hands out the artifacts, so that no
# client needs to see either. Needs Debian's package postgresql and requirements-team.txt.
#
#     team/tracking_server.sh FOLDER [PORT] [HOST]       port 5000 of 127.0.0.1 unless said otherwise
#
# FOLDER keeps database and artifacts; the same command goes on with them. Ctrl-C stops both servers.
set -euo pipefail

folder=$(realpath -m "${1:?usage: $0 FOLDER [PORT] [HOST]}")
port=${2:-5000}
host=${3:-127.0.0.1}
binaries=$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -1 || true)
[ -n "$binaries" ] || { echo "error: PostgreSQL is missing: apt-get install postgresql" >&2; exit 1; }
command -v mlflow >/dev/null || { echo "error: mlflow is missing: source .venv/bin/activate" >&2; exit 1; }

as=()
if [ "$(id -u)" = 0 ]; then # PostgreSQL refuses to run as root
  as=(setpriv --reuid=postgres --regid=postgres --init-groups)
fi
mkdir -p "$folder/database" "$folder/artifacts"
if [ "$(id -u)" = 0 ]; then
  chown postgres "$folder/database"
  "${as[@]}" test -x "$folder/database" || { echo "error: the user postgres may not enter $folder" >&2; exit 1; }
fi

database=$folder/database
cd "$folder"
if [ ! -e "$database/PG_VERSION" ]; then
  "${as[@]}" "$binaries/initdb" -D "$database" -U mlflow --auth=trust --encoding=UTF8 >/dev/null
fi
# No TCP port: a socket in the folder, which only this machine's mlflow server opens.
"${as[@]}" "$binaries/pg_ctl" -D "$database" -w -l "$database/log" -o "-c listen_addresses='' -k $database" start >/dev/null
server=
stop() {
  [ -z "$server" ] || { kill "$server" && wait "$server"; } 2>/dev/null || true
  "${as[@]}" "$binaries/pg_ctl" -D "$database" -m fast -w stop >/dev/null
}
trap stop EXIT
trap 'exit 130' INT TERM
"${as[@]}" "$binaries/psql" -h "$database" -U mlflow -d postgres -tAc "SELECT 1 FROM pg_database WHERE datname = 'mlflow'" |
  grep -q 1 || "${as[@]}" "$binaries/createdb" -h "$database" -U mlflow mlflow

mlflow server --host "$host" --port "$port" --backend-store-uri "postgresql://mlflow@/mlflow?host=$database" \
  --artifacts-destination "$folder/artifacts" --serve-artifacts &
server=$!
wait "$server"
