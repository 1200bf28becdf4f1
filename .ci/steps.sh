# SPDX-License-Identifier: Apache-2.0
# The part that .ci/run and .ci/full share: named and timed steps, and the README's own commands.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off PIP_QUIET=2
# Modules are compiled at their first import, and then for all processes. Most are never imported.
export PIP_COMPILE=no
unset PYTHONDONTWRITEBYTECODE
export NO_MKDOCS_2_WARNING=1 # an advertisement, not a warning of this build
unset PORTAKV_BACKEND PYTHONPATH # test neither a forced backend nor another tree
# Steps change folders, and .ci/full works in a clone.
[[ -z ${STEP_RESULTS:-} ]] || STEP_RESULTS=$(realpath -m "$STEP_RESULTS")
timings=() now= summary=

# in_a_clone COMMAND...: run it in a copy of this tree. The copy's folder is called `portakv`, as a
# reader's clone is, below a folder with a space in its name: nothing may depend on either name. Ends
# this process with the command's status. The copy is removed; its files in build/ are copied back.
in_a_clone() {
    [[ $PWD != *" "*/portakv ]] || return 0
    local root tree status=0
    root=$(mktemp -d)
    tree="$root/a folder/portakv"
    trap 'rm -rf "$root"' EXIT
    git clone -q --no-hardlinks . "$tree"
    git ls-files -z --cached --others --exclude-standard --deduplicate \
        | xargs -0 -r sh -c 'for each; do [ ! -e "$each" ] || printf "%s\0" "$each"; done' sh \
        | tar --null -T - -cf - | tar -xf - -C "$tree"
    git ls-files -z --deleted | (cd "$tree" && xargs -0 -r rm -f)
    (cd "$tree" && "$@") || status=$?
    mkdir -p build
    cp -r "$tree/build/." build/ 2>/dev/null || true
    rm -rf "$root"
    trap - EXIT
    exit "$status"
}

# Print the table of steps, and write it to build/. The last line is the summary of the tests.
report() {
    local status=$?
    mkdir -p build
    {
        printf '\n%-44s %8s %15s\n' "CI step" "seconds" "of a processor"
        ((${#timings[@]} == 0)) || printf '%-44s %8d %15d\n' "${timings[@]}"
        printf '%-44s %8d %15d\n' "all" "$SECONDS" "$(processor "$$")"
        ((status == 0)) || printf 'CI failed in the step "%s", status %d.\n' "$now" "$status"
        [[ -z $summary ]] || printf '%s\n' "$summary"
    } | tee "build/$(basename "$0")-times.txt"
}
trap report EXIT

# results_of NAME: have pytest write what .ci/compatibility.py reads, the numbers of tests of a step of an
# engine, if STEP_RESULTS names a folder. Next to them lies the commit that ran, with -dirty after other changes,
# and the date. No name has a colon: the host of the repository keeps no such files of a workflow.
results_of() {
    [[ -n ${STEP_RESULTS:-} ]] || return 0
    unset PYTEST_ADDOPTS # which names the results of the last step
    [[ $1 =~ \ [0-9.]+:\  ]] || return 0
    mkdir -p "$STEP_RESULTS"
    local file=$STEP_RESULTS/${1//:/} commit
    rm -f "$file.xml" # of an earlier run
    commit=$(git describe --always --dirty --abbrev=12 --exclude '*')
    printf '%s %s\n' "$commit" "$(date -u +%F)" >"$file.commit"
    # In double quotes: names of steps have apostrophes.
    export PYTEST_ADDOPTS="--junitxml=\"$file.xml\" -o \"junit_suite_name=$1\""
}

# processor SHELL: print the seconds of a processor that a shell has taken, with all processes that it has waited for.
processor() {
    local stat
    stat=$(<"/proc/$1/stat")
    read -ra stat <<<"${stat##*) }"
    echo $(((stat[11] + stat[12] + stat[13] + stat[14]) / $(getconf CLK_TCK)))
}

# step NAME COMMAND...: run it in this shell, because the README's command activates .venv.
step() {
    local began=$SECONDS shell=$BASHPID used
    used=$(processor "$shell")
    now=$1
    shift
    results_of "$now"
    printf '\n=== %s\n' "$now"
    "$@" || exit
    timings+=("$now" $((SECONDS - began)) $(($(processor "$shell") - used)))
}

# begin COMMAND...: run it in the background, until a later step calls `ended COMMAND...`.
declare -A output process
begin() {
    unset PYTEST_ADDOPTS # which names the results of the last step
    output[$*]=$(mktemp)
    "$@" >"${output[$*]}" 2>&1 &
    process[$*]=$!
}

# ended COMMAND...: wait for the command that `begin` started, print its output, return its status.
ended() {
    local status=0
    wait "${process[$*]}" || status=$?
    cat "${output[$*]}"
    rm -f "${output[$*]}"
    return "$status"
}

readme() {
    local command
    command=$(python3 .ci/readme_command.py "$1") || return
    printf '$ %s\n' "$command"
    eval "$command"
}

# tests COMMAND...: run it and keep its last line for the report.
tests() {
    local log status=0
    log=$(mktemp)
    "$@" 2>&1 | tee "$log" || status=$?
    summary=$(tail -n 1 "$log")
    rm -f "$log"
    return "$status"
}
