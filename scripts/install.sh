# Sourced by run_local.sh and run_tests.sh: makes .venv beside this project and installs what pyproject, setup.py and constraints.txt say.
OLDPWD_AT_START=${OLDPWD:-$PWD}

install_into_venv() {  # $1: extras, comma separated
    local python=${PYTHON:-python3} stamp
    stamp=$(cat setup.py constraints.txt | cksum | cut -d' ' -f1)
    if [ ! -x .venv/bin/python ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed; set PYTHON to one." >&2; exit 1; }
        "$python" -m venv .venv
    fi
    # What was installed is remembered by extras and by the files that decide versions, so that a second start takes no time.
    local done_file=.venv/installed
    touch "$done_file"
    if ! grep -qx "$stamp $1" "$done_file"; then
        echo "installing camenn[$1] into .venv (the first time fetches a few GB) ..."
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$1]"
        echo "$stamp $1" >> "$done_file"
    fi
    export PATH="$PWD/.venv/bin:$PATH"
    # Waiting threads that spin cost more than they save where cores are shared.
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
}
