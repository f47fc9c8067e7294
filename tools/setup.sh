#!/usr/bin/env bash
# Install what this checkout misses: system packages, the virtual environment, DeepSpeed's CPU extension.
#
# Called by `make setup`, from the root of the checkout. What is done already is left alone: stamps in build/setup hold
# a key of what was installed, and a set-up that was cut off (Ctrl-C, a lost machine) is found and made again.
# Settings from the environment: PYTHON (the interpreter that the virtual environment is made of) and pip's own.
set -euo pipefail

cd "$(dirname "$0")/.."
checkout=$PWD
venv=$checkout/.venv
stamps=$checkout/build/setup
extensions=$checkout/build/torch_extensions
policy_file=/usr/sbin/policy-rc.d
policy_mark='# made by hydro_slurm tools/setup.sh'

# Jobs of other users than the one who installs must be able to read what is installed.
umask 022
# The virtual environment is not made of itself, even when it is active. Debian keeps daemons in sbin, which an ordinary
# user's PATH lacks.
PATH=:$PATH:
while [[ $PATH == *":$venv/bin:"* ]]; do
    PATH=${PATH//":$venv/bin:"/:}
done
PATH=${PATH#:}/usr/sbin:/sbin
export PATH

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

# --- system packages -------------------------------------------------------------------------------------------------

# What must be there, and the Debian package that brings it.
commands=(
    slurmctld:slurmctld slurmd:slurmd srun:slurm-client munged:munge
    g++:g++ gcc:gcc ninja:ninja-build make:make git:git
    unshare:util-linux nsenter:util-linux setpriv:util-linux flock:util-linux ps:procps
)

missing_packages() {
    local entry
    for entry in "${commands[@]}"; do
        command -v "${entry%%:*}" >/dev/null || printf '%s\n' "${entry#*:}"
    done
    if [[ -z $(find_python) ]]; then
        printf '%s\n' python3 python3-venv python3-dev
        return
    fi
    # A virtual environment needs ensurepip, and DeepSpeed's extension Python's headers.
    "$(find_python)" -c 'import ensurepip, venv' 2>/dev/null || printf 'python3-venv\n'
    "$(find_python)" - <<'END' 2>/dev/null || printf 'python3-dev\n'
import pathlib, sysconfig
raise SystemExit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())
END
}

remove_policy() {
    if grep -qsF "$policy_mark" "$policy_file"; then
        rm -f "$policy_file"
    fi
}

install_packages() {
    local missing
    mapfile -t missing < <(missing_packages | sort -u)
    [[ ${#missing[@]} -gt 0 ]] || return 0
    command -v apt-get >/dev/null ||
        fail "this machine lacks what Debian has in the packages ${missing[*]}, and has no apt-get; install them its way"
    [[ $(id -u) -eq 0 ]] ||
        fail "missing packages: ${missing[*]}; run: sudo apt-get install --no-install-recommends ${missing[*]}"

    say "installing packages: ${missing[*]}"
    # The packages start their daemons, but the private clusters here bring their own and the machine may have a Slurm
    # of its own: nothing is started. Whatever policy the machine has stays.
    remove_policy
    if [[ ! -e $policy_file ]]; then
        trap remove_policy EXIT
        printf '#!/bin/sh\n%s\nexit 101\n' "$policy_mark" >"$policy_file"
        chmod 755 "$policy_file"
    fi
    apt-get -q update
    DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "${missing[@]}"
    remove_policy
    trap - EXIT
    hash -r
    mapfile -t missing < <(missing_packages | sort -u)
    [[ ${#missing[@]} -eq 0 ]] || fail "still missing after apt-get: ${missing[*]}; is another PYTHON set (PYTHON=${PYTHON:-})?"
}

# --- virtual environment ---------------------------------------------------------------------------------------------

new_enough() {
    "$1" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null
}

# Prints the interpreter to use; nothing where there is none at all.
find_python() {
    if [[ -n ${PYTHON:-} ]]; then
        command -v "$PYTHON" || true
    elif new_enough /usr/bin/python3; then
        printf '/usr/bin/python3\n'
    else
        command -v python3 || true
    fi
}

describe_python() {
    "$1" -c 'import sys; print(sys.implementation.cache_tag, sys.base_prefix)'
}

install_venv() {
    local python=$1 described=$2 key=$3
    # Inside the virtual environment, so that whatever removes it removes the mark too.
    local unfinished=$venv/.unfinished

    if [[ -e $unfinished ]]; then
        say "the last set-up of .venv was cut off: making it again"
        rm -rf "$venv"
    elif [[ -e $venv && $(describe_python "$venv/bin/python" 2>/dev/null) != "$described" ]]; then
        say ".venv belongs to another Python than $python: making it again"
        rm -rf "$venv"
    fi
    mkdir -p "$venv"
    touch "$unfinished"
    if [[ ! -x $venv/bin/pip ]]; then
        say "making .venv with $python ($described)"
        "$python" -m venv "$venv"
    fi

    local pip=("$venv/bin/python" -m pip --disable-pip-version-check install) torch
    [[ -t 1 ]] || pip+=(-q)
    torch=$(grep -m1 '^torch==' constraints.txt)
    say "installing $torch"
    "${pip[@]}" "$torch"
    say "installing hydro-slurm with its extras (constraints.txt has the versions)"
    DS_BUILD_OPS=0 "${pip[@]}" -c constraints.txt -e '.[trials,sim,deepspeed,dev]'
    # The reference that muP's factors are tested against. It asks for torchvision, which it does not use.
    "${pip[@]}" -c constraints.txt --no-deps mup
    rm "$unfinished"
    printf '%s\n' "$key" >"$stamps/venv"
}

# --- DeepSpeed's CPU extension ---------------------------------------------------------------------------------------

build_extension() {
    local key=$1
    say "building DeepSpeed's CPU extension (once; it takes a minute or two)"
    # Also removes the lock that a build which was cut off leaves, on which every later load would wait for ever.
    rm -rf "$extensions"
    mkdir -p "$extensions"
    PATH=$venv/bin:$PATH DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$extensions MAX_JOBS=$(nproc) \
        "$venv/bin/python" - >"$stamps/extension.log" 2>&1 <<'END' || {
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

ShareMemCommBuilder().load(verbose=True)
END
        tail -n 30 "$stamps/extension.log" >&2
        fail "DeepSpeed's CPU extension does not build; the whole output is in build/setup/extension.log"
    }
    printf '%s\n' "$key" >"$stamps/extension"
}

# ---------------------------------------------------------------------------------------------------------------------

holds() { [[ -f $stamps/$1 && $(<"$stamps/$1") == "$2" ]]; }

main() {
    local python described key
    mkdir -p "$stamps"
    # Two makes at a time take turns.
    exec 9>"$stamps/lock"
    flock -n 9 || {
        say "waiting for another set-up of this checkout"
        flock 9
    }
    [[ -z ${PYTHON:-} || -n $(find_python) ]] || fail "PYTHON=$PYTHON is no command"
    install_packages

    python=$(find_python)
    new_enough "$python" || fail "$python is $("$python" -V 2>&1), needed Python 3.11 or newer; run: make PYTHON=/path/to/python3.11 …"
    described=$(describe_python "$python")
    # The checkout's path is part of it: a virtual environment does not survive being moved.
    key=$(printf '%s\n' "$checkout" "$described" "$(cat pyproject.toml constraints.txt)" | sha256sum | cut -d' ' -f1)
    if ! holds venv "$key" || [[ -e $venv/.unfinished || ! -x $venv/bin/hydro ]]; then
        install_venv "$python" "$described" "$key"
    fi
    key=$(printf '%s\n' "$checkout" "$described" "$(grep -E '^(torch|deepspeed)==' constraints.txt)" | sha256sum | cut -d' ' -f1)
    holds extension "$key" || build_extension "$key"
}

main
