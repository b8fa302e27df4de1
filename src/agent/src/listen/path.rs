//! Puts a socket file in its place with owner and mode already right, in a folder that may belong
//! to somebody else.
//!
//! `bind` makes a file that is open to whom the umask says, and `chmod` by path may by then mean
//! another file: whoever owns the folder can replace it in between. So the socket is made in a
//! folder of our own, which nobody else can enter, gets its mode and owner and begins to listen
//! there, and is renamed to its place. Every step goes by descriptor or by a name in our own
//! folder.
//!
//! That also makes a path longer than a socket address allows bindable: a client may see the folder
//! under a shorter one.

use std::ffi::{OsStr, OsString};
use std::fs::{self, ReadDir};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat, renameat};
use nix::sys::socket::{UnixAddr, bind as bind_socket};
use nix::sys::stat::{FchmodatFlags, FileStat, Mode, SFlag, fchmodat, fstat, fstatat, mkdirat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, geteuid, unlinkat};

use super::State;
use super::probe::{Holder, Life, life, start_listening, stream_socket};

/// What our own folders are called; the rest of the name is random.
const PREFIX: &str = ".hsmd-";
/// The socket's name in there.
const SOCKET: &str = "s";
/// A folder of ours that is older than this was left by a predecessor that died in between.
const LEFT_BEHIND: Duration = Duration::from_secs(60);
/// Entries of the folder that are looked at for such leftovers. The audit folder holds a dozen
/// files; its owner could make more.
const SWEEP_LIMIT: usize = 1024;
/// Attempts to find a name for our folder that is free. One is enough unless somebody guesses 64
/// bits.
const NAME_ATTEMPTS: usize = 4;

/// Whom the socket belongs to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owner {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// Which file it is, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    fn of(stat: &FileStat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
        }
    }
}

/// Listens at a path. `instead_of_our_own`: a socket on which this very process listens is replaced
/// like a stale one.
pub(super) fn bind(
    path: &Path,
    owner: Owner,
    instead_of_our_own: bool,
    host_proc: &Path,
) -> Result<(UnixListener, FileId), State> {
    let (folder, name) = open_folder(path).map_err(|errno| without_folder(path, errno))?;
    check_folder(path, &folder, owner)?;
    sweep(&folder);
    match find(&folder, name, host_proc)
        .map_err(|errno| failed(&format!("looking at {}", path.display()), errno))?
    {
        Found::Nothing | Found::Stale => {}
        Found::Live(holder) if holder.pid == i32::try_from(std::process::id()).ok() => {
            if !instead_of_our_own {
                return Err(State::Failed {
                    reason: "another listener of this daemon has taken its place".into(),
                });
            }
        }
        Found::Live(holder) => return Err(State::Taken { holder }),
        Found::Other(kind) => {
            return Err(State::Failed {
                reason: format!(
                    "{} is {kind}; remove it or choose another path",
                    path.display()
                ),
            });
        }
    }
    let private = PrivateFolder::make(&folder)?;
    let (socket, file) = private
        .listen(owner)
        .map_err(|(doing, errno)| failed(doing, errno))?;
    renameat(&private.folder, SOCKET, &folder, name)
        .map_err(|errno| failed(&format!("moving the socket to {}", path.display()), errno))?;
    Ok((socket.into(), file))
}

/// Whether the path, resolved anew, is known not to be this file any more: a mount over the folder
/// moves the place as well.
///
/// Not being able to look, for want of a descriptor, is no reason to give up a socket that clients
/// reach.
pub(crate) fn is_lost(path: &Path, file: FileId) -> bool {
    match identify(path) {
        Ok(found) => found != file,
        Err(errno) => matches!(errno, Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP),
    }
}

/// Removes the socket if the path still is this file.
pub(crate) fn remove(path: &Path, file: FileId) {
    let Ok((folder, name)) = open_folder(path) else {
        return;
    };
    if fstatat(&folder, name, AtFlags::AT_SYMLINK_NOFOLLOW)
        .is_ok_and(|stat| FileId::of(&stat) == file)
        && let Err(errno) = unlinkat(&folder, name, UnlinkatFlags::NoRemoveDir)
    {
        tracing::warn!(path = %path.display(), "cannot remove the socket: {}", errno.desc());
    }
}

fn identify(path: &Path) -> Result<FileId, Errno> {
    let (folder, name) = open_folder(path)?;
    Ok(FileId::of(&fstatat(
        &folder,
        name,
        AtFlags::AT_SYMLINK_NOFOLLOW,
    )?))
}

fn failed(doing: &str, errno: Errno) -> State {
    State::Failed {
        reason: format!("{doing} failed: {}", errno.desc()),
    }
}

/// The folder and the name in it.
fn open_folder(path: &Path) -> Result<(OwnedFd, &OsStr), Errno> {
    let (parent, name) = path.parent().zip(path.file_name()).ok_or(Errno::EINVAL)?;
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok((open(parent, flags, Mode::empty())?, name))
}

