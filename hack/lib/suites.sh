# The test suites, one function each.
#
# To be sourced. It defines
#   SUITES, FULL_SUITES     names, in the order in which they run
#   suite_about NAME        prints what the suite shows, in one line
#   suite_NAME              runs it; non-zero if anything is wrong. A line `summary: …` of its output is for the summary
#   suite_prepare NAME…     makes the slow parts that these suites will ask for; meant for the background
#
# Each runs in a shell of its own, with `set -euo pipefail`, in the repository's root.

_suites_lib=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=hack/lib/build.sh
. "$_suites_lib/build.sh"
# shellcheck source=hack/lib/parts.sh
. "$_suites_lib/parts.sh"

_suites_root=$(cd "$_suites_lib/../.." && pwd)

# shellcheck disable=SC2034 # hack/test reads both
SUITES=(lint unit dist deny fuzz conformance e2e)
# shellcheck disable=SC2034
FULL_SUITES=(conformance134 e2e134 soak)

suite_about() {
    case $1 in
    lint) printf 'format, clippy, shellcheck and the house rules\n' ;;
    unit) printf 'unit, property and transcript tests of every crate; golden bytes; layering\n' ;;
    dist) printf 'the release binaries: hsmd and hsmctl are static, hsm-token needs glibc 2.28 or older, neither tells where it was built\n' ;;
    deny) printf 'licences, sources and bans of the dependencies; advisories where the database can be reached\n' ;;
    fuzz) printf 'every parser from the committed corpus, FUZZ_SECONDS (default 5) each\n' ;;
    conformance) printf 'kube-apiserver'"'"'s own KMS client, 1.37, against the release binaries\n' ;;
    e2e) printf 'real etcd and kube-apiserver 1.37 over the release binaries\n' ;;
    conformance134) printf 'as conformance, with the client of 1.34 (3 minutes more to compile)\n' ;;
    e2e134) printf 'as e2e, with kube-apiserver 1.34 (13 minutes more to build, the first time)\n' ;;
    soak) printf 'SOAK_ROUNDS (default 5) times e2e'"'"'s kills under write load, and a minute of fuzzing for each parser\n' ;;
    esac
}

suite_prepare() {
    local name
    for name in "$@"; do
        case $name in
        deny) cargo_tool cargo-deny >/dev/null ;;
        fuzz | soak) need_nightly && cargo_tool cargo-fuzz >/dev/null ;;
        conformance) (cd tests/conformance && go mod download) ;;
        conformance134) (cd tests/conformance && go mod download -modfile=go134.mod) ;;
        esac || return
    done
    for name in "$@"; do
        case $name in
        e2e | soak) part etcd && part kube-apiserver ;;
        e2e134) part etcd && part kube-apiserver-1.34 ;;
        esac >/dev/null || return
    done
}

