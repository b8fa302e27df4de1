# shellcheck shell=bash
# The benchmark's surroundings: a token, a place that looks like kube-apiserver's, and the programs.
#
# To be sourced. It defines
#   bench_kms WHO OPTION…    measures WHO (a list like raw,echo,hsmd,peer); the options are hsm-bench's own
#   bench_wraps              measures every wrap on each software token

_bench_lib=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=hack/lib/parts.sh
. "$_bench_lib/parts.sh"
# shellcheck source=hack/lib/build.sh
. "$_bench_lib/build.sh"

_bench_root=$(cd "$_bench_lib/../.." && pwd)
_bench_token=rciis-bench
_bench_key=k8s-secrets-kek
# kube-apiserver's user on Talos, and the one the module runs as.
_bench_caller=65534
_bench_host=64500

bench_kms() {
    local who=$1 arguments=()
    shift
    [ "$(id -u)" -eq 0 ] || {
        printf 'error: the benchmark calls hsmd as kube-apiserver does, from its user and cgroup\nhint: run it as root\n' >&2
        return 1
    }
    need softhsm2 opensc gcc libc6-dev || return
    need_rust || return
    _bench_load_generator || return
    arguments=(--who "$who")
    case ,$who, in *,hsmd,*)
        printf 'building hsmd and hsm-token ...\n' >&2
        build_dist || return
        ;;
    esac
    case ,$who, in *,peer,*)
        arguments+=(--peer "$(part kms-peer)") || return
        ;;
    esac
    (
        trap _bench_clean EXIT
        # hsm-bench gets Ctrl-C too and ends what it started; only then is there nothing left in the cgroup.
        trap 'exit 130' INT
        trap 'exit 143' TERM
        _bench_place && _bench_make_token && _bench_configure || exit
        "$_bench_root/target/release/hsm-bench" kms --folder "$_bench_dir" \
            --hsmd "$_bench_root/target/dist/hsmd" --hsmd-config "$_bench_dir/hsmd.yaml" --hsmd-socket "$_bench_dir/kms.sock" \
            --module "$_bench_module" --token-label "$_bench_token" --key-label "$_bench_key" --pin-file "$_bench_dir/pin" \
            --caller-uid "$_bench_caller" --caller-cgroup "$_bench_cgroup" "${arguments[@]}" "$@" || {
            status=$?
            _bench_logs
            exit "$status"
        }
    )
}

bench_wraps() {
    need softhsm2 opensc gcc libc6-dev || return
    need_rust || return
    HSM_TEST_KRYOPTIC=$(part kryoptic) || return
    export HSM_TEST_KRYOPTIC
    # One at a time: each measures.
    (cd "$_bench_root" && cargo test --release --quiet --locked -p hsm-token --test latency -- --ignored --nocapture --test-threads=1)
}

_bench_load_generator() {
    printf 'building the load generator ...\n' >&2
    (cd "$_bench_root" && cargo build --release --quiet --locked -p hsm-bench </dev/null >&2)
}

# A work folder, and the two marks by which hsmd knows a kube-apiserver: its static pod's cgroup and its log folder.
_bench_place() {
    local pod
    _bench_dir=$(mktemp -d -t talos-hsm-bench.XXXXXX) || return
    # The caller has to come through to the sockets; what is secret in it has its own mode.
    chmod 755 "$_bench_dir"
    pod=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    mkdir -p "$_bench_dir/pods/kube-system_kube-apiserver-bench_$pod" "$_bench_dir/state"
    _bench_cgroup2=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
    [ -n "$_bench_cgroup2" ] || {
        printf 'error: no cgroup2 file system is mounted; hsmd tells kube-apiserver by its cgroup\n' >&2
        return 1
    }
    _bench_cgroup=$_bench_cgroup2/kubepods/burstable/pod$pod/bench
    mkdir -p "$_bench_cgroup"
}

_bench_make_token() {
    local pin
    _bench_module=$(_bench_softhsm) || return
    mkdir -p "$_bench_dir/tokens"
    printf 'directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n' \
        "$_bench_dir/tokens" >"$_bench_dir/softhsm2.conf"
    export SOFTHSM2_CONF=$_bench_dir/softhsm2.conf
    pin=$(od -An -N8 -tx1 /dev/urandom | tr -d ' \n')
    (umask 077 && printf '%s\n' "$pin" >"$_bench_dir/pin")
    # The token and its PINs live as long as the benchmark does, so argv may show them.
    softhsm2-util --init-token --free --label "$_bench_token" --so-pin "$pin" --pin "$pin" >/dev/null || return
    pkcs11-tool --module "$_bench_module" --token-label "$_bench_token" --login --pin "$pin" --keygen --key-type AES:32 \
        --label "$_bench_key" --id 01 --usage-decrypt --sensitive >/dev/null 2>&1 || {
        printf 'error: pkcs11-tool could not make the key "%s"\n' "$_bench_key" >&2
        return 1
    }
    chown -R "$_bench_host:$_bench_host" "$_bench_dir/tokens"
}

_bench_softhsm() {
    local place
    for place in /usr/lib/softhsm /usr/lib/x86_64-linux-gnu/softhsm /usr/lib64/softhsm /usr/lib64/pkcs11 /usr/local/lib/softhsm; do
        [ -e "$place/libsofthsm2.so" ] || continue
        printf '%s/libsofthsm2.so\n' "$place"
        return
    done
    printf 'error: libsofthsm2.so is not where distributions put it\nhint: apt-get install softhsm2\n' >&2
    return 1
}

_bench_configure() {
    cat >"$_bench_dir/hsmd.yaml" <<YAML
cluster: bench
tokens:
  - name: main
    uri: pkcs11:token=$_bench_token
    module: $_bench_module
    pin: {file: $_bench_dir/pin}
    host:
      uid: $_bench_host
      gid: $_bench_host
      env: {SOFTHSM2_CONF: $_bench_dir/softhsm2.conf}
      read_only: [$_bench_dir/softhsm2.conf]
      read_write: [$_bench_dir/tokens]
kms:
  listen: [{path: $_bench_dir/kms.sock, mode: "0600", owner: "$_bench_caller:$_bench_caller"}]
  keys:
    - uri: pkcs11:token=$_bench_token;object=$_bench_key;type=secret-key
      epoch: 1
      state: active
      backup: acknowledged
  peers: {pod_logs: $_bench_dir/pods}
state_dirs: [$_bench_dir/state]
health: {listen: unix://$_bench_dir/health.sock}
YAML
}

# The servers' last words, when something failed.
_bench_logs() {
    local log
    for log in "$_bench_dir"/*.log; do
        [ -s "$log" ] || continue
        printf -- '--- the end of %s\n' "${log##*/}" >&2
        tail -n 15 "$log" >&2
    done
}

_bench_clean() {
    local folder=${_bench_cgroup-}
    [ -z "${_bench_dir-}" ] || rm -rf "$_bench_dir"
    [ -n "$folder" ] || return 0
    # A cgroup can be removed once the kernel has buried its last process. Its parents only when they are empty: a
    # kubelet or another run may use them.
    local tries=0
    until rmdir "$folder" 2>/dev/null || [ $((tries += 1)) -ge 50 ]; do
        sleep 0.1
    done
    while folder=${folder%/*} && [ "$folder" != "$_bench_cgroup2" ]; do
        rmdir "$folder" 2>/dev/null || break
    done
}
