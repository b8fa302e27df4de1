# The release binaries, side by side as they are installed.
#
# To be sourced. It defines
#   build_dist    builds target/dist/hsmd and target/dist/hsmctl (static, musl) and target/dist/hsm-token (glibc 2.28 or
#                 later)
#
# hsm-token is linked against an old glibc because it runs with whatever libc the vendor's module was shipped with
# (RHEL 8's has 2.28). zig brings the symbol tables of that glibc.

# shellcheck source=hack/lib/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

_build_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

build_dist() {
    local tools dist=$_build_root/target/dist
    need gcc libc6-dev || return
    need_rust || return
    tools=$(zig_tools) || return
    (
        cd "$_build_root" || exit
        _build_flags
        cargo build --release --locked --target x86_64-unknown-linux-musl -p hsmd -p hsmctl </dev/null || exit
        PATH=$tools:$PATH CARGO_ZIGBUILD_CACHE_DIR=$(cache_root)/zigbuild ZIG_GLOBAL_CACHE_DIR=$(cache_root)/zig-objects \
            cargo zigbuild --release --locked --target x86_64-unknown-linux-gnu.2.28 -p hsm-token </dev/null || exit
        mkdir -p "$dist"
        _build_place target/x86_64-unknown-linux-musl/release/hsmd "$dist/hsmd"
        _build_place target/x86_64-unknown-linux-musl/release/hsmctl "$dist/hsmctl"
        _build_place target/x86_64-unknown-linux-gnu/release/hsm-token "$dist/hsm-token"
    ) >&2
}

# Paths of the machine that built it would make every machine's binary another one, and tell who built it.
_build_flags() {
    local flags=(
        "--remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo"
        "--remap-path-prefix=$(rustc --print sysroot)=/rust"
        "--remap-path-prefix=$_build_root=/talos-hsm"
    )
    local IFS=$'\x1f'
    export CARGO_ENCODED_RUSTFLAGS="${flags[*]}"
    unset RUSTFLAGS
}

# By rename: the old file may be running.
_build_place() {
    cmp -s "$1" "$2" || {
        cp "$1" "$2.new" && mv "$2.new" "$2"
    }
}