suite_lint() {
    local scripts status=0
    need git shellcheck
    # What is asked of tracked files would be true of none.
    git rev-parse --is-inside-work-tree >/dev/null
    # All of them, even after one has failed: each is quick to mend.
    cargo fmt --all --check || status=1
    # The fuzz targets are a workspace of their own; what they mount of the daemon was looked at above.
    rustfmt --edition 2024 --check tests/fuzz/fuzz_targets/*.rs || status=1
    _suites_gofmt || status=1
    mapfile -t scripts < <(git ls-files hack .ci)
    shellcheck --shell=bash --external-sources "${scripts[@]}" || status=1
    _suites_tidy || status=1
    cargo clippy --workspace --all-targets --locked -- -D warnings || status=1
    return "$status"
}

_suites_gofmt() {
    local badly
    badly=$(git ls-files 'tests/*.go' | xargs gofmt -l)
    [ -z "$badly" ] || {
        printf 'error: not as gofmt writes it:\n%s\n' "$badly"
        return 1
    }
}

# House rules that no linter knows.
_suites_tidy() {
    local file status=0 first
    while IFS= read -r file; do
        IFS= read -r first <"$file" || true
        [[ $first = '//!'* ]] || {
            printf '%s: does not begin with //! and what it is for\n' "$file"
            status=1
        }
    done < <(git ls-files '*.rs')
    # Written so that these lines do not find themselves.
    _suites_absent 'unfinished work; finish it or file an issue' '\b(TO''DO|FIX''ME|X''XX)\b' || status=1
    _suites_absent 'a path of some machine' '(^|[^]}[:alnum:]_/.-])/(ro''ot|wo''rk|home/[a-z])/' || status=1
    return "$status"
}

# WHAT PATTERN: no tracked text may match. Sums and locks are not ours to write, and Go's name modules.
_suites_absent() {
    ! git grep -nIE -e "$2" -- . ':!*.sum' ':!*.lock' ':!LICENSE' || {
        printf 'error: %s\n' "$1"
        return 1
    }
}

suite_unit() {
    need opencryptoki
    HSM_TEST_KRYOPTIC=$(part kryoptic)
    export HSM_TEST_KRYOPTIC
    cargo test --workspace --exclude e2e --locked --no-fail-fast
}

suite_dist() {
    local hsmd=target/dist/hsmd hsmctl=target/dist/hsmctl token=target/dist/hsm-token highest program status=0
    need binutils
    build_dist
    highest=$(objdump -T "$token" | grep -o 'GLIBC_[0-9.]*' | sort -uV | tail -n 1)
    printf 'hsm-token: highest symbol version %s\n' "$highest"
    [ "$(printf '%s\nGLIBC_2.28\n' "$highest" | sort -V | tail -n 1)" = GLIBC_2.28 ] || {
        printf 'error: hsm-token needs %s, but has to start on glibc 2.28\n' "$highest"
        status=1
    }
    # What a vendor's folder is sure to hold: glibc itself.
    if readelf -dW "$token" | grep NEEDED | grep -vE '\[(libc\.so\.6|libm\.so\.6|libdl\.so\.2|libpthread\.so\.0|ld-linux-x86-64\.so\.2)\]'; then
        printf 'error: hsm-token needs a library besides glibc\n'
        status=1
    fi
    for program in "$hsmd" "$hsmctl"; do
        if readelf -lW "$program" | grep -w INTERP || readelf -dW "$program" | grep NEEDED; then
            printf 'error: %s is not static\n' "$program"
            status=1
        fi
    done
    for program in "$hsmd" "$hsmctl" "$token"; do
        _suites_tells_nothing "$program" || status=1
    done
    "$hsmd" --version
    "$hsmctl" --version
    ls -l "$hsmd" "$hsmctl" "$token"
    return "$status"
}

# Neither the repository's place nor the builder's home may be read out of a binary.
_suites_tells_nothing() {
    local place places=("${HOME%/}/" "${CARGO_HOME:-$HOME/.cargo}/")
    # `/src/` would be found in `/talos-hsm/src/`, which stands there in place of it.
    [[ $_suites_root != /*/* ]] || places+=("$_suites_root/")
    for place in "${places[@]}"; do
        ! grep -aoF -m 3 "$place" "$1" || {
            printf 'error: %s contains the path %s of the machine that built it\n' "$1" "$place"
            return 1
        }
    done
}

suite_deny() {
    local deny said status=0
    deny=$(cargo_tool cargo-deny)
    "$deny" --locked check bans licenses sources
    said=$("$deny" --locked check advisories 2>&1) || status=$?
    printf '%s\n' "$said"
    if [[ $said = *'failed to fetch advisory database'* ]]; then
        printf 'summary: advisories were not checked, their database cannot be reached from here\n'
        return 0
    fi
    return "$status"
}