/// What it means for us that the folder cannot be opened.
fn without_folder(path: &Path, errno: Errno) -> State {
    let parent = path.parent().unwrap_or(path).display();
    match errno {
        Errno::ENOENT => State::Waiting {
            reason: format!("the folder {parent} does not exist yet"),
        },
        // The folder of a link can be changed by changing the link, whoever owns the folder.
        Errno::ENOTDIR | Errno::ELOOP => State::Failed {
            reason: format!(
                "{parent} is not a folder, or is a symbolic link to one; give the path without the link"
            ),
        },
        _ => failed(&format!("opening {parent}"), errno),
    }
}

/// Refuses a folder in which somebody could put a socket of their own in the place of ours.
///
/// Whoever may write to a folder may rename in it, unless it is sticky. Its owner may always: so
/// that must be root, ourselves, or the socket's owner, who is the one we want to be reached by and
/// gains nothing.
fn check_folder(path: &Path, folder: &OwnedFd, owner: Owner) -> Result<(), State> {
    let parent = path.parent().unwrap_or(path).display();
    let stat = fstat(folder).map_err(|errno| failed(&format!("looking at {parent}"), errno))?;
    let mode = stat.st_mode & 0o7777;
    if ![0, geteuid().as_raw(), owner.uid].contains(&stat.st_uid) {
        let reason = format!(
            "{parent} belongs to uid {}, who could replace the socket; give it to root or to uid {}",
            stat.st_uid, owner.uid
        );
        return Err(State::Failed { reason });
    }
    if mode & 0o022 != 0 && mode & 0o1000 == 0 {
        let reason = format!(
            "{parent} has mode {mode:04o}: more than its owner could replace the socket; chmod go-w it"
        );
        return Err(State::Failed { reason });
    }
    Ok(())
}

/// What is at the name.
enum Found {
    Nothing,
    Stale,
    Live(Holder),
    Other(&'static str),
}

fn find(folder: &OwnedFd, name: &OsStr, host_proc: &Path) -> Result<Found, Errno> {
    // Held by descriptor, so that what is asked whether it lives is what was seen to be a socket.
    let file = match openat(
        folder,
        name,
        OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
        Mode::empty(),
    ) {
        Ok(file) => file,
        Err(Errno::ENOENT) => return Ok(Found::Nothing),
        Err(errno) => return Err(errno),
    };
    let kind = SFlag::from_bits_truncate(fstat(&file)?.st_mode) & SFlag::S_IFMT;
    if kind != SFlag::S_IFSOCK {
        return Ok(Found::Other(match kind {
            SFlag::S_IFREG => "a regular file",
            SFlag::S_IFDIR => "a folder",
            SFlag::S_IFLNK => "a symbolic link",
            SFlag::S_IFIFO => "a named pipe",
            _ => "a device",
        }));
    }
    let address = UnixAddr::new(format!("/proc/self/fd/{}", file.as_raw_fd()).as_str())?;
    Ok(match life(&address, host_proc)? {
        Life::Stale => Found::Stale,
        Life::Live(holder) => Found::Live(holder),
    })
}

/// A folder that only we can enter, beside the place where the socket goes. Removed when dropped.
struct PrivateFolder<'a> {
    parent: &'a OwnedFd,
    name: OsString,
    folder: OwnedFd,
}

impl<'a> PrivateFolder<'a> {
    fn make(parent: &'a OwnedFd) -> Result<Self, State> {
        for _ in 0..NAME_ATTEMPTS {
            let name = OsString::from(format!(
                "{PREFIX}{:016x}",
                RandomState::new().build_hasher().finish()
            ));
            match mkdirat(parent, name.as_os_str(), Mode::S_IRWXU) {
                Ok(()) => return Self::enter(parent, name),
                Err(Errno::EEXIST) => {}
                Err(errno) => return Err(failed("making a folder for the socket", errno)),
            }
        }
        Err(failed("making a folder for the socket", Errno::EEXIST))
    }

    /// Opens the folder just made. Who owns the parent may have put another in its place, so it
    /// counts only if it is one that nobody but us can have made or can enter: then it does not
    /// matter which it is.
    fn enter(parent: &'a OwnedFd, name: OsString) -> Result<Self, State> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let doing = "entering the folder made for the socket";
        let folder = openat(parent, name.as_os_str(), flags, Mode::empty())
            .map_err(|errno| failed(doing, errno))?;
        let stat = fstat(&folder).map_err(|errno| failed(doing, errno))?;
        let here = fstat(parent).map_err(|errno| failed(doing, errno))?;
        // The bits beyond are inherited from a parent that hands on its group.
        let private = stat.st_uid == geteuid().as_raw()
            && stat.st_mode & 0o777 == 0o700
            && stat.st_dev == here.st_dev;
        let empty = entries(&folder).is_ok_and(|mut entries| entries.next().is_none());
        if !private || !empty {
            return Err(State::Failed {
                reason: "somebody replaced the folder made for the socket".into(),
            });
        }
        Ok(Self {
            parent,
            name,
            folder,
        })
    }

