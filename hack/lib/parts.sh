# The real peers that the tests and the demo run against, built from their own Go modules, and a second software token.
#
# To be sourced. It defines
#   part NAME    prints the path of that part's program; builds it into the cache first when it is not there
# with NAME one of
#   kube-apiserver        the version that the demo and the tests use
#   kube-apiserver-1.34   the oldest server that is still worth a run (hack/test --full)
#   etcd
#   kms-peer              a plain KMS v2 plugin of ours in Go, which the benchmark compares with
#   kryoptic              Kryoptic as a PKCS#11 module: a token with mechanisms that SoftHSM lacks. Under the GPL: it is
#                         loaded by tests and never shipped
#
# tests/parts holds a small Go module per peer that names it as a dependency; its go.mod and go.sum pin every byte. For
# Kryoptic it is a crate, with its Cargo.lock.

# shellcheck source=hack/lib/cache.sh
. "$(dirname "${BASH_SOURCE[0]}")/cache.sh"
# shellcheck source=hack/lib/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

_parts_tests=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../tests" && pwd)

part() {
    [ "$1" = kryoptic ] || _parts_need_go || return
    case $1 in
    kube-apiserver) _part_kube 1.37 "about 13 minutes" ;;
    kube-apiserver-1.34) _part_kube 1.34 "about 13 minutes" ;;
    etcd) _part_etcd ;;
    kms-peer) _part_kms_peer ;;
    kryoptic) _part_kryoptic ;;
    *)
        printf 'error: there is no part named "%s"\nhint: kube-apiserver, kube-apiserver-1.34, etcd, kms-peer or kryoptic\n' "$1" >&2
        return 2
        ;;
    esac
}

_part_kube() {
    local minor=$1 duration=$2 module=$_parts_tests/parts/kube-$1 version
    version=$(_parts_version "$module" k8s.io/kubernetes) || return
    # Without these the server calls itself v0.0.0-master and its feature gates believe it.
    local stamp=k8s.io/component-base/version
    _part_go kube-apiserver "$version" "$duration" "$module" k8s.io/kubernetes/cmd/kube-apiserver \
        "-s -w -X $stamp.gitVersion=v$version -X $stamp.gitMajor=1 -X $stamp.gitMinor=${minor#*.}"
}

_part_etcd() {
    local module=$_parts_tests/parts/etcd version
    version=$(_parts_version "$module" go.etcd.io/etcd/server/v3) || return
    _part_go etcd "$version" "about 2 minutes" "$module" go.etcd.io/etcd/server/v3 "-s -w"
}

_part_kms_peer() {
    # Its source is ours and changes, so the key covers the whole module; the C compiler is for its PKCS#11 binding.
    local module=$_parts_tests/bench/peer key folder
    command -v cc >/dev/null || {
        printf 'error: building kms-peer needs a C compiler\nhint: apt-get install build-essential\n' >&2
        return 1
    }
    key=$(_parts_key "$module"/go.mod "$module"/go.sum "$module"/*.go) || return
    folder=$(cached kms-peer "$key" "building kms-peer (about a minute)" _parts_build 1 "$module" . kms-peer "-s -w") || return
    printf '%s/kms-peer\n' "$folder"
}

_part_kryoptic() {
    local crate=$_parts_tests/parts/kryoptic version key folder
    version=$(sed -n 's/^kryoptic-lib = .*"=\([0-9.]*\)".*/\1/p' "$crate/Cargo.toml")
    key=$(_parts_key "$crate"/Cargo.toml "$crate"/Cargo.lock "$crate"/src/*.rs) || return
    folder=$(cached "kryoptic-$version" "$key" "building Kryoptic $version (first time only, about 2 minutes)" \
        _parts_build_kryoptic "$crate") || return
    printf '%s/libkryoptic_module.so\n' "$folder"
}

# CRATE FOLDER
_parts_build_kryoptic() {
    local crate=$1 folder=$2
    need_rust && need libclang-dev libssl-dev libsqlite3-dev || return
    # From the repository, so that the pinned compiler builds it.
    (cd "$crate" && CARGO_TARGET_DIR="$folder/build" cargo build --quiet --locked --release </dev/null) || return
    mv "$folder/build/release/libkryoptic_module.so" "$folder/" && rm -rf "$folder/build"
}

# NAME VERSION DURATION MODULE PACKAGE LDFLAGS: a program that the module only names, so its go.mod says it all.
_part_go() {
    local name=$1 version=$2 duration=$3 module=$4 package=$5 ldflags=$6 key folder
    key=$(_parts_key "$module/go.mod") || return
    folder=$(cached "$name-$version" "$key $ldflags" "building $name $version (first time only, $duration)" \
        _parts_build 0 "$module" "$package" "$name" "$ldflags") || return
    printf '%s/%s\n' "$folder" "$name"
}

# CGO MODULE PACKAGE NAME LDFLAGS FOLDER: builds FOLDER/NAME. The flags are the same for every part and every run, so
# that Go's own build cache helps across versions.
_parts_build() {
    local cgo=$1 module=$2 package=$3 name=$4 ldflags=$5 folder=$6
    CGO_ENABLED=$cgo go build -C "$module" -mod=readonly -trimpath -ldflags "$ldflags" -o "$folder/$name" "$package"
}

_parts_version() {
    local version
    version=$(sed -n "s#^require $2 v##p" "$1/go.mod")
    [ -n "$version" ] || {
        printf 'error: %s/go.mod does not require %s\n' "$1" "$2" >&2
        return 1
    }
    printf '%s\n' "$version"
}

_parts_key() {
    cat "$@" | sha256sum | cut -c1-16
}

_parts_need_go() {
    command -v go >/dev/null || {
        printf 'error: building the parts needs Go 1.26 or later\nhint: install it and put its bin folder into PATH\n' >&2
        return 1
    }
}
