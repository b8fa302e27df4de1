//! Locking the module in, before any of its code runs.
//!
//! Two processes. The *outer* one is the daemon's child: it makes the namespaces, forks, gives up
//! every privilege and the socket, and waits. The *inner* one is pid 1 of the new pid namespace, so
//! that whatever a module forks dies with it; it builds its own root (`root`), gives up every
//! privilege (`privileges`), and only then loads the module.
//!
//! *Guarantees.* A step that fails ends in a [`FaultKind::Isolation`] that names it; nothing is
//! loaded. Each process dies with its parent: the kernel sends SIGKILL (PR_SET_PDEATHSIG), and as
//! that can be set too late, each looks afterwards whether the parent is still there.
//!
//! *Caveats.* The network is the host's: that is where the HSM is. Abstract sockets therefore can be
//! reached by name, and the daemon tells its callers apart by more than their uid. `/etc` is the
//! host's, live: if the daemon's folder in it is removed and made anew while a host runs, the cover
//! over it is gone, and its files' modes alone keep them from the module's user.

mod privileges;
mod root;
mod view;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use hsm_wire::fault::{Fault, FaultKind};
use nix::fcntl::OFlag;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getppid, pipe2, read, setsid, write};

use crate::args::Isolation;
use crate::channel::Channel;
use crate::serve::leave;

/// What the outer process tells the inner one when it has given up its privileges.
const READY: &[u8] = b"ready";

/// The inner process's hold on the outer one.
pub(crate) struct Tether(OwnedFd);

/// Closes what the daemon may have left open by mistake, and ties this process to it. For every mode.
pub(crate) fn prepare(channel: &Channel) -> Result<(), Fault> {
    // SAFETY: nothing in this process owns a descriptor above the socket's: it is the first thing
    // that `main` opens or adopts. The C library's wrapper is younger than the one we link with.
    let closed =
        unsafe { libc::syscall(libc::SYS_close_range, channel.first_above(), u32::MAX, 0) };
    if closed == -1 {
        return Err(step("close_range", "close inherited descriptors")(
            io::Error::last_os_error(),
        ));
    }
    privileges::seal_memory()?;
    privileges::set_no_new_privileges()?;
    die_with_parent()?;
    // The daemon may have died before that took effect. It alone holds the other end of the socket.
    if channel.is_hung_up() {
        leave(0);
    }
    Ok(())
}

/// Splits the process in two. Returns in the inner one, or in the outer one if it comes to no inner.
pub(crate) fn split(
    channel: Channel,
    isolation: &Isolation,
) -> Result<(Channel, Tether), (Channel, Fault)> {
    let daemon = getppid();
    // The terminal's signals are for the daemon, which ends us when it is done. Fails for a process
    // that leads a group already, which is as good.
    let _ = setsid();
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    if let Err(errno) = unshare(namespaces) {
        let what = "make namespaces, which takes CAP_SYS_ADMIN";
        return Err((channel, step("unshare", what)(errno.into())));
    }
    let (from_outer, to_inner) = match pipe2(OFlag::O_CLOEXEC) {
        Ok(ends) => ends,
        Err(errno) => return Err((channel, step("pipe2", "make a pipe")(errno.into()))),
    };
    // SAFETY: the process has one thread: `main` has started none, and no vendor code is loaded.
    match unsafe { fork() } {
        Err(errno) => Err((
            channel,
            step("fork", "start the inner process")(errno.into()),
        )),
        Ok(ForkResult::Parent { child }) => {
            drop(channel);
            drop(from_outer);
            keep_watch(child, daemon, &to_inner, isolation)
        }
        Ok(ForkResult::Child) => {
            drop(to_inner);
            let tether = Tether(from_outer);
            match tether.verdict() {
                Ok(()) => Ok((channel, tether)),
                Err(fault) => Err((channel, fault)),
            }
        }
    }
}

/// Locks the inner process in with what `module` needs.
pub(crate) fn confine(isolation: &Isolation, module: &Path, tether: Tether) -> Result<(), Fault> {
    let view = view::View::new(isolation, module, &loader_folders())?;
    root::enter(&view)?;
    let _ = setsid();
    privileges::drop_all(isolation.uid, isolation.gid)?;
    // Cleared by the change of the user.
    die_with_parent()?;
    if tether.is_cut() {
        leave(0);
    }
    Ok(())
}

/// The outer process's rest of life.
fn keep_watch(child: Pid, daemon: Pid, to_inner: &OwnedFd, isolation: &Isolation) -> ! {
    let dropped =
        privileges::drop_all(isolation.uid, isolation.gid).and_then(|()| die_with_parent());
    // At most PIPE_BUF bytes: written and read in one piece. If the inner process is gone, waiting
    // for it says why.
    let _ = match dropped {
        Ok(()) => write(to_inner, READY),
        Err(fault) => write(to_inner, fault.to_string().as_bytes()),
    };
    if getppid() != daemon {
        leave(0);
    }
    loop {
        match waitpid(child, None) {
            Ok(WaitStatus::Exited(_, code)) => leave(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => leave(128 + signal as i32),
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(_) => leave(1),
        }
    }
}

impl Tether {
    fn verdict(&self) -> Result<(), Fault> {
        let mut text = [0; 2048];
        match read(&self.0, &mut text) {
            // The outer process has died.
            Ok(0) => leave(0),
            Ok(n) if &text[..n] == READY => Ok(()),
            Ok(n) => Err(Fault::new(
                FaultKind::Isolation,
                String::from_utf8_lossy(&text[..n]),
            )),
            Err(errno) => Err(step("read", "hear from the outer process")(errno.into())),
        }
    }

    fn is_cut(&self) -> bool {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0)
    }
}

fn die_with_parent() -> Result<(), Fault> {
    prctl::set_pdeathsig(Signal::SIGKILL)
        .map_err(|errno| step("prctl", "tie itself to its parent")(errno.into()))
}

/// The folders of an explicit loader and of its `--library-path`: what the module is linked with is
/// found there later. Empty when the program was started plainly.
///
/// The kernel keeps the whole command line, the loader gives us only our part of it.
fn loader_folders() -> Vec<std::path::PathBuf> {
    let whole = std::fs::read("/proc/self/cmdline").unwrap_or_default();
    let whole: Vec<&[u8]> = whole.split(|byte| *byte == 0).collect();
    // One more for what follows the last separator.
    let ours = std::env::args_os().count() + 1;
    let loader = &whole[..whole.len().saturating_sub(ours)];
    view::loader_folders(loader)
}

/// The fault of a failed step: `function` could not do `what`.
fn step(function: &str, what: impl std::fmt::Display) -> impl Fn(io::Error) -> Fault {
    move |error| Fault {
        function: function.to_owned(),
        ..Fault::new(
            FaultKind::Isolation,
            format!("the module host cannot {what}: {error}"),
        )
    }
}
