//! As PID 1 of a container, hsmd inherits orphans and must reap them.
//!
//! It looks before it reaps: a module host that ended is its supervisor's to reap, which learns from
//! it how the host ended.

use std::io;
use std::time::Duration;

use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use tokio::signal::unix::{SignalKind, signal};

/// Between looks when no SIGCHLD comes: two children that end together send one signal.
const PERIOD: Duration = Duration::from_secs(1);

/// Begins to reap, if this process is PID 1.
pub(super) fn start() -> io::Result<()> {
    if std::process::id() != 1 {
        return Ok(());
    }
    let mut ended = signal(SignalKind::child())?;
    tokio::spawn(async move {
        loop {
            let _ = tokio::time::timeout(PERIOD, ended.recv()).await;
            reap();
        }
    });
    Ok(())
}

fn reap() {
    let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    while let Ok(status) = waitid(Id::All, look) {
        let Some(pid) = status.pid().filter(|_| status != WaitStatus::StillAlive) else {
            return;
        };
        if hsm_token_client::owns(pid.as_raw().unsigned_abs()) {
            // Its supervisor is about to reap it; orphans behind it wait for the next look.
            return;
        }
        if let Ok(ended) = waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
            tracing::debug!(?ended, "reaped an orphan");
        }
    }
}
