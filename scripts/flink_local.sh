#!/usr/bin/env bash
# A standalone Flink cluster on this machine, for trying the pipelines on a real runner: one JobManager, two TaskManagers and a pool of SDK workers, each
# a process of its own. All of it listens on loopback only (docs/guides/flink.md).
#
#   scripts/flink_local.sh up       fetch what is missing (once), start, wait until it answers
#   scripts/flink_local.sh flags    the flags that send a camenn command there: camenn embed ... $(scripts/flink_local.sh flags)
#   scripts/flink_local.sh status   what runs; exit code 0 if all of it does
#   scripts/flink_local.sh down     stop it
#   scripts/flink_local.sh fetch    fetch only
#
# Needs Java 11 or 17, Maven, and camenn installed (PYTHON, or .venv). Settings, by environment variable: FLINK_CACHE (what is fetched), FLINK_STATE
# (configuration, logs, process ids), FLINK_REST_PORT, FLINK_WORKER_PORT, FLINK_TASKMANAGERS, FLINK_SLOTS (of each TaskManager), FLINK_PAIR (below).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${FLINK_CACHE:-$HOME/.cache/camenn/flink}
state=${FLINK_STATE:-$cache/state}
rest_port=${FLINK_REST_PORT:-8081}
worker_port=${FLINK_WORKER_PORT:-50000}
taskmanagers=${FLINK_TASKMANAGERS:-2}
slots=${FLINK_SLOTS:-2}
python=${PYTHON:-$here/.venv/bin/python}

# Beam publishes its job server for Flink as one jar; a Maven repository that lacks it may still have the parts, of an older Beam, from which the same jar
# is put together. Which pair is used is decided once, printed by `up` and `status`, and can be forced with FLINK_PAIR.
official_flink=1.20.3 official_minor=1.20
parts_flink=1.19.3 parts_minor=1.19 parts_beam=2.62.0

say() { printf '%s\n' "$*" >&2; }
die() { say "flink_local: $*"; exit 1; }
lacking() { say "flink_local: $*"; exit 3; }  # what this machine lacks, rather than what went wrong

need() { command -v "$1" >/dev/null || lacking "$1 is not installed. $2"; }

choose_pair() {
    if [ -n "${FLINK_PAIR:-}" ]; then pair=$FLINK_PAIR
    elif [ -f "$cache/pair" ]; then pair=$(cat "$cache/pair")
    else pair=; fi
    case "$pair" in official | parts | "") ;; *) die "FLINK_PAIR=$pair: must be official or parts." ;; esac
}

set_paths() {
    case "$pair" in
        official) flink=$official_flink job_server=$cache/beam-runners-flink-$official_minor-job-server-$beam.jar
                  words="Flink $official_flink, Beam's own job server $beam" ;;
        parts) flink=$parts_flink job_server=$cache/flink-job-server-$parts_minor-$parts_beam.jar
               words="Flink $parts_flink, job server put together from Beam $parts_beam (no jar of $official_minor/$beam in the Maven repository)" ;;
    esac
    dist=$cache/flink-$flink
}

maven() { mvn --batch-mode --quiet -Dstyle.color=never --update-snapshots "$@"; }

fetch() {
    need java "Install a Java runtime, 11 or 17."
    [ -x "$python" ] || die "$python is not there. Run ./run_tests.sh or ./run_local.sh once, or set PYTHON."
    beam=$("$python" -c 'import importlib.metadata; print(importlib.metadata.version("apache-beam"))')
    mkdir -p "$cache"
    choose_pair
    if [ "$pair" != parts ]; then
        pair_if_found=official; saved=$pair; pair=official; set_paths; pair=$saved
        if [ ! -f "$job_server" ]; then
            need mvn "Install Maven."
            say "fetching Beam's job server for Flink $official_minor ..."
            if maven org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy -DoutputDirectory="$cache" \
                -Dartifact="org.apache.beam:beam-runners-flink-$official_minor-job-server:$beam" >"$cache/maven.log" 2>&1
            then :
            elif [ "$pair" = official ]; then die "it cannot be fetched: $(grep -m1 ERROR "$cache/maven.log")"
            elif grep -Eq "Could not find artifact|was not found in" "$cache/maven.log"; then pair_if_found=parts
            else lacking "the Maven repository cannot be reached: $(grep -m1 ERROR "$cache/maven.log")"; fi
        fi
        pair=$pair_if_found
    fi
    set_paths
    if [ ! -f "$job_server" ]; then
        need mvn "Install Maven."
        say "putting the job server together from Beam $parts_beam (a minute) ..."
        local build; build=$(mktemp -d)
        cp "$here/scripts/flink_job_server.pom.xml" "$build/pom.xml"
        maven -f "$build/pom.xml" -Dbeam.version="$parts_beam" -Dflink.minor="$parts_minor" package >"$cache/maven.log" 2>&1 \
            || lacking "it cannot be put together: $(grep -m1 ERROR "$cache/maven.log")"
        mv "$build/target/flink-job-server-$parts_beam.jar" "$job_server"
        rm -rf "$build"
    fi
    # As Beam publishes it, it listens on every interface, here and in the TaskManagers.
    "$python" -m pipelines.runner.flink_jar "$job_server" >&2
    if [ ! -d "$dist" ]; then
        say "fetching Flink $flink ..."
        local download; download=$(mktemp -d)
        "$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --dest "$download" "apache-flink-libraries==$flink" \
            || lacking "the package apache-flink-libraries $flink cannot be fetched."
        mkdir "$download/dist"
        tar -xzf "$download/apache-flink-libraries-$flink.tar.gz" --strip-components=2 -C "$download/dist" \
            "apache-flink-libraries-$flink/deps/lib"
        mv "$download/dist" "$dist"
        rm -rf "$download"
    fi
    [ -n "${FLINK_PAIR:-}" ] || echo "$pair" >"$cache/pair"
}