    /// Makes the socket in here, complete.
    fn listen(&self, owner: Owner) -> Result<(OwnedFd, FileId), (&'static str, Errno)> {
        let socket = stream_socket().map_err(|errno| ("making a socket", errno))?;
        let address = format!("/proc/self/fd/{}/{SOCKET}", self.folder.as_raw_fd());
        UnixAddr::new(address.as_str())
            .and_then(|address| bind_socket(socket.as_raw_fd(), &address))
            .map_err(|errno| ("binding the socket", errno))?;
        fchmodat(
            &self.folder,
            SOCKET,
            Mode::from_bits_truncate(owner.mode),
            FchmodatFlags::NoFollowSymlink,
        )
        .map_err(|errno| ("setting the socket's mode", errno))?;
        fchownat(
            &self.folder,
            SOCKET,
            Some(Uid::from_raw(owner.uid)),
            Some(Gid::from_raw(owner.gid)),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        )
        .map_err(|errno| ("setting the socket's owner", errno))?;
        start_listening(&socket).map_err(|errno| ("listening", errno))?;
        let stat = fstatat(&self.folder, SOCKET, AtFlags::AT_SYMLINK_NOFOLLOW)
            .map_err(|errno| ("looking at the socket", errno))?;
        Ok((socket, FileId::of(&stat)))
    }
}

impl Drop for PrivateFolder<'_> {
    fn drop(&mut self) {
        discard(self.parent, &self.name, &self.folder);
    }
}

/// Removes a folder of ours and the socket that may be in it. What cannot be removed is left for
/// the next sweep.
fn discard(parent: &OwnedFd, name: &OsStr, folder: &OwnedFd) {
    let _ = unlinkat(folder, SOCKET, UnlinkatFlags::NoRemoveDir);
    let _ = unlinkat(parent, name, UnlinkatFlags::RemoveDir);
}

/// By the descriptor: the folder's name may mean another one by now.
fn entries(folder: &OwnedFd) -> io::Result<ReadDir> {
    fs::read_dir(format!("/proc/self/fd/{}", folder.as_raw_fd()))
}

/// Removes what a predecessor left that died between making its folder and removing it.
fn sweep(parent: &OwnedFd) {
    let Ok(entries) = entries(parent) else { return };
    let left_behind: Vec<OsString> = entries
        .take(SWEEP_LIMIT)
        .filter_map(|entry| Some(entry.ok()?.file_name()))
        .filter(|name| name.as_bytes().starts_with(PREFIX.as_bytes()))
        .collect();
    for name in left_behind {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let Ok(folder) = openat(parent, name.as_os_str(), flags, Mode::empty()) else {
            continue;
        };
        let ours_and_old = fstat(&folder)
            .is_ok_and(|stat| stat.st_uid == geteuid().as_raw() && age(&stat) > LEFT_BEHIND);
        if ours_and_old {
            discard(parent, &name, &folder);
        }
    }
}

fn age(stat: &FileStat) -> Duration {
    let changed = u64::try_from(stat.st_mtime).map_or(UNIX_EPOCH, |seconds| {
        UNIX_EPOCH + Duration::from_secs(seconds)
    });
    SystemTime::now()
        .duration_since(changed)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    /// What comes of entering a folder that `swap` has put in the place of ours.
    fn entered(swap: impl FnOnce(&Path)) -> Result<(), State> {
        let parent = tempfile::tempdir().unwrap();
        let descriptor = OwnedFd::from(fs::File::open(parent.path()).unwrap());
        swap(&parent.path().join("private"));
        PrivateFolder::enter(&descriptor, "private".into()).map(drop)
    }

    fn make(path: &Path, mode: u32) {
        fs::create_dir(path).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_folder_counts_as_private_if_only_we_can_have_made_and_can_enter_it() {
        assert_eq!(entered(|path| make(path, 0o700)), Ok(()));
        assert_eq!(
            entered(|path| make(path, 0o2700)),
            Ok(()),
            "inherited from its parent"
        );
        let replaced = Err(State::Failed {
            reason: "somebody replaced the folder made for the socket".into(),
        });
        assert_eq!(entered(|path| make(path, 0o711)), replaced);
        assert_eq!(entered(|path| make(path, 0o770)), replaced);
        let anothers = |path: &Path| {
            make(path, 0o700);
            chown(path, Some(65534), Some(65534)).unwrap();
        };
        assert_eq!(entered(anothers), replaced);
        let prepared = |path: &Path| {
            make(path, 0o700);
            fs::write(path.join(SOCKET), "").unwrap();
        };
        assert_eq!(entered(prepared), replaced);
    }

    #[test]
    fn a_link_to_a_private_folder_is_not_one() {
        let linked = |path: &Path| {
            make(&path.with_extension("real"), 0o700);
            symlink("private.real", path).unwrap();
        };
        assert!(entered(linked).is_err());
        assert!(entered(|path| fs::write(path, "").unwrap()).is_err());
        assert!(entered(|_| {}).is_err());
    }
}