suite_fuzz() {
    local fuzz targets target built
    need g++
    need_nightly
    fuzz=$(cargo_tool cargo-fuzz)
    # In the cache: with the sanitizer, the dependencies take minutes, and they are the same for every clone.
    built=$(cache_root)/fuzz-build
    PATH=$(dirname "$fuzz"):$PATH cargo +nightly fuzz build --fuzz-dir tests/fuzz --target-dir "$built"
    built=$built/x86_64-unknown-linux-gnu/release
    mapfile -t targets < <(cd tests/fuzz/fuzz_targets && printf '%s\n' *.rs | sed 's/\.rs$//')
    for target in "${targets[@]}"; do
        [ -d "tests/fuzz/corpus/$target" ] || {
            printf 'error: %s has no corpus in tests/fuzz/corpus/%s\n' "$target" "$target"
            return 1
        }
    done
    export -f _suites_fuzz _suites_machine_stood_still
    printf '%s\n' "${targets[@]}" | xargs -P "$(nproc)" -I '{}' \
        bash -euo pipefail -c '_suites_fuzz "$@"' fuzz '{}' "$built" "${FUZZ_SECONDS:-5}"
}

# TARGET FOLDER SECONDS: what it learns goes to a folder that is thrown away; the corpus is changed by hand only.
_suites_fuzz() {
    local target=$1 built=$2 seconds=$3 learnt found=tests/fuzz/artifacts/$1 said status=0
    learnt=$(mktemp -d)
    rm -rf "$found"
    mkdir -p "$found"
    # A parser takes microseconds. The limits are far above that and below what a node has.
    said=$("$built/$target" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 \
        -artifact_prefix="$found/" "$learnt" "tests/fuzz/corpus/$target" 2>&1) || status=$?
    rm -rf "$learnt"
    if [ "$status" -eq 0 ]; then
        printf '%-14s %s runs, none crashed\n' "$target" "$(sed -n 's/^stat::number_of_executed_units: *//p' <<<"$said")"
    elif _suites_machine_stood_still "$built/$target" "$found"; then
        printf 'summary: %s stopped early: the machine stood still for 10 s (the input takes no time on its own)\n' "$target"
    else
        printf '%s\n' "$said" | tail -n 40
        printf 'error: %s failed; keep what is in %s as a vector, and run it again with: %s FILE\n' \
            "$target" "$found" "$built/$target"
        return 1
    fi
}

# PROGRAM FOLDER: a time-out is one of the clock on the wall. It counts if it happens again.
_suites_machine_stood_still() {
    local inputs
    inputs=("$2"/timeout-*)
    [ ${#inputs[@]} -eq 1 ] && [ -e "${inputs[0]}" ] && [ -z "$(find "$2" -name 'crash-*' -o -name 'oom-*' -o -name 'leak-*')" ] &&
        "$1" -timeout=5 -runs=1 "${inputs[0]}" >/dev/null 2>&1
}

suite_conformance() {
    need softhsm2 opensc
    build_dist
    _suites_conformance
}

suite_conformance134() {
    need softhsm2 opensc
    build_dist
    _suites_conformance -modfile=go134.mod -tags=kube134
}

_suites_conformance() {
    (
        cd tests/conformance || exit
        # -count=1: Go would not notice that the daemon is another one.
        HSMD=$_suites_root/target/dist/hsmd go test -count=1 -timeout 15m "$@" ./...
    )
}

suite_e2e() {
    _suites_e2e kube-apiserver
}

suite_e2e134() {
    _suites_e2e kube-apiserver-1.34
}

# SERVER [CARGO TEST ARGUMENT…]
_suites_e2e() {
    local server=$1
    shift
    need softhsm2 opensc curl openssl util-linux
    build_dist
    # Assigned before exported: a failed command in `export` goes unnoticed.
    ETCD=$(part etcd)
    KUBE_APISERVER=$(part "$server")
    HSMD=$_suites_root/target/dist/hsmd
    export ETCD KUBE_APISERVER HSMD
    cargo test -p e2e --locked --no-fail-fast "$@" -- --test-threads=1
}

suite_soak() {
    local round
    FUZZ_SECONDS=60 suite_fuzz
    for ((round = 1; round <= ${SOAK_ROUNDS:-5}; round++)); do
        printf 'round %d\n' "$round"
        _suites_e2e kube-apiserver --test kube_apiserver
    done
}