opens=()
for package in java.io java.lang java.lang.invoke java.lang.reflect java.math java.net java.nio java.text java.time java.util java.util.concurrent \
    java.util.concurrent.atomic java.util.concurrent.locks sun.net.util sun.nio.ch; do
    opens+=("--add-opens=java.base/$package=ALL-UNNAMED")
done

write_configuration() {
    mkdir -p "$state/conf" "$state/logs" "$state/pids" "$state/tmp"
    cat >"$state/conf/config.yaml" <<EOF
jobmanager.rpc.address: localhost
jobmanager.rpc.port: $((rest_port + 1000))
jobmanager.bind-host: localhost
rest.address: localhost
rest.bind-address: localhost
rest.port: $rest_port
taskmanager.host: localhost
taskmanager.bind-host: localhost
taskmanager.numberOfTaskSlots: $slots
taskmanager.cpu.cores: $slots.0
# A job of few slots has all TaskManagers work, rather than one of them all.
cluster.evenly-spread-out-slots: true
taskmanager.memory.framework.heap.size: 128m
taskmanager.memory.framework.off-heap.size: 128m
taskmanager.memory.task.heap.size: 1024m
taskmanager.memory.task.off-heap.size: 0m
taskmanager.memory.managed.size: 384m
taskmanager.memory.network.min: 384m
taskmanager.memory.network.max: 384m
# A stage has dozens of shuffles, each of which asks for 512 buffers (16 MB) by default.
taskmanager.network.sort-shuffle.min-buffers: 64
taskmanager.memory.jvm-metaspace.size: 256m
taskmanager.memory.jvm-overhead.min: 192m
taskmanager.memory.jvm-overhead.max: 192m
# Beam is on the class path (see java_process), and its classes stay in use for a moment after a job ends.
classloader.resolve-order: parent-first
classloader.check-leaked-classloader: false
# A restarted job must find new workers, not the dead ones of its last attempt, which are kept for 20 s.
restart-strategy.type: fixed-delay
restart-strategy.fixed-delay.attempts: 2
restart-strategy.fixed-delay.delay: 22 s
# A killed process is missed soon, and a job that lacks slots then fails soon.
heartbeat.interval: 2000
heartbeat.timeout: 12000
slot.request.timeout: 20000
io.tmp.dirs: $state/tmp
EOF
    cat >"$state/conf/log4j.properties" <<'EOF'
rootLogger.level = INFO
rootLogger.appenderRef.file.ref = File
appender.file.type = File
appender.file.name = File
appender.file.fileName = ${sys:log.file}
appender.file.layout.type = PatternLayout
appender.file.layout.pattern = %d{ISO8601} %-5p %-60c %x - %m%n
EOF
}

alive() {  # name: whether the process whose id was kept still is that one
    local file=$state/pids/$1
    [ -f "$file" ] && ps -ww -o command= -p "$(cat "$file")" 2>/dev/null | grep -q "$state"
}

start() {  # name, command...: in the background, its id kept
    local name=$1; shift
    if alive "$name"; then return; fi
    nohup "$@" >"$state/logs/$name.out" 2>&1 </dev/null &
    echo $! >"$state/pids/$name"
}

