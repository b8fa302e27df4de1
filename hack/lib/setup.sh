# What the scripts need of the machine, installed when it is absent and left alone when it is there.
#
# To be sourced. It defines
#   need PACKAGE…              installs those of these Debian packages whose program or library is missing
#   need_rust                  the pinned toolchain with the target of the static daemon
#   need_nightly               a nightly toolchain: only the fuzz targets want one, for the sanitizer
#   zig_tools                  prints the folder with cargo-zigbuild and its zig (from the cache)
#   cargo_tool NAME            prints the path of a program installed by cargo (from the cache): cargo-deny, cargo-fuzz
#
# Nothing here reads standard input. Progress goes to stderr.

# shellcheck source=hack/lib/cache.sh
. "$(dirname "${BASH_SOURCE[0]}")/cache.sh"

_setup_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# Raise the two together: each cargo-zigbuild knows the zig versions of its time.
ZIGLANG_VERSION=0.17.1
CARGO_ZIGBUILD_VERSION=0.24.0
CARGO_DENY_VERSION=0.20.2
CARGO_FUZZ_VERSION=0.13.2

need() {
    local package missing=()
    for package in "$@"; do
        _setup_has "$package" || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
        printf 'error: these Debian packages are missing: %s\nhint: as root: apt-get install %s\n' \
            "${missing[*]}" "${missing[*]}" >&2
        return 1
    fi
    printf 'installing %s ...\n' "${missing[*]}" >&2
    # The lists of a new machine are empty or old. The time-out is for a lock that another apt holds.
    _setup_quietly apt-get -o DPkg::Lock::Timeout=300 update || return
    _setup_quietly env DEBIAN_FRONTEND=noninteractive \
        apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "${missing[@]}"
}

# Asks for the program or file, not for the package: the same thing from elsewhere (another distribution, a build by
# hand) counts too.
_setup_has() {
    case $1 in
    binutils) command -v objdump ;;
    gcc) command -v cc ;;
    g++) command -v c++ ;;
    libclang-dev) compgen -G '/usr/lib/llvm-*/lib/libclang.so' || compgen -G '/usr/lib/*/libclang*.so' ;;
    libssl-dev) [ -e /usr/include/openssl/evp.h ] ;;
    libsqlite3-dev) [ -e /usr/include/sqlite3.h ] ;;
    libc6-dev) [ -e /usr/include/stdio.h ] ;;
    opencryptoki) command -v pkcsslotd ;;
    opensc) command -v pkcs11-tool ;;
    python3-pip) python3 -m pip --version ;;
    softhsm2) command -v softhsm2-util ;;
    util-linux) command -v setpriv ;;
    *) command -v "$1" ;;
    esac >/dev/null 2>&1
}

need_rust() {
    local channel
    channel=$(sed -n 's/^channel = "\(.*\)"/\1/p' "$_setup_root/rust-toolchain.toml")
    command -v rustup >/dev/null || {
        printf 'error: rustup is missing: it provides Rust %s, which this repository pins\nhint: apt-get install rustup, or see the Rust project'"'"'s site\n' \
            "$channel" >&2
        return 1
    }
    _setup_toolchain "$channel" clippy rustfmt || return
    if ! rustup +"$channel" target list --installed | grep -qx x86_64-unknown-linux-musl; then
        printf 'installing Rust %s for x86_64-unknown-linux-musl ...\n' "$channel" >&2
        _setup_quietly rustup target add --toolchain "$channel" x86_64-unknown-linux-musl
    fi
}

need_nightly() {
    _setup_toolchain nightly
}

# TOOLCHAIN COMPONENT…
_setup_toolchain() {
    local toolchain=$1 component missing=()
    shift
    if ! rustup toolchain list | grep -q "^$toolchain\(-\| \|$\)"; then
        printf 'installing Rust %s ...\n' "$toolchain" >&2
        _setup_quietly rustup toolchain install "$toolchain" --profile minimal --no-self-update || return
    fi
    for component in "$@"; do
        rustup +"$toolchain" component list --installed | grep -q "^$component" || missing+=("$component")
    done
    [ ${#missing[@]} -eq 0 ] || _setup_quietly rustup component add --toolchain "$toolchain" "${missing[@]}"
}

zig_tools() {
    local folder
    folder=$(cached "zig-$ZIGLANG_VERSION" "cargo-zigbuild $CARGO_ZIGBUILD_VERSION" \
        "fetching zig $ZIGLANG_VERSION (links against an old glibc)" _setup_zig) || return
    printf '%s/bin\n' "$folder"
}

# FOLDER: a virtual environment would not survive the rename into the cache, so the wheels are unpacked as they are.
_setup_zig() {
    local folder=$1
    need python3-pip || return
    PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --no-input --target "$folder/lib" \
        "ziglang==$ZIGLANG_VERSION" "cargo-zigbuild==$CARGO_ZIGBUILD_VERSION" </dev/null || return
    mkdir "$folder/bin"
    ln -s ../lib/bin/cargo-zigbuild "$folder/bin/cargo-zigbuild"
    ln -s ../lib/ziglang/zig "$folder/bin/zig"
}

cargo_tool() {
    local name=$1 version folder
    case $name in
    cargo-deny) version=$CARGO_DENY_VERSION ;;
    cargo-fuzz) version=$CARGO_FUZZ_VERSION ;;
    *)
        printf 'error: hack/lib/setup.sh pins no version of "%s"\n' "$name" >&2
        return 2
        ;;
    esac
    folder=$(cached "$name-$version" "$version" "installing $name $version (about 2 minutes)" \
        _setup_cargo_install "$name" "$version") || return
    printf '%s/bin/%s\n' "$folder" "$name"
}

_setup_cargo_install() {
    local name=$1 version=$2 folder=$3
    # From the repository, so that the pinned compiler builds it.
    (cd "$_setup_root" && CARGO_TARGET_DIR="$folder/build" \
        cargo install --quiet --locked --no-track --root "$folder" --version "=$version" "$name" </dev/null) || return
    rm -rf "$folder/build"
}

# Runs a command and shows what it said only when it failed.
_setup_quietly() {
    local said status=0
    said=$("$@" </dev/null 2>&1) || status=$?
    [ "$status" -eq 0 ] || {
        printf '%s\nerror: %s: failed (exit status %s)\n' "$said" "$*" "$status" >&2
        return "$status"
    }
}
