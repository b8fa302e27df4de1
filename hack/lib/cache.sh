# Where everything that is slow to make is kept between runs: outside the repository, one folder per NAME-VERSION.
#
# To be sourced. It defines
#   cache_root                       prints the cache folder and makes it
#   cached FOLDER KEY WHAT COMMAND…  prints FOLDER's path in the cache; makes it first, when it is absent or was made
#                                    from another KEY, by running COMMAND… with an empty folder as its last argument
#
# A folder in the cache is always whole: it is made beside its place under a lock and then renamed, so a run that was
# interrupted leaves nothing that a later run could mistake for the finished thing. Progress goes to stderr.

cache_root() {
    local root=${TALOS_HSM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/talos-hsm}
    mkdir -p "$root" || return
    printf '%s\n' "$root"
}

cached() {
    local folder=$1 key=$2 what=$3
    shift 3
    local root place
    root=$(cache_root) || return
    place=$root/$folder
    # The common case takes no lock: two runs may use a finished folder at once.
    if ! _cache_has "$place" "$key"; then
        (
            # The lock is held by the open descriptor, so it goes with the process, however that ends; COMMAND does
            # not inherit it (9>&-), or a daemon that it leaves behind would hold the lock for ever.
            exec 9>"$root/.lock-$folder"
            if ! flock -n 9; then
                printf '%s: another run is making it, waiting ...\n' "$what" >&2
                flock 9
            fi
            ! _cache_has "$place" "$key" || exit 0
            # What a killed run left half made; nobody else makes this folder while we hold the lock.
            rm -rf "$root/.making-$folder".*
            printf '%s ...\n' "$what" >&2
            fresh=$root/.making-$folder.$BASHPID
            mkdir -m 755 "$fresh" || exit
            # The ticker ends when descriptor 8 does, that is with this shell, even when it is killed.
            exec 8> >(exec 9>&-; _cache_still_at_it "$what" >&2)
            trap 'rm -rf "$fresh" "$fresh.old"' EXIT
            trap 'exit 130' INT
            trap 'exit 143' TERM
            "$@" "$fresh" >&2 8>&- 9>&- || {
                status=$?
                printf 'error: %s failed (exit status %s)\n' "$what" "$status" >&2
                exit "$status"
            }
            printf '%s\n' "$key" >"$fresh/.key"
            if [ -e "$place" ]; then
                # What runs from the old folder keeps its open files.
                mv -T "$place" "$fresh.old" || exit
            fi
            mv -T "$fresh" "$place"
        ) || return
    fi
    printf '%s\n' "$place"
}

_cache_has() {
    [ -f "$1/.key" ] && [ "$(cat "$1/.key")" = "$2" ]
}

# A build says nothing for minutes; this says that it still runs. Reads an input on which nothing ever comes but its end.
_cache_still_at_it() {
    local what=${1%% (*} began=$SECONDS
    until read -rt 30; [ $? -le 128 ]; do
        printf '    %s: %d min %02d s so far ...\n' "$what" $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60))
    done
}
