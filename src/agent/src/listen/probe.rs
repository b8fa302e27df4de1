//! Finds out whether somebody listens at a name, and who.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, listen,
    socket, sockopt,
};

use super::State;
use crate::peer::cgroup_of_peer;

/// Connections the kernel keeps for us while we are busy: those of one endpoint at once, twice.
const BACKLOG: i32 = 128;

/// Somebody who listens where we want to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Holder {
    /// Its user when it called `listen`.
    pub(crate) uid: Option<u32>,
    /// Its process, where our pid namespace shows it.
    pub(crate) pid: Option<i32>,
    /// Its cgroup, where the host's procfs shows it.
    pub(crate) cgroup: Option<String>,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name is held by ")?;
        match self.uid {
            Some(uid) => write!(f, "a process of uid {uid}")?,
            None => f.write_str("a process that does not answer")?,
        }
        if let Some(pid) = self.pid {
            write!(f, ", pid {pid}")?;
        }
        if let Some(cgroup) = &self.cgroup {
            write!(f, ", cgroup {cgroup:?}")?;
        }
        f.write_str("; clients that use it now reach that process, not this one: stop it")
    }
}

/// Whether somebody listens at an address.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Life {
    /// Nobody: what is there was left behind.
    Stale,
    /// Somebody.
    Live(Holder),
}

/// Asks by connecting, never waiting: a listener that does not accept must not hold us up.
pub(super) fn life(address: &UnixAddr, host_proc: &Path) -> Result<Life, Errno> {
    let asking = stream_socket()?;
    match connect(asking.as_raw_fd(), address) {
        Ok(()) => {}
        // Its backlog is full: somebody listens, but cannot be asked.
        Err(Errno::EAGAIN) => return Ok(Life::Live(Holder::default())),
        // A socket of another type, bound by a process that lives.
        Err(Errno::EPROTOTYPE) => return Ok(Life::Live(Holder::default())),
        Err(Errno::ECONNREFUSED) => return Ok(Life::Stale),
        Err(errno) => return Err(errno),
    }
    // After connect these are the credentials with which the other side called listen.
    let credentials = getsockopt(&asking, sockopt::PeerCredentials)?;
    Ok(Life::Live(Holder {
        uid: Some(credentials.uid()),
        pid: Some(credentials.pid()).filter(|pid| *pid > 0),
        cgroup: cgroup_of_peer(&asking.as_fd(), host_proc),
    }))
}

/// Listens at an abstract name.
pub(super) fn bind_abstract(name: &str, host_proc: &Path) -> Result<UnixListener, State> {
    let failed = |doing: &str, errno: Errno| State::Failed {
        reason: format!("{doing} failed: {}", errno.desc()),
    };
    let address = UnixAddr::new_abstract(name.as_bytes())
        .map_err(|errno| failed("making its address", errno))?;
    let listening = stream_socket().map_err(|errno| failed("making a socket", errno))?;
    match bind(listening.as_raw_fd(), &address) {
        Ok(()) => {}
        Err(Errno::EADDRINUSE) => {
            return Err(match life(&address, host_proc) {
                Ok(Life::Live(holder)) => State::Taken { holder },
                // An abstract name is never left behind: this is a process that has bound it and
                // does not listen.
                Ok(Life::Stale) => State::Taken {
                    holder: Holder::default(),
                },
                Err(errno) => failed("asking who holds the name", errno),
            });
        }
        Err(errno) => return Err(failed("binding the name", errno)),
    }
    start_listening(&listening).map_err(|errno| failed("listening", errno))?;
    Ok(listening.into())
}

/// A socket that neither blocks nor is inherited by the processes we start.
pub(super) fn stream_socket() -> Result<OwnedFd, Errno> {
    socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
        None,
    )
}

/// Lets clients connect to a socket that is bound.
pub(super) fn start_listening(socket: &OwnedFd) -> Result<(), Errno> {
    listen(socket, Backlog::new(BACKLOG)?)
}
