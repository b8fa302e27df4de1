//! Asks the kernel which process made a connection, and in which cgroup it is.
//!
//! A process id alone proves nothing: it may be used again by the time it is looked up. So the
//! kernel is asked for a pidfd, the id is read from *our own* `fdinfo` of it, the cgroup is read by
//! that id, and afterwards the pidfd must still say that the process lives: while it does, nobody
//! else can have had its id.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};
use nix::sys::stat::Mode;
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};

use super::Refusal;
use super::parse;

/// A procfs file we read is at most this long. The longest is `cgroup`: a path of at most 4096
/// bytes for each of the kernel's fourteen controllers, were each mounted on its own.
const PROC_FILE_LIMIT: u64 = 64 * 1024;

/// The process at the other end of a connected socket: whoever called `connect`, or `listen` if we
/// connected.
pub(super) struct Process {
    pidfd: OwnedFd,
}

impl Process {
    /// Asks the socket for it.
    pub(super) fn of_peer(socket: &impl AsFd) -> Result<Self, Refusal> {
        match getsockopt(socket, sockopt::PeerPidfd) {
            Ok(pidfd) => Ok(Self { pidfd }),
            // Before Linux 6.16 a pidfd cannot be had for a process that was already reaped, and
            // these say so.
            Err(Errno::ESRCH | Errno::EINVAL | Errno::ENOENT) => Err(Refusal::Exited),
            Err(Errno::ENOPROTOOPT) => Err(Refusal::NoPidfd),
            Err(source) => Err(Refusal::Trouble {
                doing: "asking for the peer's pidfd".into(),
                source: source.into(),
            }),
        }
    }

    /// The path of its cgroup in the unified hierarchy.
    pub(super) fn cgroup(&self, host_proc: &HostProc<'_>) -> Result<String, Refusal> {
        let fdinfo = host_proc.read(&format!("self/fdinfo/{}", self.pidfd.as_raw_fd()))?;
        let pid = match parse::pidfd_pid(&fdinfo) {
            Some(pid @ 1..) => pid,
            Some(0) => {
                return Err(Refusal::PidHidden {
                    host_proc: host_proc.path.to_owned(),
                });
            }
            Some(_) => return Err(Refusal::Exited),
            None => return Err(host_proc.unusable("fdinfo of a pidfd names no Pid")),
        };
        let cgroup = host_proc.read(&format!("{pid}/cgroup"));
        // Only now: until here the process lived, so the id was its own all the time.
        if self.has_exited()? {
            return Err(Refusal::Exited);
        }
        let cgroup = cgroup?;
        let path = parse::unified_cgroup(&cgroup)
            .ok_or_else(|| host_proc.unusable("the peer has no cgroup in the unified hierarchy"))?;
        if parse::is_outside_our_cgroup_namespace(path) {
            return Err(Refusal::CgroupNamespace {
                cgroup: path.to_owned(),
            });
        }
        Ok(path.to_owned())
    }

    fn has_exited(&self) -> Result<bool, Refusal> {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut fds, PollTimeout::ZERO) {
                Ok(ready) => return Ok(ready != 0),
                Err(Errno::EINTR) => {}
                Err(source) => {
                    return Err(Refusal::Trouble {
                        doing: "polling the peer's pidfd".into(),
                        source: source.into(),
                    });
                }
            }
        }
    }
}

/// A procfs in which our peers can be seen: the host's, when we live in a pid namespace of our own.
pub(super) struct HostProc<'a> {
    path: &'a Path,
    folder: OwnedFd,
}

impl<'a> HostProc<'a> {
    /// Opens it, and makes sure that it is a procfs and that we are in it.
    pub(super) fn open(path: &'a Path) -> Result<Self, Refusal> {
        let folder = match open(
            path,
            OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
            Mode::empty(),
        ) {
            Ok(folder) => folder,
            Err(errno) => return Err(refusal(path, path.display().to_string(), errno)),
        };
        let host_proc = Self { path, folder };
        let kind = fstatfs(&host_proc.folder)
            .map_err(|errno| refusal(path, path.display().to_string(), errno))?;
        if kind.filesystem_type() != PROC_SUPER_MAGIC {
            return Err(host_proc.unusable("it is not a procfs"));
        }
        // `self` of a procfs is always the reader, by its id in the pid namespace of that mount. A
        // procfs of a namespace we are not in has no `self`; what else might stand there does not
        // end in the id that we know as ours.
        if parse::innermost_pid(&host_proc.read("self/status")?) != Some(std::process::id()) {
            return Err(host_proc.unusable("its self is not this process"));
        }
        Ok(host_proc)
    }

    /// Whether a uid the kernel shows us is the uid that the host means.
    pub(super) fn has_identity_uid_map(&self) -> Result<bool, Refusal> {
        Ok(parse::is_identity_uid_map(&self.read("self/uid_map")?))
    }

    fn read(&self, name: &str) -> Result<String, Refusal> {
        let full = || self.path.join(name).display().to_string();
        let file = openat(
            &self.folder,
            name,
            OFlag::O_RDONLY | OFlag::O_CLOEXEC,
            Mode::empty(),
        )
        .map_err(|errno| refusal(self.path, full(), errno))?;
        let mut bytes = Vec::new();
        File::from(file)
            .take(PROC_FILE_LIMIT + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| {
                let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
                refusal(self.path, full(), errno)
            })?;
        if bytes.len() as u64 > PROC_FILE_LIMIT {
            return Err(self.unusable(&format!("{name} is longer than {PROC_FILE_LIMIT} bytes")));
        }
        // A cgroup may have any bytes for a name. Replacing what is not UTF-8 cannot make a name
        // that the rules accept.
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn unusable(&self, reason: &str) -> Refusal {
        Refusal::NoHostProc {
            host_proc: self.path.to_owned(),
            reason: reason.to_owned(),
        }
    }
}

/// Tells a procfs that cannot show the peer from a shortage that the peer itself may have caused:
/// only the first lets a path socket go by its permissions alone.
fn refusal(host_proc: &Path, file: String, errno: Errno) -> Refusal {
    match errno {
        Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::EINTR | Errno::EIO => {
            Refusal::Trouble {
                doing: format!("reading {file}"),
                source: errno.into(),
            }
        }
        _ => Refusal::NoHostProc {
            host_proc: host_proc.to_owned(),
            reason: format!("{file}: {}", errno.desc()),
        },
    }
}