java_process() {  # name, heap, class, arguments...
    local name=$1 heap=$2 class=$3; shift 3
    # Beam's classes must come from Flink's own class path: only then does Beam keep SDK workers from one stage to the next (--environment_cache_millis).
    local classpath; classpath=$(printf '%s:' "$dist"/lib/flink-dist-*.jar "$dist"/lib/log4j-*.jar)$job_server
    start "$name" java "-Xmx$heap" -XX:MaxMetaspaceSize=256m "${opens[@]}" -Dlog.file="$state/logs/$name.log" \
        -Dlog4j.configurationFile="file:$state/conf/log4j.properties" -cp "$classpath" "$class" --configDir "$state/conf" "$@"
}

answer() {  # TaskManagers and slots that the JobManager knows, or nothing
    "$python" - "$rest_port" <<'EOF' 2>/dev/null
import json, sys, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
overview = json.load(opener.open(f"http://localhost:{sys.argv[1]}/overview", timeout=5))
print(overview["taskmanagers"], overview["slots-total"], overview["jobs-running"])
EOF
}

workers_answer() { "$python" -c "import socket; socket.create_connection(('127.0.0.1', $worker_port), 2)" 2>/dev/null; }

up() {
    fetch
    write_configuration
    java_process jobmanager 768m org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint --executionMode cluster
    local n
    for n in $(seq "$taskmanagers"); do
        java_process "taskmanager-$n" 1152m org.apache.flink.runtime.taskexecutor.TaskManagerRunner
    done
    # All slots compute at once: together they use each core once.
    local cores threads; cores=$("$python" -c 'import os; print(os.cpu_count() or 1)')
    threads=$((cores / (taskmanagers * slots))); [ "$threads" -gt 0 ] || threads=1
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads} OMP_WAIT_POLICY=PASSIVE start workers "$python" -m pipelines.runner.worker_pool --port "$worker_port" --logs "$state/logs/workers"
    local waited=0
    until [ "$(answer | cut -d' ' -f1)" = "$taskmanagers" ] && workers_answer; do
        waited=$((waited + 1))
        if [ "$waited" -gt 90 ]; then tail -n 5 "$state"/logs/*.out >&2; die "it does not answer; the logs are in $state/logs"; fi
        sleep 1
    done
    status
}

status() {
    local all=0 name
    for name in jobmanager $(seq -f 'taskmanager-%g' "$taskmanagers") workers; do
        if alive "$name"; then say "$name: process $(cat "$state/pids/$name")"; else say "$name: not running"; all=1; fi
    done
    local found; found=$(answer) || true
    if [ -n "$found" ]; then
        set -- $found
        say "Flink answers at localhost:$rest_port: $1 TaskManagers, $2 slots, $3 jobs running"
    else say "Flink does not answer at localhost:$rest_port"; all=1; fi
    workers_answer || { say "no worker pool answers at localhost:$worker_port"; all=1; }
    [ -f "$state/logs/workers.out" ] && say "workers: $(grep -o 'camenn package [0-9a-f]*' "$state/logs/workers.out" | tail -1)"
    say "$words"
    say "logs: $state/logs"
    return $all
}

down() {
    local name waited
    for name in workers $(cd "$state/pids" 2>/dev/null && ls | grep '^taskmanager-' || true) jobmanager; do
        alive "$name" || { rm -f "$state/pids/$name"; continue; }
        kill "$(cat "$state/pids/$name")" 2>/dev/null || true
        waited=0
        while alive "$name"; do
            waited=$((waited + 1))
            if [ "$waited" = 40 ]; then kill -KILL "$(cat "$state/pids/$name")" 2>/dev/null || true; fi
            sleep 0.25
        done
        rm -f "$state/pids/$name"
        say "$name: stopped"
    done
}

flags() {
    echo "--runner=FlinkRunner --flink_master=localhost:$rest_port --flink_job_server_jar=$job_server" \
        "--environment_type=EXTERNAL --environment_config=localhost:$worker_port"
}

known() {  # for commands that only look: what was fetched earlier
    choose_pair
    [ -n "$pair" ] || die "nothing is fetched yet; run scripts/flink_local.sh up"
    beam=$("$python" -c 'import importlib.metadata; print(importlib.metadata.version("apache-beam"))')
    set_paths
}

case "${1:-}" in
    up) up ;;
    fetch) fetch; say "$words" ;;
    flags) known; flags ;;
    status) known; status ;;
    down) down ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; [ "${1:-}" = --help ] || [ "${1:-}" = -h ] || exit 2 ;;
esac
